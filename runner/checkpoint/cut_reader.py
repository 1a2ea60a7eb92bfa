"""Reading a part of a stored tensor: its bytes alone, where they lie together."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterator, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from runner.weights.cuts import Axis, Cut, cut_shape, within

BUFFER = 32 << 20
"""Bytes that are held beside the part, or those of one place along its first axis, if these are more."""

RUN = 1 << 14
"""Bytes that lie together from which on the rest is left unread: systems read files by pages, and ahead."""

Bytes = npt.NDArray[np.uint8]


def read_cut(file: int, offset: int, shape: Sequence[int], dtype: mx.Dtype, cut: Cut) -> mx.array:
    """The kept places of a tensor that begins at `offset` of a file.

    Args:
        file: a descriptor of the file.
        shape: of the whole tensor, which has an axis or more; any of them may be of no length.

    Raises:
        EOFError: the file ends before the tensor does.
        OSError: it cannot be read.
    """
    wanted = cut_shape(shape, cut)
    if 0 in wanted:
        return mx.zeros(wanted, dtype)
    place = math.prod(wanted[1:]) * dtype.size  # bytes of a place along the first axis
    step = max(1, BUFFER // max(place, 1))
    first: Axis = ((0, shape[0]),) if cut[0] is None else cut[0]
    pieces = [(start, min(start + step, wanted[0])) for start in range(0, wanted[0], step)]
    whole = mx.zeros(wanted, dtype) if len(pieces) != 1 else None
    for start, stop in pieces:
        part = (within(first, start, stop), *cut[1:])
        data = _bytes(file, offset, (*shape, dtype.size), (*part, None))
        piece = mx.array(data.reshape(-1)).view(dtype).reshape(stop - start, *wanted[1:])
        if whole is None:
            return piece
        whole[start:stop] = piece
        mx.eval(whole)  # in place, so that the next piece takes the room of this one
    assert whole is not None
    return whole


def _bytes(file: int, offset: int, shape: Sequence[int], cut: Cut) -> Bytes:
    """The kept places of a tensor of bytes."""
    found = np.empty(cut_shape(shape, cut), np.uint8)
    axis = next((axis for axis, kept in enumerate(cut) if kept is not None and axis), 0)
    kept, inner = cut[axis] or ((0, shape[axis]),), math.prod(shape[axis + 1 :])
    # Each of these outer places has runs of bytes that are kept. Where they are short, all between them is read too.
    outer = _cut(np.arange(math.prod(shape[:axis])).reshape(shape[:axis]), cut[:axis]).reshape(-1)
    rows = found.reshape(len(outer), -1)
    whole = all(kept is None for kept in cut[axis + 1 :])
    if whole and (not axis or min(stop - start for start, stop in kept) * inner >= RUN):
        for row, index in zip(rows, outer.tolist(), strict=True):
            done = 0
            for start, stop in kept:
                end = done + (stop - start) * inner
                _read(file, offset + (index * shape[axis] + start) * inner, row[done:end])
                done = end
        return found
    each = shape[axis] * inner
    for first, last in _neighbours(outer, max(1, BUFFER // each)):
        block = np.empty((last - first, *shape[axis:]), np.uint8)
        _read(file, offset + int(outer[first]) * each, block.reshape(-1))
        rows[first:last] = _cut(block, (None, *cut[axis:])).reshape(last - first, -1)
    return found


def _neighbours(places: npt.NDArray[np.int64], most: int) -> Iterator[tuple[int, int]]:
    """Cut ascending `places` into runs `(first, last)` of those that follow on each other, `most` at once."""
    ends = np.flatnonzero(np.diff(places) != 1) + 1
    for start, stop in itertools.pairwise([0, *ends.tolist(), len(places)]):
        for first in range(start, stop, most):
            yield first, min(first + most, stop)


def _cut(array: Any, cut: Cut) -> Any:
    """The kept places of an array."""
    for axis, kept in enumerate(cut):
        if kept is not None:
            array = np.concatenate([array[(slice(None),) * axis + (slice(*each),)] for each in kept], axis=axis)
    return array


def _read(file: int, offset: int, into: Bytes) -> None:
    """Fill `into` from the file."""
    view = into.data
    while view:
        count = os.preadv(file, [view], offset)
        if not count:
            raise EOFError
        view, offset = view[count:], offset + count
