"""GGUF's block formats against the `gguf` package: numbers bit for bit, packing, and scales that do not fit."""

from __future__ import annotations

import subprocess
import sys

import gguf
import mlx.core as mx
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from gguf_cases import BY_HAND, blocks, by_hand, matrix_of, put_scale, scale_places
from places import ROOT

from runner.checkpoint.gguf.bits import nibbles, pack, packed_nibbles
from runner.checkpoint.gguf.blocks import FORMATS
from runner.checkpoint.gguf.codebooks import even_minus, minus, sizes
from runner.checkpoint.gguf.formats import Format
from runner.errors import CheckpointError

KINDS = [Type(number) for number in FORMATS if number not in BY_HAND and FORMATS[number].count > 1]
BLOCKS = [form for form in FORMATS.values() if form.count > 1]
by_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
by_form = pytest.mark.parametrize("form", BLOCKS, ids=lambda form: form.name)


def numbers_of(form: Format, raw: np.ndarray, columns: int) -> np.ndarray:
    """The numbers, float32, of rows of blocks."""
    parts = form.parts((len(raw), columns))
    arrays = {suffix: form.part(suffix, raw) for suffix in parts}
    assert {suffix: array.shape for suffix, array in arrays.items()} == {s: shape for s, (_, shape) in parts.items()}
    found = {suffix: mx.array(array) for suffix, array in arrays.items()}
    return matrix_of(form, found) if form.quantized else np.array(found[""].astype(mx.float32))


@by_kind
def test_numbers_are_the_gguf_packages(kind: Type) -> None:
    """Equal bit for bit: quantized tensors in float32, the others rounded once to float16."""
    raw, form = blocks(kind, 6, 1024), FORMATS[kind]
    wanted = gguf.dequantize(raw, kind).astype(np.float32)
    found = numbers_of(form, raw, 1024)
    assert np.array_equal(found, wanted if form.quantized else wanted.astype(np.float16))
    assert wanted.std() > 0.01


