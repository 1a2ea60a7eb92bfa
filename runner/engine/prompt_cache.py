"""Prompt caching: the KV caches of a conversation are kept, so that the next turn prefills only its new tokens."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import mlx.core as mx

from runner.cache.caches import Marks
from runner.engine.loaded import Loaded
from runner.errors import UsageError

T = TypeVar("T")

BUDGET = 512 << 20
"""Bytes of marks in one prompt cache. A mark holds recurrent states and windows: 64 MB in a Qwen 3.5 35B-A3B."""

SPACING = 4096
"""Tokens of a long prompt between two marks."""


class User(Protocol):
    """An answer that uses a prompt cache."""

    @property
    def engine(self) -> Loaded: ...
    @property
    def active(self) -> bool: ...


class PromptCache:
    """The KV caches of one conversation and the token ids in them. One answer uses it at a time.

    A prompt that begins with the ids of the last one continues after them. Where it differs, the caches go back to the
    common prefix, or to the nearest mark before it where they cannot be cut there (a sliding window that has moved on,
    a recurrent state). They are emptied where RoPE frequencies depend on the length or adapter weights have changed.
    """

    def __init__(self, engine: Loaded, *, keeps: bool = True) -> None:
        """Make an empty one; `keeps` false: for a single answer, to which nothing comes back."""
        self._engine = engine
        self._keeps = keeps
        self._user: weakref.ref[User] | None = None
        self._weights: dict[str, float] = {}
        self.clear()

    def __repr__(self) -> str:
        return f"PromptCache({self.caches.offset} tokens, {self.caches.nbytes / 1e6:.1f} MB)"

    def clear(self) -> None:
        """Forget everything."""
        self.caches = self._engine.new_caches()
        self._ids: list[int] = []
        self._marks: list[Marks] = []
        self._parted = 0

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
        pairs = zip(self._ids[: self.caches.offset], ids[:-1], strict=False)
        common = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        if self._engine.config.rope_depends_on_length or self._weights != weights:
            common = 0
        # Not every place can be come back to: states and windows that have moved on need a mark.
        place = self.caches.reach(common, self._marks)
        if place:
            self.caches.rewind(place, self._marks)
            self._marks = [marks for marks in self._marks if marks.offset <= common]
        else:
            self.clear()
        self._ids, self._weights, self._parted = list(ids), weights, common
        return place

    def cuts(self) -> frozenset[int]:
        """Places at which the prefill of the ids given to `reuse` should pause for a `mark`."""
        if not self._keeps or not self.caches.needs_marks:
            return frozenset()
        # Where this prompt parts from the last one the next may part too; at its end but one token, as one must be
        # left to read; and now and then in a long one.
        last = len(self._ids) - 1
        return frozenset(place for place in (self._parted, *range(SPACING, last, SPACING), last) if 0 < place <= last)

    def mark(self) -> None:
        """Keep what is needed to come back to where the caches are; the oldest marks go first, within `BUDGET`."""
        marks = self.caches.mark()
        mx.eval(marks.arrays)
        self._marks = [other for other in self._marks if other.offset != marks.offset] + [marks]
        while len(self._marks) > 1 and sum(other.nbytes for other in self._marks) > BUDGET:
            del self._marks[0]

    def add(self, token: int) -> None:
        """Append a token of the answer; the caches hold it already, or will once it is fed back."""
        self._ids.append(token)
