"""Short convolutions and gated norms against naive loops, and cut at any place."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recurrent_twins import conv as naive_conv
from recurrent_twins import gated_norm
from twins import assert_close, rand

from runner.nn.gated_norm import GatedRMSNorm, GateThenNorm, NormThenGate
from runner.nn.short_conv import FLAT, TAPS_BESIDE_CHANNELS, TAPS_LAST, StoredShortConv
from runner.ops.device import METAL, current
from runner.ops.table import PORTABLE, Ops

TABLES = list({ops.name: ops for ops in (PORTABLE, METAL, current().ops)}.values())
by_table = pytest.mark.parametrize("ops", TABLES, ids=lambda ops: ops.name)


@by_table
@given(
    batch=st.integers(1, 2), length=st.integers(1, 9), taps=st.integers(2, 7), biased=st.booleans(),
    activation=st.sampled_from([None, "silu"]), dtype=st.sampled_from([mx.float32, mx.bfloat16]),
    seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=30, deadline=None)
def test_short_conv(
    ops: Ops, batch: int, length: int, taps: int, biased: bool, activation: str | None, dtype: mx.Dtype, seed: int
) -> None:
    channels = 40
    conv = StoredShortConv(rand(taps, channels, seed=seed), rand(channels, seed=seed + 1) if biased else None, ops=ops)
    x = rand(batch, length, channels, seed=seed + 2, dtype=dtype)
    rows = rand(batch, taps - 1, channels, seed=seed + 3, dtype=dtype)
    found = conv(x, rows, activation=activation)
    assert found.output.dtype == found.rows.dtype == dtype
    wanted = naive_conv(x, rows, conv.weight, conv.bias, activation)
    assert_close(found.output, wanted, rounded_to=dtype, tolerance=1e-5)
    # The rows behind every token are those that a pass up to there leaves.
    each = conv(x, rows, activation=activation, each=True).rows
    for end in range(1, length + 1):
        assert mx.array_equal(each[end - 1], conv(x[:, :end], rows, activation=activation).rows)


@by_table
@given(cuts=st.lists(st.integers(1, 8), min_size=1, max_size=5), taps=st.integers(2, 5))
@settings(max_examples=20, deadline=None)
def test_a_short_conv_is_the_same_wherever_it_is_cut(ops: Ops, cuts: list[int], taps: int) -> None:
    channels = 33
    conv = StoredShortConv(rand(taps, channels, seed=1), ops=ops)
    x = rand(2, sum(cuts), channels, seed=2)
    rows = mx.zeros((2, taps - 1, channels))
    whole = conv(x, rows, activation="silu")
    parts = []
    for end, length in zip(np.cumsum(cuts), cuts, strict=True):
        part = conv(x[:, int(end) - length : int(end)], rows, activation="silu")
        parts.append(part.output)
        rows = part.rows
    assert mx.array_equal(mx.concatenate(parts, axis=1), whole.output)
    assert mx.array_equal(rows, whole.rows)


@pytest.mark.parametrize(("form", "shape"), [(TAPS_LAST, (5, 1, 3)), (TAPS_BESIDE_CHANNELS, (5, 3, 1)), (FLAT, (5, 3))])
def test_forms_of_the_weight(form: Any, shape: tuple[int, ...]) -> None:
    stored = rand(*shape, seed=0)
    field = form.apply(stored)
    assert form.stored_shape(field.shape) == shape and form.stored_shape((5,)) == (5,)
    assert mx.array_equal(field, stored.reshape(5, 3).T) and mx.array_equal(form.invert(field), stored)
    bias = rand(5, seed=1)
    assert mx.array_equal(form.apply(bias), bias) and mx.array_equal(form.invert(bias), bias)


@by_table
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("kind", [NormThenGate, GateThenNorm])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_gated_norms(ops: Ops, kind: type[GatedRMSNorm], groups: int, dtype: mx.Dtype) -> None:
    x, gate = (rand(2, 3, 24, seed=seed, dtype=dtype) for seed in (1, 2))
    for size in {24, 24 // groups}:  # a weight for all, or one that the groups share
        norm = kind(rand(size, seed=3) + 2, groups=groups, ops=ops)
        found = norm(x, gate, 1e-5)
        assert found.dtype == dtype
        wanted = gated_norm(x, gate, norm.weight, 1e-5, groups, kind is GateThenNorm)
        assert_close(found, wanted, rounded_to=dtype, tolerance=1e-5)
