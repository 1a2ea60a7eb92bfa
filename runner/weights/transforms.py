"""How a stored tensor becomes a field's value, where the two differ; each transform has an inverse, to save models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx


@dataclass(frozen=True)
class Transform:
    """A named, invertible change of an array; `shape` maps the field's shape to the stored one.

    `widens` says that it gives float32, whatever is stored. `order` says which stored row each row of the field is, of
    so many, where rows are in another order; `swaps`, that rows are stored as columns.
    """

    name: str
    apply: Callable[[mx.array], mx.array]
    invert: Callable[[mx.array], mx.array]
    shape: Callable[[tuple[int, ...]], tuple[int, ...]]
    widens: bool = False
    order: Callable[[int], list[int]] | None = None
    swaps: bool = False

    def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape in the file, given the field's `shape`."""
        return self.shape(shape)

    def then(self, other: Transform) -> Transform:
        """The transform that applies this one, then `other`."""
        if self is IDENTITY or other is IDENTITY:
            return other if self is IDENTITY else self
        return Transform(
            f"{self.name}, {other.name}",
            lambda array: other.apply(self.apply(array)),
            lambda array: self.invert(other.invert(array)),
            lambda shape: self.shape(other.shape(shape)),  # from the field's shape back: the last transform first
            self.widens or other.widens,
            self.order or other.order,
            self.swaps or other.swaps,
        )


def _same(array: mx.array) -> mx.array:
    return array


def _swap(array: mx.array) -> mx.array:
    return mx.contiguous(array.swapaxes(-1, -2)) if array.ndim > 1 else array


IDENTITY = Transform("identity", _same, _same, lambda shape: shape)

TRANSPOSE = Transform(
    "transpose",
    _swap,
    _swap,
    lambda shape: (*shape[:-2], shape[-1], shape[-2]) if len(shape) > 1 else shape,
    swaps=True,
)
"""Matrices stored `[..., in, out]` (GPT-2's Conv1D, gpt-oss's experts) become `[..., out, in]`; vectors stay."""


def _alternate(array: mx.array) -> mx.array:
    """The inverse of `HALVES`: rows of the two matrices in turn."""
    first, second = mx.split(array, 2, axis=1)
    return mx.stack([first, second], axis=2).reshape(array.shape)


HALVES = Transform(
    "halves",
    lambda array: mx.concatenate([array[:, ::2], array[:, 1::2]], axis=1),
    _alternate,
    lambda shape: shape,
    order=lambda rows: [*range(0, rows, 2), *range(1, rows, 2)],
)
"""Rows of two matrices alternate in the file (axis 1, axis 0 being a stack): all of the first, then of the second."""

MX_BLOCKS = Transform(
    "mx blocks",
    lambda array: mx.contiguous(array.flatten(-2)).view(mx.uint32),
    lambda array: array.view(mx.uint8).reshape(*array.shape[:-1], -1, 16),
    lambda shape: (*shape[:-1], shape[-1] // 4, 16),
)
"""MXFP4 blocks of 32 numbers, stored as bytes `[..., blocks, 16]`, become MLX's uint32 words; no byte changes."""

PLUS_ONE = Transform(
    "+1",
    lambda array: (array.astype(mx.float32) + 1).astype(mx.float32),
    lambda array: array - 1,
    lambda shape: shape,
    widens=True,
)
"""Norm weights stored as the difference from one (Gemma); kept in float32, where adding one loses next to nothing."""


def permute_rows(name: str, order: Callable[[int], list[int]]) -> Transform:
    """A transform that reorders rows: row `i` of the field is row `order(rows)[i]` of the file."""

    def invert(array: mx.array) -> mx.array:
        # The inverse permutation: stored row `old` comes from field row `new`.
        rows = order(array.shape[0])
        back = [0] * len(rows)
        for new, old in enumerate(rows):
            back[old] = new
        return array[mx.array(back)]

    return Transform(
        name, lambda array: array[mx.array(order(array.shape[0]))], invert, lambda shape: shape, order=order
    )
