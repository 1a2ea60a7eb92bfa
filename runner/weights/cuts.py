"""Which places of a stored tensor are wanted, and sources that read no others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import mlx.core as mx

from runner.weights.tags import Source

Axis = tuple[tuple[int, int], ...]
"""Which places along an axis are kept: ranges `(start, stop)`, in the order in which they are kept."""

Cut = tuple[Axis | None, ...]
"""Which places of each axis of a stored tensor are kept; None: all."""


@runtime_checkable
class PartSource(Source, Protocol):
    """A source that can leave the rest of a tensor unread."""

    def read_part(self, name: str, cut: Cut) -> mx.array:
        """The kept places of tensor `name`: memory holds no more than them and a buffer."""


def read_part(source: Source, name: str, cut: Cut) -> mx.array:
    """The kept places of a tensor; of a source that cannot do better, it is read whole first."""
    return source.read_part(name, cut) if isinstance(source, PartSource) else cut_out(source.read(name), cut)


def cut_out(array: mx.array, cut: Cut) -> mx.array:
    """A copy of the kept places of `array`: a view would keep all of it in memory."""
    for axis, kept in enumerate(cut):
        if kept is not None:
            pieces = [array[(slice(None),) * axis + (slice(*each),)] for each in kept]
            array = pieces[0] if len(pieces) == 1 else mx.concatenate(pieces, axis=axis)
    return mx.contiguous(array)


def cut_shape(shape: Sequence[int], cut: Cut) -> tuple[int, ...]:
    """The shape of what is kept."""
    return tuple(size if kept is None else length(kept) for size, kept in zip(shape, cut, strict=True))


def length(kept: Axis) -> int:
    """How many places are kept along an axis."""
    return sum(stop - start for start, stop in kept)


def within(kept: Axis, first: int, last: int) -> Axis:
    """The places `first` to `last` of those that are kept."""
    found = []
    for start, stop in kept:
        begin, end = start + max(first, 0), min(stop, start + last)
        if begin < end:
            found.append((begin, end))
        first, last = first - (stop - start), last - (stop - start)
    return tuple(found)
