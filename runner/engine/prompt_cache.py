"""Prompt caching: the KV caches of a conversation are kept, so that the next turn prefills only its new tokens."""

from __future__ import annotations

from collections.abc import Sequence

from runner.engine.engine import Engine


class PromptCache:
    """The KV caches of one conversation and the token ids in them. Not for two answers at the same time.

    A prompt that begins with the ids of the last one continues after them. Where it differs, the caches are cut back to
    the common prefix, or emptied where they cannot be cut (a sliding window that has moved on, RoPE frequencies that
    depend on the length, adapter weights that have changed).
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.caches = engine.new_caches()
        self._ids: list[int] = []
        self._weights = self._adapter_weights()

    def reuse(self, ids: Sequence[int]) -> int:
        """Make the caches hold a prefix of `ids` and return its length; at least one token is left to prefill."""
        # The last token of an answer may not have been fed back, so the caches can hold one id less than `_ids`.
        held = self.caches[0].offset
        common = 0
        for known, wanted in zip(self._ids[:held], ids[:-1], strict=False):
            if known != wanted:
                break
            common += 1
        # All caches are trimmed, or none: a model's layers must agree on the offset.
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
        """Adapter names and weights, on which the cached keys and values depend besides the tokens."""
        return {} if self._engine.adapters is None else dict(self._engine.adapters.weights)

    def add(self, token: int) -> None:
        """Append a token of the answer; the caches hold it already, or will once it is fed back."""
        self._ids.append(token)
