"""Forms of weights in the kernels' own texts, on the CPU: what numbers they are, and products with them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import cuda_cpu
import mlx.core as mx
import numpy as np
import pytest
from cuda_shapes import AMPERE, FLOATS, FORMS, HOPPER, LLAMA_8B

from runner.ops.cuda.shape import DOWN, QKV, Form, StepShape, divide


def packed(rows: int, columns: int, form: Form, dtype: mx.Dtype) -> tuple[list[np.ndarray], np.ndarray]:
    """A matrix's arrays as rows of bytes, and its numbers in float64, of groups of very different sizes."""
    generator = np.random.default_rng(0)
    numbers = generator.standard_normal((rows, columns)) * generator.uniform(0.05, 4, (rows, columns // 8)).repeat(8, 1)
    matrix = mx.array(numbers.astype(np.float32)).astype(dtype)
    arrays = mx.quantize(matrix, group_size=form.group, bits=form.bits, mode=form.mode, stream=mx.cpu)
    wide = [array.astype(mx.float32) if form.mode == "affine" else array for array in arrays[1:]]
    found = mx.dequantize(arrays[0], *wide, group_size=form.group, bits=form.bits, mode=form.mode, stream=mx.cpu)
    return [bytes_of(array) for array in arrays], np.array(found.astype(mx.float32)).astype(np.float64)


def bytes_of(array: mx.array) -> np.ndarray:
    return np.ascontiguousarray(np.array(array.view(mx.uint8)))


@pytest.mark.parametrize("name", ["mxfp4", "mxfp8", "nvfp4", "4 bits"])
def test_every_code_and_every_scale(name: str, tmp_path: Path) -> None:
    form = FORMS[name]
    codes = np.tile(np.arange(1 << form.bits), 64) if form.bits == 4 else np.tile(np.arange(256), 32)
    codes = codes[(codes & 127) < 127] if form.scaled and form.bits == 8 else codes  # NaN is no weight
    codes = np.resize(codes, len(codes) // form.group * form.group)
    nibbles = codes if form.bits == 8 else codes[::2] | codes[1::2] << 4
    groups = len(codes) // form.group
    # Products with E8M0 within what bfloat16 has; E4M3 without NaN.
    scales = np.linspace(20, 240, groups) if form.mode != "nvfp4" else np.arange(groups) % 127
    scales = scales.astype(np.uint8)
    biases = scales
    if not form.scaled:
        scales, biases = (np.random.default_rng(i).standard_normal(groups).astype(np.float16) for i in range(2))
    words = nibbles.astype(np.uint8)
    got = cuda_cpu.elements(form, words, scales, biases, len(codes), tmp_path)
    arrays = [mx.array(words.view(np.uint32))[None], mx.array(scales)[None]]
    if not form.scaled:
        arrays = [arrays[0], *(mx.array(array.astype(np.float32))[None] for array in (scales, biases))]
    want = mx.dequantize(*arrays, group_size=form.group, bits=form.bits, mode=form.mode, stream=mx.cpu)
    np.testing.assert_allclose(got, np.array(want.astype(mx.float32))[0], rtol=1e-6, atol=0)


BLOCKS = [  # with tensor maps, and without, where rows' scales are no whole units of 16 bytes; in one piece and several
    ("nvfp4", 2048, QKV),
    ("mxfp4", 896, QKV),
    ("mxfp8", 896, DOWN),
    *(pytest.param(name, 2048, QKV, marks=pytest.mark.long) for name in FORMS),
    *(pytest.param(name, 896, DOWN, marks=pytest.mark.long) for name in FORMS),
]


def shaped(name: str, hidden: int) -> StepShape:
    form = FORMS[name]
    heads = {"heads": hidden // 64, "kv_heads": 2, "head_dim": 64, "rope_dims": 64}
    forms = {"forms": (form,) * 5, "embedding": form}
    shape = dataclasses.replace(LLAMA_8B, hidden=hidden, intermediate=4864, **heads, **forms)  # type: ignore[arg-type]
    return shape


@pytest.mark.parametrize(("name", "hidden", "index"), BLOCKS)
def test_a_block_multiplies_its_rows(name: str, hidden: int, index: int, tmp_path: Path) -> None:
    check(shaped(name, hidden), HOPPER, index, tmp_path)


def test_half_of_a_blocks_warps_multiply_where_memory_is_short(tmp_path: Path) -> None:
    shape = FLOATS["nvfp4"]
    assert divide(shape, *HOPPER).products[QKV].shares == 16 and divide(shape, *AMPERE).products[QKV].shares == 8
    check(shape, AMPERE, QKV, tmp_path)


def check(shape: StepShape, device: tuple[int, int], index: int, tmp_path: Path) -> None:
    division, form = divide(shape, *device), shape.forms[index]
    matrix, numbers = packed(20, shape.columns[index], form, mx.bfloat16)
    first, second = np.random.default_rng(1).standard_normal((2, numbers.shape[1]))
    x = (first * np.exp(second)).astype(np.float32)
    want = numbers @ x.astype(np.float64)
    got = cuda_cpu.block(division, index, x, matrix, tmp_path)
    assert np.abs(got - want).max() < 1e-5 * want.std()


@pytest.mark.parametrize("name", ["nvfp4", "8 bits"])
def test_lanes_copy_what_tensor_maps_do(name: str, tmp_path: Path) -> None:
    shape = shaped(name, 2048)
    division = divide(shape, *AMPERE, copies=True)
    product = division.products[QKV]
    matrix, _ = packed(24, 2048, FORMS[name], mx.bfloat16)
    assert product.mapped and product.tiles * 16 > 8
    for base, piece in ((0, 0), (16, product.pieces - 1)):
        want = cuda_cpu.mapped(product, matrix, base, piece, division.stage)[: product.bytes]
        assert (cuda_cpu.boxes(product, matrix, base, piece, tmp_path) == want).all()


TILES = [
    ("nvfp4", mx.float16),
    ("mxfp4", mx.bfloat16),
    ("mxfp8", mx.bfloat16),
    *(pytest.param(name, dtype, marks=pytest.mark.long) for name in FORMS for dtype in (mx.float16, mx.bfloat16)),
]


@pytest.mark.parametrize(("name", "dtype"), TILES)
def test_tiles_of_rows_of_several_vectors(name: str, dtype: mx.Dtype, tmp_path: Path) -> None:
    form = FORMS[name]
    matrix, numbers = packed(20, 512, form, dtype)
    x = mx.array(np.random.default_rng(1).standard_normal((3, 512)).astype(np.float32)).astype(dtype)
    want = np.array(x.astype(mx.float32)).astype(np.float64) @ numbers.T
    got = cuda_cpu.tiles(form, 1 if dtype == mx.float16 else 2, bytes_of(x), matrix, tmp_path)
    # What affine codes are unpacked to is rounded; scales alone, to numbers that are exact.
    error = 1e-5 if form.scaled else 0.03
    assert np.abs(got - want).max() < error * want.std()
