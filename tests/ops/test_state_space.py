"""Mamba 2's recurrence against a naive loop, in every table of operations, and cut at any place."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from instruction_sets import available, table_at
from twins import assert_close, numpy, rand

from runner.ops.device import METAL
from runner.ops.state_space import Dynamics, each_token
from runner.ops.table import Ops, Taps

pytestmark = pytest.mark.usefixtures("best_level")
by_table = pytest.mark.parametrize("table", [*available(), "metal"])


def table_of(name: str) -> Ops:
    """`PORTABLE`, a GPU's chunks (of MLX ops, which a CPU computes as well), or the CPU's kernels at a level."""
    return METAL if name == "metal" else table_at(name)


def looped(mixed: mx.array, dt: mx.array, dynamics: Dynamics, state: mx.array) -> tuple[Any, Any]:
    """One token and one head after the other, in float64."""
    (batch, length, _), (_, heads, size, numbers) = mixed.shape, state.shape
    inner, groups = heads * size, dynamics.groups
    wide, after = numpy(mixed).astype(np.float64), numpy(state).astype(np.float64)
    step = np.logaddexp(numpy(dt).astype(np.float64) + numpy(dynamics.dt_bias), 0).clip(*dynamics.limits)
    a, d = -np.exp(numpy(dynamics.a_log).astype(np.float64)), numpy(dynamics.d)
    out = np.zeros((batch, length, inner))
    for row in range(batch):
        for t in range(length):
            x, b, c = np.split(wide[row, t], [inner, inner + groups * numbers])
            for head in range(heads):
                group = head // (heads // groups)
                own = x[head * size : (head + 1) * size]
                bg, cg = (part.reshape(groups, numbers)[group] for part in (b, c))
                dh = step[row, t, head]
                after[row, head] = after[row, head] * np.exp(a[head] * dh) + dh * np.outer(own, bg)
                out[row, t, head * size : (head + 1) * size] = after[row, head] @ cg + d[head] * own
    return out, after


def case(
    batch: int, length: int, groups: int, shared: int, size: int, numbers: int, seed: int, dtype: mx.Dtype = mx.float32
) -> tuple[mx.array, mx.array, Dynamics, mx.array]:
    heads = groups * shared
    mixed = rand(batch, length, heads * size + 2 * groups * numbers, seed=seed, dtype=dtype)
    dt = rand(batch, length, heads, seed=seed + 1, dtype=dtype)
    a_log, d, dt_bias = (rand(heads, seed=seed + i) for i in (2, 3, 4))
    limits = [(0.0, math.inf), (0.05, 0.4)][seed % 2]
    state = rand(batch, heads, size, numbers, seed=seed + 5)
    return mixed, dt, Dynamics(a_log, d, dt_bias - 2, groups, limits), state


@by_table
@given(
    batch=st.integers(1, 2), length=st.sampled_from([1, 2, 5, 63, 64, 65, 130]), groups=st.integers(1, 2),
    shared=st.integers(1, 3), size=st.sampled_from([1, 5, 8]), numbers=st.sampled_from([1, 7, 16, 24]),
    dtype=st.sampled_from([mx.float32, mx.bfloat16]), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=15, deadline=None)
def test_it_is_the_loop(
    table: str, batch: int, length: int, groups: int, shared: int, size: int, numbers: int, dtype: mx.Dtype, seed: int
) -> None:
    given_case = case(batch, length, groups, shared, size, numbers, seed, dtype)
    outputs, state = table_of(table).state_space(*given_case)
    assert outputs.dtype == dtype and state.dtype == mx.float32
    wanted, after = looped(*given_case)
    assert_close(outputs, wanted, rounded_to=dtype, tolerance=1e-5)
    assert_close(state, after, rounded_to=mx.float32, tolerance=1e-5)


@by_table
@given(cuts=st.lists(st.sampled_from([1, 3, 16, 40, 64]), min_size=2, max_size=5), seed=st.integers(0, 9))
@settings(max_examples=15, deadline=None)
def test_it_can_be_cut_anywhere(table: str, cuts: list[int], seed: int) -> None:
    """Token by token to the last bit; in chunks, within the rounding of float32."""
    scan = table_of(table).state_space
    mixed, dt, dynamics, state = case(1, sum(cuts), 2, 2, 8, 16, seed)
    whole, last = scan(mixed, dt, dynamics, state)
    outputs, start = [], 0
    for cut in cuts:
        output, state = scan(mixed[:, start : start + cut], dt[:, start : start + cut], dynamics, state)
        outputs.append(output)
        start += cut
    pieced = mx.concatenate(outputs, axis=1)
    if table == "metal":
        assert_close(pieced, numpy(whole), rounded_to=mx.float32, tolerance=1e-5)
        assert_close(state, numpy(last), rounded_to=mx.float32, tolerance=1e-5)
    else:
        assert mx.array_equal(pieced, whole) and mx.array_equal(state, last)


@by_table
def test_the_states_behind_each_token(table: str) -> None:
    scan = table_of(table).state_space
    mixed, dt, dynamics, state = case(2, 5, 2, 2, 8, 16, 0)
    outputs, states = each_token(scan, mixed, dt, dynamics, state)
    assert states.shape == (5, *state.shape)
    for end in range(1, 6):
        found = scan(mixed[:, :end], dt[:, :end], dynamics, state)
        assert_close(outputs[:, end - 1], numpy(found[0][:, -1]), rounded_to=mx.float32, tolerance=1e-5)
        assert_close(states[end - 1], numpy(found[1]), rounded_to=mx.float32, tolerance=1e-5)


@by_table
def test_a_step_moves_states_in_place(table: str) -> None:
    """A token at a time through two slots is what the convolution and the recurrence make of all at once."""
    ops = table_of(table)
    mixed, dt, dynamics, state = case(2, 5, 2, 2, 8, 16, 1)
    taps = Taps(rand(4, mixed.shape[2], seed=8), rand(mixed.shape[2], seed=9), "silu")
    rows = rand(2, 3, mixed.shape[2], seed=7)
    convolved = ops.short_conv(mixed, rows, *taps)
    wanted, after = ops.state_space(convolved, dt, dynamics, state)
    slots: Mapping[str, mx.array] = {"conv": mx.stack([rows, rows]), "states": mx.stack([state, state])}
    steps = [slice(t, t + 1) for t in range(5)]
    for t, now in enumerate(steps):
        found = ops.space_step(functools.partial(list, [slots]), [t], mixed[:, now], dt[:, now], taps, dynamics)
        if found is None:  # no such step: nothing was touched
            assert table in ("mlx", "metal")
            return
        output, moved = found
        slots = {name: buffer for name, (buffer,) in moved.items()}
        assert_close(output, numpy(wanted[:, now]), rounded_to=mx.float32, tolerance=1e-6)
    assert_close(slots["states"][5 % 2], numpy(after), rounded_to=mx.float32, tolerance=1e-6)
    assert mx.array_equal(slots["conv"][5 % 2], mx.concatenate([rows, mixed], axis=1)[:, -3:])


@by_table
def test_a_convolution_alone_is_moved_in_place(table: str) -> None:
    ops = table_of(table)
    x, rows = rand(2, 5, 40, seed=1), rand(2, 2, 40, seed=2)
    taps = Taps(rand(3, 40, seed=3), None, None)
    wanted, slots = ops.short_conv(x, rows, *taps), {"conv": mx.stack([rows, rows])}
    for t in range(5):
        found = ops.conv_step(functools.partial(list, [slots]), [t], x[:, t : t + 1], taps)
        if found is None:
            assert table in ("mlx", "metal")
            return
        output, moved = found
        (slots["conv"],) = moved["conv"]
        assert_close(output, numpy(wanted[:, t : t + 1]), rounded_to=mx.float32, tolerance=1e-6)
    assert mx.array_equal(slots["conv"][5 % 2], x[:, -2:])
