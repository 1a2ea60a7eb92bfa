"""Rows of a mixture's tokens by our kernels on an NVIDIA GPU, against plain MLX's."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from runner.ops.device import CUDA, current
from runner.ops.table import PORTABLE

needs_gpu = pytest.mark.skipif(not current().compiles, reason="there is no kernel for this device")


def numbers(*shape: int, dtype: mx.Dtype = mx.bfloat16) -> mx.array:
    return mx.array(np.random.default_rng(1).standard_normal(shape).astype(np.float32)).astype(dtype)


def test_putting_is_the_inverse_of_taking() -> None:
    x, order = numbers(40, 1, 24), mx.array(np.random.default_rng(0).permutation(40).astype(np.uint32))
    for ops in (PORTABLE, current().ops):
        assert mx.array_equal(ops.put_rows(ops.take_rows(x, order), order), x)


@needs_gpu
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("width", [8, 24, 2048, 4104, 20])  # of the last there are not always whole units
def test_rows_are_those_of_operations(width: int, dtype: mx.Dtype) -> None:
    x, some = numbers(300, 1, width, dtype=dtype), np.random.default_rng(0)
    ids = mx.array(some.integers(0, 300, 1000).astype(np.uint32))
    assert mx.array_equal(CUDA.take_rows(x, ids), PORTABLE.take_rows(x, ids))
    order = mx.array(some.permutation(300).astype(np.uint32))
    assert mx.array_equal(CUDA.put_rows(x, order), PORTABLE.put_rows(x, order))
    assert CUDA.take_rows(x, ids[:0]).shape == (0, 1, width)


@needs_gpu
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32])
@pytest.mark.parametrize(("count", "width"), [(1, 8), (2, 72), (8, 2048), (6, 2052)])
def test_a_mixture_is_nearer_to_float32_than_operations(count: int, width: int, dtype: mx.Dtype) -> None:
    outputs, weights = numbers(2, 33, count, width, dtype=dtype), mx.softmax(numbers(2, 33, count, dtype=mx.float32))
    want = np.einsum("blkd,blk->bld", np.array(outputs.astype(mx.float32)), np.array(weights))
    ours, theirs = (np.array(ops.mixture(outputs, weights).astype(mx.float32)) for ops in (CUDA, PORTABLE))
    ours, theirs = (np.abs(found - want).max() for found in (ours, theirs))
    assert ours <= theirs * 1.01 + 1e-6
