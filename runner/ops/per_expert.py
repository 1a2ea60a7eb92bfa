"""Products with one matrix per expert, expert after expert: for devices without a fast gathered product."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import mlx.core as mx

from runner.ops.quantized import QuantizedWeight
from runner.ops.table import biased


def by_expert(
    x: mx.array, experts: mx.array, multiply: Callable[[mx.array, int], mx.array], *, sorted_indices: bool = False
) -> mx.array:
    """Apply `multiply(rows, e)` to the rows of x that chose expert e, reading each expert's matrix once.

    Args:
        x: `[..., 1, in]`, whose leading dimensions broadcast to those of `experts`.
        experts: `[...]` integers; evaluated here, since they decide which products there are.
        multiply: maps rows `[rows, in]` and an expert's index to `[rows, out]`.
        sorted_indices: whether `experts` is `[rows]` and sorted.

    Returns:
        `[..., 1, out]`.
    """
    # Bring the rows of each expert together, multiply each run of them, and restore the order.
    import numpy as np  # imported late: a tenth of a short answer's time, and most models have no experts

    rows = mx.broadcast_to(x, (*experts.shape, 1, x.shape[-1])).reshape(-1, x.shape[-1])
    chosen = np.array(experts).flatten()
    if not sorted_indices:
        order = np.argsort(chosen, kind="stable")
        rows, chosen = rows[mx.array(order)], chosen[order]
    # Runs of equal experts start where the sorted list changes.
    starts = [0, *(np.flatnonzero(np.diff(chosen)) + 1).tolist(), len(chosen)]
    pieces = [multiply(rows[a:b], int(chosen[a])) for a, b in itertools.pairwise(starts)]
    result = mx.concatenate(pieces)
    return (result if sorted_indices else result[mx.array(np.argsort(order))]).reshape(*experts.shape, 1, -1)


def matrix(stacked: mx.array, expert: int) -> mx.array:
    """One expert's part of `[E, ...]` without a copy, which `stacked[expert]` would be."""
    return mx.squeeze(stacked[expert : expert + 1], 0)


def gather_linear(linear: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """Make `Ops.gather_linear` from a device's `Ops.linear`."""

    def gather(
        x: mx.array, weight: mx.array, experts: mx.array, bias: mx.array | None = None, *, sorted_indices: bool = False
    ) -> mx.array:
        def multiply(rows: mx.array, expert: int) -> mx.array:
            return linear(rows, matrix(weight, expert), None)

        return biased(by_expert(x, experts, multiply, sorted_indices=sorted_indices), bias, experts)

    return gather


def gather_quantized_linear(quantized_linear: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """Make `Ops.gather_quantized_linear` from a device's `Ops.quantized_linear`."""

    def gather(
        x: mx.array,
        matrices: QuantizedWeight,
        experts: mx.array,
        bias: mx.array | None = None,
        *,
        sorted_indices: bool = False,
    ) -> mx.array:
        def multiply(rows: mx.array, expert: int) -> mx.array:
            biases = None if matrices.biases is None else matrix(matrices.biases, expert)
            weight, scales = matrix(matrices.weight, expert), matrix(matrices.scales, expert)
            return quantized_linear(rows, matrices._replace(weight=weight, scales=scales, biases=biases), None)

        return biased(by_expert(x, experts, multiply, sorted_indices=sorted_indices), bias, experts)

    return gather
