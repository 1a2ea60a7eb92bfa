"""Products with a matrix for each expert, one expert after the other: for devices without a fast gathered product."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import mlx.core as mx
import numpy as np

from runner.ops.quantized import QuantizedWeight


def by_expert(
    x: mx.array, experts: mx.array, multiply: Callable[[mx.array, int], mx.array], *, sorted_indices: bool = False
) -> mx.array:
    """`multiply(rows, e)` for the rows of x that chose expert e, each expert's matrix read once.

    Args:
        x: `[..., 1, in]`, its leading dimensions broadcast to those of `experts`.
        experts: `[...]`, integers; evaluated here, since which products there are depends on them.
        multiply: `[rows, in]` and an expert -> `[rows, out]`.
        sorted_indices: whether `experts` is `[rows]` and sorted.

    Returns:
        `[..., 1, out]`.
    """
    rows = mx.broadcast_to(x, (*experts.shape, 1, x.shape[-1])).reshape(-1, x.shape[-1])
    chosen = np.array(experts).flatten()
    if not sorted_indices:
        order = np.argsort(chosen, kind="stable")
        rows, chosen = rows[mx.array(order)], chosen[order]
    starts = [0, *(np.flatnonzero(np.diff(chosen)) + 1).tolist(), len(chosen)]
    pieces = [multiply(rows[a:b], int(chosen[a])) for a, b in itertools.pairwise(starts)]
    result = mx.concatenate(pieces)
    return (result if sorted_indices else result[mx.array(np.argsort(order))]).reshape(*experts.shape, 1, -1)


def matrix(stacked: mx.array, expert: int) -> mx.array:
    """One expert's part of `[E, ...]`, where it lies: `stacked[expert]` would be a copy."""
    return mx.squeeze(stacked[expert : expert + 1], 0)


def gather_linear(linear: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """`Ops.gather_linear` from a device's `Ops.linear`."""

    def gather(x: mx.array, weight: mx.array, experts: mx.array, *, sorted_indices: bool = False) -> mx.array:
        def multiply(rows: mx.array, expert: int) -> mx.array:
            return linear(rows, matrix(weight, expert), None)

        return by_expert(x, experts, multiply, sorted_indices=sorted_indices)

    return gather


def gather_quantized_linear(quantized_linear: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """`Ops.gather_quantized_linear` from a device's `Ops.quantized_linear`."""

    def gather(x: mx.array, matrices: QuantizedWeight, experts: mx.array, *, sorted_indices: bool = False) -> mx.array:
        def multiply(rows: mx.array, expert: int) -> mx.array:
            biases = None if matrices.biases is None else matrix(matrices.biases, expert)
            weight, scales = matrix(matrices.weight, expert), matrix(matrices.scales, expert)
            return quantized_linear(rows, matrices._replace(weight=weight, scales=scales, biases=biases), None)

        return by_expert(x, experts, multiply, sorted_indices=sorted_indices)

    return gather
