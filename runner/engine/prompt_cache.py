"""Prompt caching: the KV caches of a conversation are kept, so that the next turn prefills only its new tokens."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import mlx.core as mx

from runner.cache.mark import Marks
from runner.engine.loaded import Loaded
from runner.errors import UsageError

if TYPE_CHECKING:
    from runner.engine.rows import Row

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
        self._weights: Mapping[str, float] = {}
        self.clear()

    def __repr__(self) -> str:
        return f"PromptCache({self.caches.offset} tokens, {self.caches.nbytes / 1e6:.1f} MB)"

    def clear(self) -> None:
        """Forget everything."""
        self.caches = self._engine.new_caches()
        self._ids: list[int] = []
        self._marks: list[Marks] = []
        self._parted = 0
        self._places: frozenset[int] = frozenset()

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

    def begin(self, row: Row) -> None:
        """Give a row the caches, which hold as much of the beginning of its ids as there is."""
        place = self._reuse(row.ids, row.order.weights)
        if not row.picked and not row.mailbox.read:
            row.mailbox.reused = place
        self._places = self._cuts()
        row.begin(self.caches)

    def stop(self, row: Row) -> int | None:
        """The next position at which the reading of a row should pause for `mark`."""
        return min((place for place in self._places if place > row.offset), default=None)

    def leave(self, row: Row, *, sound: bool = True) -> None:
        """Keep what the caches hold; not `sound`, after a pass that failed, forget it: layers may have come apart."""
        if not sound:
            self.clear()

    def offered(self, row: Row) -> int:
        """Bytes that a row takes over: it is the only one, and nobody counts."""
        return self.caches.nbytes

    def awaits(self, row: Row, live: Sequence[Row]) -> bool:
        """There is nobody to wait for."""
        return False

    def _reuse(self, ids: list[int], weights: Mapping[str, float]) -> int:
        """Make the caches hold a prefix of `ids` and return its length; at least one token is left to prefill.

        `ids` grow by the tokens of the answer; `weights` are those of the adapters that it is computed with.
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
        self._ids, self._weights, self._parted = ids, weights, common
        return place

    def _cuts(self) -> frozenset[int]:
        """Places at which the reading of `_ids` should pause for a `mark`."""
        if not self._keeps or not self.caches.needs_marks:
            return frozenset()
        # Where this prompt parts from the last one the next may part too; at its end but one token, as one must be
        # left to read; and now and then in a long one.
        last = len(self._ids) - 1
        return frozenset(place for place in (self._parted, *range(SPACING, last, SPACING), last) if 0 < place <= last)

    def mark(self, row: Row) -> None:
        """Where the reading has paused for it, keep what is needed to come back; the oldest marks go, over `BUDGET`."""
        if row.offset not in self._places:
            return
        marks = self.caches.mark()
        mx.eval(marks.arrays)
        self._marks = [other for other in self._marks if other.offset != marks.offset] + [marks]
        while len(self._marks) > 1 and sum(other.nbytes for other in self._marks) > BUDGET:
            del self._marks[0]
