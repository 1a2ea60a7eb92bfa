"""The input of one forward pass, besides weights and caches."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import mlx.core as mx

T = TypeVar("T")


class Apart(Exception):
    """Raised where a layer would have to tell the requests of a shared pass apart, and cannot: each needs its own."""


@dataclass(frozen=True)
class Segment:
    """The tokens of one request in a pass that is shared by several.

    Attributes:
        count: how many there are.
        offset: the position of the first of them in its own sequence.
        length: tokens of the whole prompt that they are a piece of; None: they end the sequence, as decoded ones do.
    """

    count: int
    offset: int
    length: int | None = None


@dataclass(frozen=True)
class Batch:
    """Ids `[B, L]`, the position of the first of them, and the attention mask of one forward pass.

    `offset` is a number, or `[B]` with one for each row. `length` is the length of the whole prompt if this pass is one
    chunk of it (RoPE variants that depend on the sequence length must see the same length in all chunks), else None.
    `mask` None means causal.

    With `segments`, `ids` is `[1, T]`: the tokens of several requests one behind the other, which only see those of
    their own. Then `offset` is the position of each of the T tokens, and `length` the length of each one's sequence.
    Matrices see T rows; what looks at other tokens (attention, recurrences, masks) takes the pass apart by `parts`.
    """

    ids: mx.array
    offset: int | mx.array | tuple[int, ...] = 0
    length: int | tuple[int, ...] | None = None
    mask: mx.array | None = None
    segments: tuple[Segment, ...] = ()
    _shared: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    @classmethod
    def of(cls, ids: mx.array, segments: Sequence[Segment]) -> Batch:
        """A pass over `ids` `[1, T]`, the tokens of several requests."""
        positions: list[int] = []
        lengths: list[int] = []
        for segment in segments:
            end = segment.offset + segment.count
            positions += range(segment.offset, end)
            lengths += [end if segment.length is None else segment.length] * segment.count
        return cls(ids, tuple(positions), tuple(lengths), segments=tuple(segments))

    def once(self, name: Hashable, make: Callable[[], T]) -> T:
        """What `make` returns, made for the first layer that asks for `name` and shared by the later ones of this pass.

        `name` must hold all that the result depends on besides the batch itself.
        """
        if name not in self._shared:
            self._shared[name] = make()
        found: T = self._shared[name]
        return found

    @property
    def steps(self) -> tuple[bool, ...]:
        """Whether each request has a single token here, which was decoded."""
        return self.once("steps", lambda: tuple(one.count == 1 and one.length is None for one in self.segments))

    @property
    def parts(self) -> tuple[Batch, ...]:
        """The pass as one batch for each request; itself where there are no segments."""
        return self.once("parts", self._parts) if self.segments else (self,)

    def _parts(self) -> tuple[Batch, ...]:
        pieces = zip(self.split(self.ids), self.segments, strict=True)
        return tuple(Batch(ids, segment.offset, segment.length) for ids, segment in pieces)

    def with_parts(self, parts: Sequence[Batch]) -> Batch:
        """A copy of this pass with other `parts`, which have masks of their own; `parts[0]` without segments."""
        if not self.segments:
            (part,) = parts
            return part
        changed = replace(self)
        changed._shared["parts"] = tuple(parts)
        return changed

    @property
    def masked(self) -> bool:
        """Whether a part has a mask of its own."""
        return any(part.mask is not None for part in self._shared.get("parts", ()))

    def split(self, array: mx.array, axis: int = 1) -> list[mx.array]:
        """The rows of each request of an array that has the pass' tokens along `axis`."""
        if len(self.segments) < 2:
            return [array]
        ends = itertools.accumulate(segment.count for segment in self.segments[:-1])
        return list(mx.split(array, list(ends), axis))

    def apart(self, function: Callable[..., mx.array], cache: Any, *arrays: mx.array) -> mx.array:
        """`function(cache, *arrays)`, request by request: arrays and result have the tokens along axis 1."""
        if not self.segments:
            alone: mx.array = function(cache, *arrays)
            return alone
        pieces = zip(*(self.split(array) for array in arrays), strict=True)
        return together([function(own, *piece) for own, piece in zip(cache.each, pieces, strict=True)])


def together(pieces: Sequence[mx.array], axis: int = 1) -> mx.array:
    """The inverse of `Batch.split`."""
    return pieces[0] if len(pieces) == 1 else mx.concatenate(list(pieces), axis)
