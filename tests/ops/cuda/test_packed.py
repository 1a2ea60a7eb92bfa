"""Products of packed matrices by our kernels on an NVIDIA GPU, against those of the unpacked ones."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from runner.ops.device import current
from runner.ops.quantized import QuantizedWeight

needs_gpu = pytest.mark.skipif(not current().compiles, reason="there is no kernel for this device")


def packed(shape: tuple[int, ...], bits: int, group: int, dtype: mx.Dtype, mode: str = "affine") -> QuantizedWeight:
    numbers = mx.array(np.random.default_rng(1).standard_normal(shape).astype(np.float32)).astype(dtype)
    weight, scales, *biases = mx.quantize(numbers, group_size=group, bits=bits, mode=mode)
    return QuantizedWeight(weight, scales, biases[0] if biases else None, group, bits, mode)


def vectors(rows: int, columns: int, dtype: mx.Dtype) -> mx.array:
    return mx.array(np.random.default_rng(2).standard_normal((rows, columns)).astype(np.float32)).astype(dtype)


def exactly(matrix: QuantizedWeight) -> np.ndarray:
    return np.array(matrix.dequantize().astype(mx.float32))


def close(got: np.ndarray, want: np.ndarray) -> bool:
    """Within the rounding of results, and of weights that are unpacked into 16 bits."""
    return bool((np.abs(got - want) < 0.02 * want.std() + 0.005 * np.abs(want)).all())


@needs_gpu
@pytest.mark.parametrize(
    ("bits", "group", "mode", "dtype"),
    [
        (4, 64, "affine", mx.bfloat16),
        (4, 32, "affine", mx.float16),
        (4, 128, "affine", mx.bfloat16),
        (8, 64, "affine", mx.float16),
        (8, 32, "affine", mx.bfloat16),
        (4, 32, "mxfp4", mx.bfloat16),
        (8, 32, "mxfp8", mx.float16),
        (8, 32, "mxfp8", mx.bfloat16),
        (4, 16, "nvfp4", mx.bfloat16),
        (4, 16, "nvfp4", mx.float16),
    ],
)
@pytest.mark.parametrize("rows", [2, 8, 9, 64])
def test_a_few_vectors(bits: int, group: int, mode: str, rows: int, dtype: mx.Dtype) -> None:
    from runner.ops.cuda.packed import fits, linear

    matrix, x = packed((200, 512), bits, group, dtype, mode), vectors(rows, 512, dtype)
    assert fits(x, matrix)
    got = np.array(linear(x, matrix).astype(mx.float32))
    want = np.array(x.astype(mx.float32)) @ exactly(matrix).T
    assert close(got, want)
    alone = np.array(linear(mx.concatenate([x[:1], x[:1] * 3]), matrix).astype(mx.float32))
    assert (alone[0] == got[0]).all()


@needs_gpu
@pytest.mark.parametrize(("bits", "group", "mode"), [(4, 64, "affine"), (4, 32, "mxfp4"), (8, 32, "mxfp8")])
@pytest.mark.parametrize("rows", [1, 70, 1000])
def test_vectors_of_experts(rows: int, bits: int, group: int, mode: str) -> None:
    from runner.ops.cuda.packed import by_expert

    matrices, x = packed((12, 96, 256), bits, group, mx.bfloat16, mode), vectors(rows, 256, mx.bfloat16)
    chosen = np.sort(np.random.default_rng(3).choice([0, 1, 5, 11], rows, p=[0.1, 0.05, 0.8, 0.05])).astype(np.uint32)
    got = np.array(by_expert(x[:, None], matrices, mx.array(chosen)).astype(mx.float32))[:, 0]
    want = np.einsum("rk,rnk->rn", np.array(x.astype(mx.float32)), exactly(matrices)[chosen])
    assert close(got, want)


@needs_gpu
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
@pytest.mark.parametrize("outputs", [100, 104, 264])
@pytest.mark.parametrize("rows", [1, 70, 200, 1000])  # of the last, blocks of 128 vectors, unless it is 100 outputs
def test_vectors_of_experts_that_are_not_packed(rows: int, outputs: int, dtype: mx.Dtype) -> None:
    from runner.ops.cuda.packed import by_expert, fits_plain

    numbers = np.random.default_rng(1).standard_normal((12, outputs, 288)).astype(np.float32)
    matrices, x = mx.array(numbers).astype(dtype), vectors(rows, 288, dtype)
    assert fits_plain(x[:, None], matrices)
    chosen = np.sort(np.random.default_rng(3).choice([0, 1, 5, 11], rows, p=[0.1, 0.05, 0.8, 0.05])).astype(np.uint32)
    got = np.array(by_expert(x[:, None], matrices, mx.array(chosen)).astype(mx.float32))[:, 0]
    want = np.einsum("rk,rnk->rn", np.array(x.astype(mx.float32)), np.array(matrices.astype(mx.float32))[chosen])
    assert close(got, want)


@needs_gpu
def test_what_there_is_no_kernel_for() -> None:
    from runner.ops.cuda.packed import fits

    x, matrix = vectors(4, 512, mx.bfloat16), packed((64, 512), 4, 64, mx.bfloat16)
    assert not fits(x.astype(mx.float32), matrix) and not fits(x, packed((64, 512), 2, 64, mx.bfloat16))
    assert not fits(x[:, :64], packed((64, 64), 4, 64, mx.bfloat16))
    assert not fits(x, matrix._replace(scales=matrix.scales.astype(mx.float16)))
