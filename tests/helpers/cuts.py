"""Parts of tensors for tests: places that are drawn, and bytes that were read."""

from __future__ import annotations

import random
from pathlib import Path

import mlx.core as mx

from runner.weights.cuts import Axis, Cut


def some(size: int, unit: int, draw: random.Random) -> Axis:
    """Some places of an axis, in one or two ranges of whole units."""
    first, last = sorted(draw.sample(range(size // unit + 1), 2))
    middle = draw.randint(first, last)
    ranges = [(first, middle), (middle + (middle < last), last)]
    return tuple((start * unit, stop * unit) for start, stop in ranges if start < stop) or ((0, size),)


def any_cut(shape: tuple[int, ...], draw: random.Random) -> Cut:
    """A cut along one axis."""
    axis = draw.randrange(len(shape))
    return tuple(some(size, 1, draw) if at == axis else None for at, size in enumerate(shape))


def equal(one: mx.array, other: mx.array) -> bool:
    """Whether two arrays have the same bits' numbers, shape and dtype."""
    return one.dtype == other.dtype and one.shape == other.shape and bool(mx.array_equal(one, other, equal_nan=True))


def read_so_far() -> int:
    """Bytes that this process has read from files, as Linux counts them."""
    return int(Path("/proc/self/io").read_text().split()[1])
