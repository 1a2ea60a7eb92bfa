"""Tile registers (AMX): the bits of AVX-512's products, by a twin of the registers and, if there are any, by them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from instruction_sets import available
from twins import numpy

from runner.ops import cpu as kernels
from runner.ops.cpu import _C
from runner.ops.cpu.ops import INT8, KERNELS
from runner.ops.quantized import QuantizedWeight
from runner.ops.table import Ops

if "avx512" not in available():
    pytest.skip("this CPU has no AVX-512 VNNI, which stands beside tile registers", allow_module_level=True)

FORMS = [*[f"affine{bits}" for bits in (2, 3, 4, 5, 6, 8)], "symmetric4", "mxfp4"]
fast_settings = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)


@pytest.fixture(params=["amx_emulated", "amx"])
def level(request: pytest.FixtureRequest) -> str:
    why = _C.why_no_tiles()
    if request.param == "amx" and why is not None:
        pytest.skip(why)
    return str(request.param)


def at(name: str, compute: Callable[[], mx.array]) -> np.ndarray:
    """What is computed at a level, as bits; which NaN it is doesn't count."""
    before = _C.isa()
    assert _C.set_isa(name)
    try:
        found = numpy(compute())
    finally:
        _C.set_isa(before)
    bits: np.ndarray = np.where(np.isnan(found), np.float32(np.nan), found).view(np.uint32)
    return bits


def matrices(form: str, count: int, n: int, k: int, group: int, seed: int) -> QuantizedWeight:
    """A stack of packed matrices [count, n, k]."""
    weight = mx.random.normal((count, n, k), key=mx.random.key(seed))
    if form == "mxfp4":
        codes, powers = mx.quantize(weight, mode=form)
        return QuantizedWeight(codes, powers, None, 32, 4, form)
    bits = int(form[-1])
    packed, scales, shifts = mx.quantize(weight, group_size=group, bits=bits)
    if form.startswith("symmetric"):
        shifts = -(2 ** (bits - 1)) * scales
    kind = (mx.float32, mx.float16, mx.bfloat16)[seed % 3]
    return QuantizedWeight(packed, scales.astype(kind), shifts.astype(kind), group, bits, "affine")


def rows_of(rows: int, k: int, seed: int, odd: bool) -> mx.array:
    """Rows some of which have values that stand out; with `odd` one that integers cannot carry."""
    x = numpy(mx.random.normal((rows, k), key=mx.random.key(seed + 1)))
    x[::3, seed % k] *= 40
    if odd:
        x[seed % rows, seed // 7 % k] = (np.nan, np.inf, 1e30)[seed % 3]
    return mx.array(x)


@fast_settings
@given(
    st.sampled_from(FORMS),
    st.one_of(st.integers(1, 70), st.integers(48, 130)),
    st.integers(1, 100),
    st.integers(1, 20),
    st.sampled_from([32, 64, 128]),
    st.sampled_from([mx.float32, mx.float16, mx.bfloat16]),
    st.sampled_from([KERNELS, INT8]),
    st.booleans(),
    st.integers(1, 3),
    st.integers(0, 2**31),
)
def test_the_bits_are_those_of_vectors(
    level: str, form: str, rows: int, n: int, groups: int, group: int, dtype: mx.Dtype, table: Ops, odd: bool,
    threads: int, seed: int,
) -> None:  # fmt: skip
    group = 32 if form == "mxfp4" else group
    stack = matrices(form, 1, n, groups * group, group, seed)
    one = stack._replace(
        weight=stack.weight[0], scales=stack.scales[0], biases=None if stack.biases is None else stack.biases[0]
    )
    x = rows_of(rows, groups * group, seed, odd).astype(dtype)
    bias = mx.random.normal((n,), key=mx.random.key(seed + 2)) if seed % 2 else None
    wanted = at("avx512", lambda: table.quantized_linear(x, one, bias))
    before = kernels.num_threads()
    try:
        _C.set_num_threads(threads)
        found = at(level, lambda: table.quantized_linear(x, one, bias))
    finally:
        _C.set_num_threads(before)
    assert np.array_equal(found, wanted)


@pytest.mark.parametrize("form", ["affine4", "affine8", "mxfp4"])
@pytest.mark.parametrize("table", [KERNELS, INT8], ids=["exact", "int8"])
def test_experts_have_the_bits_of_vectors(level: str, form: str, table: Ops) -> None:
    """Experts with one row, a few and many; more rows than are worked on at a time."""
    experts = mx.array([[0], [1], [1], *[[2]] * 8, *[[3]] * 60, *[[4]] * 400], mx.int32)
    stack = matrices(form, 5, 70, 192, 32, 1)
    x = rows_of(experts.size, 192, 1, True)[:, None, None]
    wanted, found = (at(name, lambda: table.gather_quantized_linear(x, stack, experts)) for name in ("avx512", level))
    assert np.array_equal(found, wanted)


def test_it_is_chosen_by_name_or_refused_with_the_reason() -> None:
    code = "from runner.ops import cpu as kernels; print(kernels.isa())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "RUNNER_KERNELS_ISA": "amx"},
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    why = _C.why_no_tiles()
    if why is None:
        assert done.returncode == 0 and done.stdout.strip() == "amx"
    else:
        assert "RUNNER_KERNELS_ISA=amx names no instruction set" in done.stderr and why in done.stderr
