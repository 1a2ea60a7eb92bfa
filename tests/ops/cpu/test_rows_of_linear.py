"""A row's result is a function of that row and the weights alone: bit for bit, whatever stands beside it."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from twins import numpy

from runner.ops import cpu as kernels
from runner.ops.cpu import _C
from runner.ops.quantized import QuantizedWeight
from runner.ops.table import PORTABLE, Ops

fast_settings = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)
FORMS = ["float32", "float16", "bfloat16", *[f"affine{bits}" for bits in (2, 3, 4, 5, 6, 8)], "mxfp4", "mxfp8", "nvfp4"]
ODD = [np.nan, np.inf, -np.inf, 1e30, 3e38, 0.0]


def layer(ops: Ops, form: str, n: int, k: int, group_size: int, seed: int) -> Callable[[mx.array], mx.array]:
    """A linear layer of [n, k] in one of the forms that weights come in."""
    weight = mx.random.normal((n, k), key=mx.random.key(seed))
    if form.startswith(("float", "bfloat")):
        stored = weight.astype(getattr(mx, form))
        return lambda x: ops.linear(x, stored, None)
    if form.startswith("affine"):
        bits = int(form[6:])
        packed, scales, shifts = mx.quantize(weight, group_size=group_size, bits=bits)
        scale_type = (mx.float32, mx.float16, mx.bfloat16)[seed % 3]
        matrix = QuantizedWeight(
            packed, scales.astype(scale_type), shifts.astype(scale_type), group_size, bits, "affine"
        )
    else:
        packed, scales = mx.quantize(weight, mode=form)
        bits, size = {"mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}[form]
        matrix = QuantizedWeight(packed, scales, None, size, bits, form)
    return lambda x: ops.quantized_linear(x, matrix, None)


def same_bits(a: mx.array, b: mx.array) -> bool:
    """Equal bytes, but for which NaN it is."""
    x, y = numpy(a), numpy(b)
    return np.array_equal(np.isnan(x), np.isnan(y)) and np.array_equal(np.nan_to_num(x), np.nan_to_num(y))


@fast_settings
@given(
    st.sampled_from(FORMS),
    st.integers(1, 70),
    st.integers(1, 100),
    st.integers(1, 20),
    st.sampled_from([32, 64, 128]),
    st.sampled_from([mx.float32, mx.float16, mx.bfloat16]),
    st.lists(st.tuples(st.integers(0, 69), st.sampled_from(ODD)), max_size=3),
    st.lists(st.integers(1, 69), max_size=4),
    st.integers(1, 3),
    st.integers(0, 2**31),
)
def test_a_row_of_a_linear_layer_knows_no_other(
    ops: Ops,
    form: str,
    rows: int,
    n: int,
    groups: int,
    group_size: int,
    dtype: mx.Dtype,
    odd: list[tuple[int, float]],
    cuts: list[int],
    threads: int,
    seed: int,
) -> None:
    if ops is PORTABLE:
        pytest.skip("MLX's own matmuls promise nothing of the kind")
    plain = form.startswith(("float", "bfloat"))
    k = groups * group_size - (seed % 7 if plain else 0)
    values = numpy(mx.random.normal((rows, k), key=mx.random.key(seed + 1)))
    values[::3, seed % k] *= 40  # what stands out in its group, and gets a rest
    for row, value in odd:
        values[row % rows, (row * 31 + seed) % k] = value
    x = mx.array(values).astype(dtype)
    compute = layer(ops, form, n, k, group_size, seed)
    before = kernels.num_threads()
    alone = mx.concatenate([compute(x[row : row + 1]) for row in range(rows)])
    mx.eval(alone)
    try:
        _C.set_num_threads(threads)
        whole = compute(x)
        places = sorted({0, rows, *(cut for cut in cuts if cut < rows)})
        pieces = mx.concatenate([compute(x[a:b]) for a, b in itertools.pairwise(places)])
        mx.eval(whole, pieces)
    finally:
        _C.set_num_threads(before)
    assert same_bits(whole, alone)
    assert same_bits(pieces, alone)
