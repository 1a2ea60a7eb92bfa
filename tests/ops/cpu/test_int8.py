"""Activations of 8 bits: against a naive twin, the same bits row by row, and refused where there is no such product."""

from __future__ import annotations

import itertools
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from twins import assert_close, numpy

from runner.engine.loaded import open_loaded
from runner.errors import UsageError
from runner.ops import cpu as kernels
from runner.ops.cpu import _C
from runner.ops.cpu.ops import INT8, KERNELS
from runner.ops.device import CPU_WITHOUT_KERNELS, Device, current
from runner.ops.quantized import QuantizedWeight
from runner.ops.table import PORTABLE, Ops

FIXTURES = Path(__file__).resolve().parents[2] / "fixtures"
FORMS = [*[f"affine{bits}" for bits in (2, 3, 4, 5, 6, 8)], "mxfp4"]
ODD = [np.nan, np.inf, 1e30, 0.0]
fast_settings = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)


def matrix(form: str, n: int, k: int, group: int, seed: int) -> tuple[QuantizedWeight, mx.array]:
    """A packed matrix, and the numbers that it stands for."""
    weight = mx.random.normal((n, k), key=mx.random.key(seed))
    if not form.startswith("affine"):
        packed, scales = mx.quantize(weight, mode=form)
        made = QuantizedWeight(packed, scales, None, 16 if form == "nvfp4" else 32, 8 if form == "mxfp8" else 4, form)
        return made, made.dequantize()
    packed, scales, shifts = mx.quantize(weight, group_size=group, bits=int(form[6:]))
    made = QuantizedWeight(packed, scales, shifts, group, int(form[6:]), "affine")
    return made, made.dequantize()


def rounded(x: np.ndarray, group: int) -> np.ndarray:
    """Each group of a row as integers from -127 to 127 times a scale; rows that are not finite stay as they are."""
    out = x.astype(np.float64)
    for row, start in itertools.product(range(x.shape[0]), range(0, x.shape[1], group)):
        part = x[row, start : start + group]
        most = np.abs(part).max()
        if np.isfinite(x[row]).all() and most > 0:
            codes = np.rint(part * (np.float32(127) / most))
            out[row, start : start + group] = codes * np.float64(most / np.float32(127))
    return out


