"""Each op against its naive twin over random shapes, types, memory layouts, NaN and infinity.

All run over plain MLX as well: a twin that plain MLX does not meet would prove nothing about the extension.
Tolerances are shares of the output's root mean square. Float paths only reorder float32 sums. Quantised layers round
activations to 16 bits: measured 1e-4 at worst over 10^4 outputs, 2.7e-5 on average.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import twins
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from twins import FLOATS, Layout, assert_close, numpy, rand

from runner.ops.quantized import QuantizedWeight
from runner.ops.table import PORTABLE, Ops

fast_settings = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)
SEEDS = st.integers(0, 2**31)
ROWS = st.sampled_from([1, 2, 3, 5, 16, 17, 33, 70])


def meant(ops: Ops, dtype: mx.Dtype) -> mx.Dtype:
    """The dtype to test in: float32 for plain MLX, which rounds 16-bit types in between and promotes mixed ones."""
    return mx.float32 if ops is PORTABLE else dtype


@fast_settings
@given(ROWS, st.integers(1, 90), st.integers(1, 300), FLOATS, FLOATS, st.booleans(), Layout, Layout, SEEDS)
def test_linear(
    ops: Ops,
    rows: int,
    n: int,
    k: int,
    xt: mx.Dtype,
    wt: mx.Dtype,
    biased: bool,
    x_layout: str,
    w_layout: str,
    seed: int,
) -> None:
    xt, wt = meant(ops, xt), meant(ops, wt)
    x, w = rand(rows, k, seed=seed, dtype=xt, layout=x_layout), rand(n, k, seed=seed + 1, dtype=wt, layout=w_layout)
    bias = rand(n, seed=seed + 2, dtype=xt) if biased else None
    found = ops.linear(x, w, bias)
    assert found.dtype == xt
    assert_close(found, twins.linear(x, w, bias), rounded_to=xt, tolerance=2e-5)


@fast_settings
@given(
    ROWS,
    st.integers(1, 90),
    st.integers(1, 12),
    st.sampled_from([2, 3, 4, 5, 6, 8]),
    st.sampled_from([32, 64, 128]),
    FLOATS,
    FLOATS,
    st.booleans(),
    Layout,
    SEEDS,
)
def test_quantized_linear(
    ops: Ops,
    rows: int,
    n: int,
    groups: int,
    bits: int,
    group_size: int,
    xt: mx.Dtype,
    st_: mx.Dtype,
    biased: bool,
    layout: str,
    seed: int,
) -> None:
    xt, st_ = meant(ops, xt), meant(ops, st_)
    k = groups * group_size
    packed, scales, shifts = mx.quantize(rand(n, k, seed=seed), group_size=group_size, bits=bits)
    scales, shifts = scales.astype(st_), shifts.astype(st_)
    full = mx.dequantize(packed, scales.astype(mx.float32), shifts.astype(mx.float32), group_size=group_size, bits=bits)
    x, bias = rand(rows, k, seed=seed + 1, dtype=xt, layout=layout), rand(n, seed=seed + 2, dtype=xt)
    bias = bias if biased else None
    found = ops.quantized_linear(x, QuantizedWeight(packed, scales, shifts, group_size, bits, "affine"), bias)
    assert found.dtype == xt
    assert_close(found, twins.linear(x, full, bias), rounded_to=xt, tolerance=3e-4)


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_scales_that_are_nan_spoil_their_rows_only(ops: Ops, bits: int, group_size: int) -> None:
    """Kernels read whole vectors of scales, past the end of a row of 5, 9 or 16 groups: the next must not leak in."""
    for groups, rows in [(5, 1), (9, 1), (16, 1), (5, 3)]:
        packed, scales, shifts = mx.quantize(rand(40, groups * group_size, seed=1), group_size=group_size, bits=bits)
        scales[11, 0], shifts[17, groups - 1] = float("nan"), float("inf")
        x = rand(rows, groups * group_size, seed=2)
        found = ops.quantized_linear(x, QuantizedWeight(packed, scales, shifts, group_size, bits, "affine"), None)
        bad = ~np.isfinite(numpy(found))
        assert np.array_equal(bad, np.broadcast_to(np.isin(np.arange(40), [11, 17]), (rows, 40)))


@fast_settings
@given(
    st.integers(1, 60),
    st.integers(1, 6),
    st.sampled_from([2, 3, 4, 5, 6, 8]),
    st.sampled_from([32, 64, 128]),
    st.lists(st.integers(-60, 59), min_size=1, max_size=40),
    FLOATS,
    FLOATS,
    SEEDS,
)
def test_embed(
    ops: Ops, n: int, groups: int, bits: int, group_size: int, ids: list[int], dtype: mx.Dtype, st_: mx.Dtype, seed: int
) -> None:
    """Rows of plain and quantized tables by id, with negative ids from the end."""
    dtype, st_ = meant(ops, dtype), meant(ops, st_)
    numbers = mx.array([i % (2 * n) - n for i in ids], dtype=mx.int32)
    table = rand(n, groups * group_size, seed=seed, dtype=st_)
    found = ops.embed(numbers, table, dtype)
    assert found.dtype == dtype
    assert_close(found, numpy(table)[numpy(numbers).astype(int)], rounded_to=dtype, tolerance=1e-6)
    packed, scales, shifts = mx.quantize(table.astype(mx.float32), group_size=group_size, bits=bits)
    full = mx.dequantize(packed, scales, shifts, group_size=group_size, bits=bits)
    found = ops.quantized_embed(
        numbers[None], QuantizedWeight(packed, scales, shifts, group_size, bits, "affine"), dtype
    )
    assert found.dtype == dtype and found.shape == (1, len(ids), groups * group_size)
    assert_close(found[0], numpy(full)[numpy(numbers).astype(int)], rounded_to=dtype, tolerance=1e-6)


SMALL_FLOATS = {"mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}


@fast_settings
@given(
    ROWS, st.integers(1, 90), st.integers(1, 24), st.sampled_from([*SMALL_FLOATS]), FLOATS, st.booleans(), Layout, SEEDS
)
def test_matrices_of_small_floats(
    ops: Ops, rows: int, n: int, groups: int, mode: str, xt: mx.Dtype, biased: bool, layout: str, seed: int
) -> None:
    """Every code of the small float modes, with scales of very different sizes."""
    bits, group_size = SMALL_FLOATS[mode]
    xt, k = meant(ops, xt), groups * group_size
    numbers = np.random.default_rng(seed)
    octets = numbers.integers(0, 256, (n, k * bits // 8), dtype=np.uint8)
    if mode == "mxfp8":
        octets[octets & 127 == 127] = 126
    low, high = (40, 90) if mode == "nvfp4" else (115, 130)
    scales = mx.array(numbers.integers(low, high, (n, groups), dtype=np.uint8))
    packed = mx.array(octets.view(np.uint32))
    x, bias = rand(rows, k, seed=seed + 1, dtype=xt, layout=layout), rand(n, seed=seed + 2, dtype=xt)
    bias = bias if biased else None
    found = ops.quantized_linear(x, QuantizedWeight(packed, scales, None, group_size, bits, mode), bias)
    assert found.dtype == xt
    full = mx.array(twins.small_floats(packed, scales, mode).astype(np.float32))
    assert_close(found, twins.linear(x, full, bias), rounded_to=xt, tolerance=3e-4)


@pytest.mark.parametrize("mode", ["mxfp8", "nvfp4"])
def test_the_small_float_that_is_nan(ops: Ops, mode: str) -> None:
    packed, scales = mx.zeros((3, 16 if mode == "mxfp8" else 8), mx.uint32), mx.full((3, 4), 1, mx.uint8)
    if mode == "mxfp8":
        packed, scales = mx.where(mx.arange(3)[:, None] == 1, mx.array(0x7F, mx.uint32), packed), scales[:, :2]
    else:
        scales = mx.where(mx.arange(3)[:, None] == 1, mx.array(0x7F, mx.uint8), scales)
    bits, group_size = SMALL_FLOATS[mode]
    found = ops.quantized_linear(mx.ones((2, 64)), QuantizedWeight(packed, scales, None, group_size, bits, mode), None)
    assert np.isnan(numpy(found)).tolist() == [[False, True, False]] * 2


@pytest.mark.parametrize(("rows", "n", "k"), [(1, 3000, 576), (16, 50, 8192), (260, 50, 2176), (1100, 49, 1152)])
@pytest.mark.parametrize("bits", [0, 2, 3, 4, 5, 6, 8])
def test_linear_layers_of_several_tiles(ops: Ops, rows: int, n: int, k: int, bits: int) -> None:
    """Sizes past every blocking constant: tile rows, columns and depth, rows of x at a time, pieces of the pool."""
    x, w = rand(rows, k, seed=1), rand(n, k, seed=2)
    if bits == 0:
        assert_close(ops.linear(x, w, None), twins.linear(x, w, None), rounded_to=mx.float32, tolerance=5e-5)
        return
    packed, scales, shifts = mx.quantize(w, group_size=64, bits=bits)
    full = mx.dequantize(packed, scales, shifts, group_size=64, bits=bits)
    if ops is PORTABLE:  # plain MLX needs seconds for these: a few rows will do
        x = x[:4]
    found = ops.quantized_linear(x, QuantizedWeight(packed, scales, shifts, 64, bits, "affine"), None)
    assert_close(found, twins.linear(x, full, None), rounded_to=mx.float32, tolerance=3e-4)


@pytest.mark.parametrize("rows", [1, 4, 40])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_pass_through_a_linear_layer(ops: Ops, rows: int, bad: float) -> None:
    x = np.array(rand(rows, 128, seed=5))
    x[rows // 2, 77] = bad
    w = rand(19, 128, seed=6)
    packed, scales, shifts = mx.quantize(w, group_size=64, bits=4)
    full = mx.dequantize(packed, scales, shifts, group_size=64, bits=4)
    for found, weight in (
        (ops.linear(mx.array(x), w, None), w),
        (ops.quantized_linear(mx.array(x), QuantizedWeight(packed, scales, shifts, 64, 4, "affine"), None), full),
    ):
        assert_close(found, twins.linear(mx.array(x), weight, None), rounded_to=mx.float32, tolerance=3e-4)


def test_large_and_tiny_activations_keep_their_digits(ops: Ops) -> None:
    """One outlier may cost the other values of its own group, never those of another group."""
    x = np.array(rand(3, 256, seed=9))
    x[0] *= 1e-20
    x[1] *= 1e20
    x[2, 3] = 1e4
    packed, scales, shifts = mx.quantize(rand(32, 256, seed=10), group_size=64, bits=4)
    full = mx.dequantize(packed, scales, shifts, group_size=64, bits=4)
    found = ops.quantized_linear(mx.array(x), QuantizedWeight(packed, scales, shifts, 64, 4, "affine"), None)
    for row in range(3):
        want = twins.linear(mx.array(x[row : row + 1]), full, None)
        assert_close(found[row : row + 1], want, rounded_to=mx.float32, tolerance=3e-4)


@fast_settings
@given(st.integers(1, 40), st.integers(1, 200), FLOATS, st.booleans(), Layout, SEEDS)
def test_norms(ops: Ops, rows: int, dim: int, dtype: mx.Dtype, weighted: bool, layout: str, seed: int) -> None:
    dtype = meant(ops, dtype)
    x, y = rand(rows, dim, seed=seed, dtype=dtype, layout=layout), rand(rows, dim, seed=seed + 1, dtype=dtype)
    w, b = rand(dim, seed=seed + 2, dtype=dtype), rand(dim, seed=seed + 3, dtype=dtype)
    w, b = (w, b) if weighted else (None, None)  # type: ignore[assignment]
    weight, shift = (numpy(w), numpy(b)) if weighted else (None, None)
    close: dict[str, Any] = {"rounded_to": dtype, "tolerance": 1e-5}
    assert_close(ops.rms_norm(x, w, 1e-5), twins.norm(numpy(x), weight, None, 1e-5, False), **close)
    if dim > 1:  # of one value, the variance is 0 or a rounding error
        assert_close(ops.layer_norm(x, w, b, 1e-3), twins.norm(numpy(x), weight, shift, 1e-3, True), **close)
    total, normed = ops.add_rms_norm(x, y, w, 1e-5)
    assert_close(total, numpy(x) + numpy(y), rounded_to=dtype, tolerance=0)
    assert_close(normed, twins.norm(numpy(total), weight, None, 1e-5, False), **close)


@fast_settings
@given(
    st.integers(1, 3),
    st.integers(1, 5),
    st.integers(1, 7),
    st.integers(1, 40),
    st.integers(0, 5),
    st.booleans(),
    st.sampled_from(["one", "each", "array"]),
    st.booleans(),
    FLOATS,
    Layout,
    SEEDS,
)
def test_rope(
    ops: Ops,
    b: int,
    h: int,
    length: int,
    half: int,
    rest: int,
    traditional: bool,
    offsets: str,
    given_freqs: bool,
    dtype: mx.Dtype,
    layout: str,
    seed: int,
) -> None:
    dtype = meant(ops, dtype)
    x = rand(b, h, length, 2 * half + rest, seed=seed, dtype=dtype, layout=layout)
    freqs = np.array(mx.random.uniform(1, 500, (half,), key=mx.random.key(seed)))
    if not given_freqs:
        freqs = (10000.0 ** (np.arange(half) / half)).astype(np.float32)
    each = np.arange(b) * 13 + 3
    offset: Any = {"one": 21, "each": mx.array(each), "array": mx.array(21)}[offsets]
    found = ops.rope(
        x,
        offset,
        dims=2 * half,
        traditional=traditional,
        base=None if given_freqs else 10000.0,
        scale=0.5,
        freqs=mx.array(freqs) if given_freqs else None,
    )
    expected = twins.rope(numpy(x), each if offsets == "each" else [21], 2 * half, traditional, freqs, 0.5)
    assert_close(found, expected, rounded_to=dtype, tolerance=3e-5)


def attention_case(draw: Any) -> dict[str, Any]:
    kv, group = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    length = draw(st.sampled_from([1, 1, 2, 3, 9, 40]))
    return {
        "b": draw(st.integers(1, 2)),
        "kv": kv,
        "h": kv * group,
        "length": length,
        "keys": length + draw(st.sampled_from([0, 1, 5, 63, 64, 65, 300, 1100])),
        "d": draw(st.sampled_from([1, 8, 20, 32, 64, 80])),
        "dv": draw(st.sampled_from([0, 0, 24])),
        "kind": draw(st.sampled_from(["all", "causal", "window", "bool", "additive"])),
        "sinks": draw(st.booleans()),
        "softcap": draw(st.sampled_from([None, None, 0.7, 30.0])),
        "types": (draw(FLOATS), draw(FLOATS)),
        "layout": draw(Layout),
        "seed": draw(SEEDS),
    }


@settings(fast_settings, max_examples=40)
@given(st.composite(attention_case)())
def test_attention(ops: Ops, case: dict[str, Any]) -> None:
    qt, kt = (meant(ops, dtype) for dtype in case["types"])
    b, h, kv, length, keys, d = (case[name] for name in ("b", "h", "kv", "length", "keys", "d"))
    seed, layout = case["seed"], case["layout"]
    q = rand(b, h, length, d, seed=seed, dtype=qt, layout=layout)
    k = rand(b, kv, keys, d, seed=seed + 1, dtype=kt, layout=layout)
    v = rand(b, kv, keys, case["dv"] or d, seed=seed + 2, dtype=kt, layout=layout)
    sinks = rand(h, seed=seed + 3, dtype=qt) if case["sinks"] else None
    row, column = np.arange(keys - length, keys)[:, None], np.arange(keys)[None]
    visible = np.broadcast_to(column <= row, (length, keys))
    mask: Any = "causal"
    window = None
    added: Any = 0.0
    if case["kind"] == "all":
        mask, visible = None, np.ones((length, keys), bool)
    elif case["kind"] == "window":
        window = keys // 2 + 1
        visible = visible & (column > row - window)
    elif case["kind"] == "bool":
        visible = np.array(mx.random.bernoulli(0.5, (length, keys), key=mx.random.key(seed))) | (column == row)
        mask = mx.array(visible)
    elif case["kind"] == "additive":
        added = numpy(rand(b, 1, length, keys, seed=seed + 4, dtype=qt))
        mask, visible = mx.array(added).astype(qt), np.ones((length, keys), bool)
    softcap = case["softcap"]
    found = ops.attention(q, k, v, mask, scale=0.3, window=window, sinks=sinks, softcap=softcap)
    assert found.dtype == qt
    expected = twins.attention(
        numpy(q),
        numpy(k),
        numpy(v),
        scale=0.3,
        visible=visible,
        added=added,
        sinks=None if sinks is None else numpy(sinks),
        softcap=softcap,
    )
    # Relative to the values, not to their mean, which goes to zero as the keys grow in number.
    error = np.abs(numpy(found) - expected).max()
    assert error <= 2e-5 + 4 * twins.EPSILON[qt]


@fast_settings
@given(
    st.integers(1, 20),
    st.integers(1, 5000),
    st.sampled_from(["silu", "gelu", "gelu_pytorch_tanh", "relu", "relu2"]),
    FLOATS,
    Layout,
    SEEDS,
)
def test_glu(ops: Ops, rows: int, dim: int, name: str, dtype: mx.Dtype, layout: str, seed: int) -> None:
    dtype = meant(ops, dtype)
    x = rand(rows, 2 * dim, seed=seed, dtype=dtype, layout=layout) * 4
    gate, up = numpy(x)[:, :dim], numpy(x)[:, dim:]
    expected = twins.activation(name, gate) * up
    assert_close(ops.glu(x, name), expected, rounded_to=dtype, tolerance=1e-5)
    assert_close(ops.activate(x, name), twins.activation(name, numpy(x)), rounded_to=dtype, tolerance=1e-5)


@pytest.mark.parametrize("name", ["silu", "gelu_pytorch_tanh"])
def test_glu_at_the_ends(ops: Ops, name: str) -> None:
    gate = mx.array([[100.0, -100.0, 0.0, -0.0, 1e-30, 30.0, -30.0, float("nan"), 88.9, -88.9, 1e4, -1e4]])
    found = numpy(ops.glu(mx.concatenate([gate, mx.ones_like(gate)], axis=-1), name))
    assert np.isnan(found[0, 7])
    rest = [0, 1, 2, 3, 4, 5, 6, 8, 9, 10, 11]
    want = twins.activation(name, numpy(gate))[0, rest]
    want[np.abs(numpy(gate)[0, rest]) > 1e3] = [1e4, 0.0]
    assert np.allclose(found[0, rest], want, rtol=1e-5, atol=1e-6)


@fast_settings
@given(st.integers(1, 5), st.integers(1, 20000), FLOATS, st.booleans(), Layout, SEEDS)
def test_argmax(ops: Ops, rows: int, dim: int, dtype: mx.Dtype, ties: bool, layout: str, seed: int) -> None:
    x = rand(rows, dim, seed=seed, dtype=dtype, layout=layout)
    if ties:
        x = mx.round(x)
    assert ops.argmax(x).tolist() == np.argmax(numpy(x), axis=-1).tolist()