@by_kind
@pytest.mark.parametrize("byte", [0x00, 0x01, 0x7E, 0x80, 0xFE, 0xFF])
def test_numbers_of_blocks_of_one_byte(kind: Type, byte: int) -> None:
    """The ends of every range: lowest and highest index, all signs, no sign, the largest and smallest scale."""
    form = FORMATS[kind]
    raw = np.full((1, form.size * (1024 // form.count)), byte, np.uint8)
    for place in scale_places(form):
        put_scale(form, raw.reshape(-1, form.size), place, np.ones((1, 1)))
    if form.dtype == "U8":
        raw.reshape(-1, form.size)[:, : 4 if form.name == "NVFP4" else 1] = min(byte, 126)
    wanted = gguf.dequantize(raw, kind).astype(np.float32)
    assert np.array_equal(numbers_of(form, raw, 1024), wanted if form.quantized else wanted.astype(np.float16))


@pytest.mark.parametrize("number", BY_HAND)
def test_numbers_of_types_that_the_package_does_not_know(number: int) -> None:
    raw = blocks(number, 2, 256)
    assert np.array_equal(numbers_of(FORMATS[number], raw, 256), by_hand(number, raw))


def test_nan_without_a_sign_is_zero_in_nvfp4_as_in_ggml() -> None:
    raw = np.full((1, 36), 0x35, np.uint8)
    raw[:, :4] = [0x7F, 0x38, 0x7F, 0x38]
    found = numbers_of(FORMATS[Type.NVFP4], raw, 64)
    assert np.array_equal(found, gguf.dequantize(raw, Type.NVFP4)) and not found[0, :16].any() and found[0, 16:32].all()


# --- scales -----------------------------------------------------------------------------------------------------------

FITS = ("Q4_1", "Q5_1", "Q4_K", "Q5_K")  # with 65504 for scale and offset
FLOAT32 = [form.name for form in BLOCKS if form.dtype == "F32"]


@by_form
@pytest.mark.parametrize("scale", [np.inf, -np.inf, np.nan, 65504.0])
def test_scales_that_do_not_fit_are_refused(form: Format, scale: float) -> None:
    raw = np.full((1, form.size), 0x77, np.uint8)
    for place in scale_places(form):
        put_scale(form, raw, place, np.full((1, 1), scale))
    suffixes = [suffix for suffix in form.parts((form.count,)) if suffix != ".weight"]
    if form.dtype == "U8":
        raw[:, 0] = 0xFF
    elif scale == 65504.0 and form.name in (*FITS, *FLOAT32, "TQ1_0", "TQ2_0", "Q2_0"):
        assert all(np.isfinite(form.part(suffix, raw)).all() for suffix in suffixes)
        return
    with pytest.raises(CheckpointError, match=form.name):
        for suffix in suffixes:
            form.part(suffix, raw)


@by_form
def test_random_bytes_are_refused_or_finite(form: Format) -> None:
    """Every bit random, scales too: no array has NaN or infinity, and nothing but a refusal is raised."""
    rng = np.random.default_rng(form.size)
    outcomes = set()
    for _ in range(400):
        raw = rng.integers(0, 256, (1, form.size), dtype=np.uint8)
        try:
            found = numbers_of(form, raw, form.count)
        except CheckpointError as error:
            assert form.name in str(error)
            outcomes.add("refused")
        else:
            assert np.isfinite(found).all()
            outcomes.add("read")
    assert outcomes == {"refused", "read"}


@pytest.mark.parametrize(("name", "largest"), [("MXFP4", 252), ("NVFP4", 126)])
def test_scales_of_a_byte_are_refused_above_the_largest(name: str, largest: int) -> None:
    form = FORMATS[Type[name]]
    raw = np.full((1, form.size), 0x77, np.uint8)  # 6, the largest number, throughout
    raw[:, :4] = largest
    assert np.isfinite(matrix_of(form, {s: mx.array(form.part(s, raw)) for s in form.parts((form.count,))})).all()
    raw[:, 0] = largest + 1 if name == "MXFP4" else 0x80
    with pytest.raises(CheckpointError, match=f"a {name} block has a scale"):
        form.part(".scales", raw)


# --- pieces -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_packing_is_mlxs(bits: int) -> None:
    codes = np.random.default_rng(bits).integers(0, 1 << bits, (3, 64), dtype=np.uint8)
    ones, zeros = mx.ones((3, 2)), mx.zeros((3, 2))
    packed = mx.array(np.ascontiguousarray(pack(codes, bits)).view(np.uint32))
    assert np.array_equal(np.array(mx.dequantize(packed, ones, zeros, group_size=32, bits=bits)), codes)


@pytest.mark.parametrize("run", [8, 16, 32])
def test_the_fast_packing_of_nibbles_is_the_plain_one(run: int) -> None:
    raw = np.random.default_rng(run).integers(0, 256, (5, 128), dtype=np.uint8)
    assert np.array_equal(packed_nibbles(raw, run), pack(nibbles(raw, run), 4))


@by_form
def test_slices_of_blocks_are_all_blocks(form: Format) -> None:
    """More blocks than are computed at once, and an odd number of them: each is what it is alone."""
    kind = next(number for number, other in FORMATS.items() if other is form)
    rows = (1 << 17) // 256 + 3
    raw = blocks(kind, rows, 256)
    for suffix in form.parts((rows, 256)):
        whole = form.part(suffix, raw)
        for row in (0, rows - 4, rows - 1):
            assert np.array_equal(whole[row], form.part(suffix, raw[row : row + 1])[0])


def test_codebooks_are_the_packages() -> None:
    """The generated tables, all rows: blocks of tests meet only some."""
    for name in ("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS"):
        known = getattr(gguf.quants, name)
        known.init_grid()
        factor = 2 if name == "IQ3_XXS" else 1
        assert np.array_equal(sizes(name).view(np.uint8) * factor, known.grid.reshape(-1))
    signs = np.frombuffer(gguf.quants.IQ2_XXS.ksigns, np.uint8)
    assert np.array_equal(even_minus(), minus(8, 8)[signs])


def test_codebooks_are_unpacked_only_for_types_that_use_them() -> None:
    code = """
from runner.checkpoint.gguf import codebooks
from runner.checkpoint.gguf.blocks import FORMATS
import numpy as np
for number, form in FORMATS.items():
    if not form.name.startswith("IQ"):
        for suffix in form.parts((256,)):
            form.part(suffix, np.zeros((1, 256 // form.count * form.size), np.uint8))
caches = [codebooks.packed_rows, codebooks.sizes, codebooks.ternary, codebooks.minus, codebooks.even_minus]
print(sum(cache.cache_info().currsize for cache in caches))
"""
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert found.stdout == "0\n"