@fast_settings
@given(
    st.sampled_from(FORMS),
    st.integers(1, 40),
    st.integers(1, 70),
    st.integers(1, 20),
    st.sampled_from([32, 64, 128]),
    st.sampled_from([mx.float32, mx.float16, mx.bfloat16]),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_it_is_a_product_with_what_has_been_rounded(
    ops: Ops, form: str, rows: int, n: int, groups: int, group: int, dtype: mx.Dtype, biased: bool, seed: int
) -> None:
    if ops is PORTABLE:
        pytest.skip("MLX has no such product")
    group = 32 if form == "mxfp4" else group
    packed, full = matrix(form, n, groups * group, group, seed)
    x = mx.random.normal((rows, groups * group), key=mx.random.key(seed + 1)).astype(dtype)
    bias = mx.random.normal((n,), key=mx.random.key(seed + 2)).astype(dtype) if biased else None
    found = INT8.quantized_linear(x, packed, bias)
    wanted = rounded(numpy(x), group) @ numpy(full).astype(np.float64).T
    wanted = wanted if bias is None else wanted + numpy(bias)
    assert found.dtype == dtype
    # A value halfway between two codes may become either, as float32 has it: one code of one value.
    assert_close(found, wanted, rounded_to=dtype, tolerance=6e-3)
    assert np.sqrt(np.mean((numpy(found) - wanted) ** 2)) < (3e-4 if dtype == mx.float32 else 1e-2) * (
        np.sqrt(np.mean(wanted**2)) + 1e-6
    )


@fast_settings
@given(
    st.sampled_from(FORMS),
    st.integers(1, 70),
    st.integers(1, 100),
    st.integers(1, 20),
    st.sampled_from([32, 64, 128]),
    st.lists(st.tuples(st.integers(0, 69), st.sampled_from(ODD)), max_size=3),
    st.lists(st.integers(1, 69), max_size=4),
    st.integers(1, 3),
    st.integers(0, 2**31),
)
def test_a_row_knows_no_other(
    ops: Ops,
    form: str,
    rows: int,
    n: int,
    groups: int,
    group: int,
    odd: list[tuple[int, float]],
    cuts: list[int],
    threads: int,
    seed: int,
) -> None:
    if ops is PORTABLE:
        pytest.skip("MLX has no such product")
    group = 32 if form == "mxfp4" else group
    packed, _ = matrix(form, n, groups * group, group, seed)
    values = numpy(mx.random.normal((rows, groups * group), key=mx.random.key(seed + 1)))
    values[::3, seed % values.shape[1]] *= 40
    for row, value in odd:
        values[row % rows, (row * 31 + seed) % values.shape[1]] = value
    x = mx.array(values)
    stack = packed._replace(
        weight=packed.weight[None],
        scales=packed.scales[None],
        biases=None if packed.biases is None else packed.biases[None],
    )
    alone = mx.concatenate([INT8.quantized_linear(x[row : row + 1], packed, None) for row in range(rows)])
    mx.eval(alone)
    before = kernels.num_threads()
    try:
        _C.set_num_threads(threads)
        places = sorted({0, rows, *(cut for cut in cuts if cut < rows)})
        ways = [
            INT8.quantized_linear(x, packed, None),
            mx.concatenate([INT8.quantized_linear(x[a:b], packed, None) for a, b in itertools.pairwise(places)]),
            INT8.gather_quantized_linear(x[:, None, None], stack, mx.zeros((rows, 1), mx.int32))[:, 0, 0],
        ]
        mx.eval(ways)
    finally:
        _C.set_num_threads(before)
    for way in ways:
        assert np.array_equal(np.isnan(numpy(way)), np.isnan(numpy(alone)))
        assert np.array_equal(np.nan_to_num(numpy(way)), np.nan_to_num(numpy(alone)))


@pytest.mark.parametrize("form", ["mxfp8", "nvfp4"])
def test_matrices_of_small_floats_are_multiplied_as_ever(ops: Ops, form: str) -> None:
    if ops is PORTABLE:
        pytest.skip("MLX has no such product")
    packed, _ = matrix(form, 40, 128, 32, 1)
    x = mx.random.normal((5, 128), key=mx.random.key(2))
    assert mx.array_equal(INT8.quantized_linear(x, packed, None), KERNELS.quantized_linear(x, packed, None))


def test_a_model_rounds_in_its_packed_layers_and_is_one_however_it_is_read() -> None:
    if current().int8 is None:
        pytest.skip("the kernels are not in use")
    exact, coarse = (open_loaded(FIXTURES / "llama" / "llama-mlx-4bit", activations=name) for name in ("exact", "int8"))
    ids = [3, 1, 4, 1, 5, 9, 2, 6]
    wanted, found = numpy(exact.logits(ids)), numpy(coarse.logits(ids))
    assert 1e-4 < np.abs(found - wanted).max() / wanted.std() < 0.2
    last = [numpy(coarse.logits(ids[:count]))[-1] for count in range(1, len(ids) + 1)]
    assert np.array_equal(np.stack(last), found)
    plain = [open_loaded(FIXTURES / "llama" / "llama-gqa", activations=name).logits(ids) for name in ("exact", "int8")]
    assert mx.array_equal(*plain)


def test_it_is_refused_where_there_is_no_such_product() -> None:
    for device in (Device("MLX's CUDA kernels", PORTABLE), Device("plain MLX on the CPU", CPU_WITHOUT_KERNELS)):
        assert device.rounding("exact") is device
        with pytest.raises(UsageError, match=device.name):
            device.rounding("int8")
    with pytest.raises(UsageError, match="exact or int8"):
        current().rounding("int4")
