"""What one conversation leaves in the KV caches, so that the next turn reads only what is new."""

from __future__ import annotations

from collections.abc import Sequence

from runner.engine.engine import Engine


class PromptCache:
    """The caches of one conversation and the ids they hold. Not for two answers at the same time.

    A prompt that starts with the ids of the last one goes on behind them; where it differs, the caches are cut back to
    the common part, or emptied where they can't be (a window that moved on, frequencies that depend on the length,
    adapters with other weights).
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.caches = engine.new_caches()
        self._ids: list[int] = []
        self._weights = self._adapter_weights()

    def reuse(self, ids: Sequence[int]) -> int:
        """Make the caches hold a prefix of `ids`, at least one token short of all, and return its length."""
        held = self.caches[0].offset
        common = 0
        for known, wanted in zip(self._ids[:held], ids[:-1], strict=False):
            if known != wanted:
                break
            common += 1
        surplus = held - common
        fixed = not self._engine.config.rope_depends_on_length and self._weights == self._adapter_weights()
        if fixed and common and all(surplus <= cache.trimmable() for cache in self.caches):
            for cache in self.caches:
                cache.trim(surplus)
        else:
            common = 0
            self.caches = self._engine.new_caches()
        self._ids, self._weights = list(ids), self._adapter_weights()
        return common

    def _adapter_weights(self) -> dict[str, float]:
        """What the keys and values depend on besides the tokens."""
        return {} if self._engine.adapters is None else dict(self._engine.adapters.weights)

    def add(self, token: int) -> None:
        """A token of the answer: the caches hold it already, or will once it is fed back."""
        self._ids.append(token)
