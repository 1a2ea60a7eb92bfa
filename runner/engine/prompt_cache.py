"""Prompt caching: the KV caches of a conversation are kept, so that the next turn prefills only its new tokens."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from runner.engine.engine import Engine
from runner.errors import UsageError

T = TypeVar("T")


class User(Protocol):
    """An answer that uses a prompt cache."""

    @property
    def engine(self) -> Engine: ...
    @property
    def active(self) -> bool: ...


class PromptCache:
    """The KV caches of one conversation and the token ids in them. One answer uses it at a time.

    A prompt that begins with the ids of the last one continues after them. Where it differs, the caches are cut back to
    the common prefix, or emptied where they cannot be cut (a sliding window that has moved on, RoPE frequencies that
    depend on the length, adapter weights that have changed).
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._user: weakref.ref[User] | None = None
        self._weights: dict[str, float] = {}
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self.caches = self._engine.new_caches()
        self._ids: list[int] = []

    def lend(self, user: User) -> None:
        """Give the caches to one answer, until its `active` is false or it is gone. A job of the owner's thread.

        Raises:
            UsageError: another answer is using them, or they belong to another model.
        """
        if user.engine is not self._engine:
            raise UsageError("this prompt cache belongs to another model: take one of lm.prompt_cache()")
        # No lock that an interrupted answer could leave locked: jobs do not overlap, and are never interrupted.
        using = None if self._user is None else self._user()
        if using is not None and using.active:
            raise UsageError(
                "this prompt cache is in use by another answer, which has not ended: "
                "read that one to its end or close() it, or give each its own lm.prompt_cache()"
            )
        self._user = weakref.ref(user)

    def whole(self, work: Callable[[], T]) -> T:
        """Return `work()`, passes over the caches; if it raises, forget everything: layers may have come apart."""
        try:
            return work()
        except BaseException:
            self.clear()
            raise

    def reuse(self, ids: Sequence[int], weights: dict[str, float]) -> int:
        """Make the caches hold a prefix of `ids` and return its length; at least one token is left to prefill.

        Args:
            weights: names and weights of the adapters that the answer is computed with.
        """
        # The last token of an answer may not have been fed back, so the caches can hold one id less than `_ids`; an
        # answer that was interrupted may have fed back tokens that nobody has read: then they hold more.
        held = self.caches[0].offset
        common = 0
        for known, wanted in zip(self._ids[:held], ids[:-1], strict=False):
            if known != wanted:
                break
            common += 1
        # All caches are trimmed, or none: a model's layers must agree on the offset.
        surplus = held - common
        fixed = not self._engine.config.rope_depends_on_length and self._weights == weights
        if fixed and common and all(surplus <= cache.trimmable() for cache in self.caches):
            for cache in self.caches:
                cache.trim(surplus)
        else:
            common = 0
            self.clear()
        self._ids, self._weights = list(ids), weights
        return common

    def add(self, token: int) -> None:
        """Append a token of the answer; the caches hold it already, or will once it is fed back."""
        self._ids.append(token)
