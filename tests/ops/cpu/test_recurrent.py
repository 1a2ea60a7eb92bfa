"""The kernels of recurrent layers against naive twins, with each instruction set; plain MLX beside them."""

from __future__ import annotations

import functools

import mlx.core as mx
import numpy as np
import recurrent_twins as naive
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from twins import FLOATS, Layout, assert_close, numpy, rand

from runner.cache.recurrent import Stepped
from runner.ops.delta_rule import Gates
from runner.ops.state_space import Dynamics
from runner.ops.table import PORTABLE, Ops, Taps

few = settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)
SEEDS = st.integers(0, 2**31)
LENGTHS = st.sampled_from([1, 2, 3, 9, 40])


@few
@given(st.integers(1, 3), LENGTHS, st.integers(1, 70), st.integers(1, 6), FLOATS, st.booleans(), st.booleans(), Layout,
       SEEDS)  # fmt: skip
def test_short_conv(
    ops: Ops, batch: int, length: int, channels: int, taps: int, wt: mx.Dtype, biased: bool, activated: bool,
    layout: str, seed: int,
) -> None:  # fmt: skip
    wt = mx.float32 if ops is PORTABLE else wt
    x, rows = rand(batch, length, channels, seed=seed, layout=layout), rand(batch, taps - 1, channels, seed=seed + 1)
    weight = rand(taps, channels, seed=seed + 2, dtype=wt)
    bias = rand(channels, seed=seed + 3, dtype=wt) if biased else None
    activation = "silu" if activated else None
    found = ops.short_conv(x, rows, weight, bias, activation)
    assert_close(found, naive.conv(x, rows, weight, bias, activation), rounded_to=mx.float32, tolerance=1e-5)


@few
@given(
    st.integers(1, 2), LENGTHS, st.integers(1, 3), st.integers(1, 3), st.sampled_from([1, 3, 16, 37, 128]),
    st.sampled_from([1, 5, 16, 37, 70]), st.booleans(), SEEDS,
)  # fmt: skip
def test_gated_delta(
    ops: Ops, batch: int, length: int, groups: int, share: int, dk: int, dv: int, channels: bool, seed: int
) -> None:
    heads, sizes = (groups, share * groups), (dk, dv)
    given_ = naive.delta_inputs(seed, batch=batch, length=length, heads=heads, sizes=sizes, channels=channels)
    out, state = ops.gated_delta(*given_)
    wanted, wanted_state = naive.delta(*given_)
    assert_close(out, wanted, rounded_to=mx.float32, tolerance=3e-5)
    assert_close(state, wanted_state, rounded_to=mx.float32, tolerance=3e-5)


@few
@given(
    st.integers(1, 2), LENGTHS, st.integers(1, 3), st.integers(1, 3), st.sampled_from([1, 16, 37]),
    st.sampled_from([1, 16, 37]), st.sampled_from([(0.0, float("inf")), (0.3, 1.0)]), SEEDS,
)  # fmt: skip
def test_state_space(
    ops: Ops, batch: int, length: int, groups: int, share: int, size: int, numbers: int,
    limits: tuple[float, float], seed: int,
) -> None:  # fmt: skip
    heads = groups * share
    mixed = rand(batch, length, heads * size + 2 * groups * numbers, seed=seed)
    dt, state = rand(batch, length, heads, seed=seed + 1), rand(batch, heads, size, numbers, seed=seed + 2)
    dynamics = Dynamics(*(rand(heads, seed=seed + i) for i in (3, 4, 5)), groups, limits)
    out, after = ops.state_space(mixed, dt, dynamics, state)
    x, b, c = np.split(numpy(mixed).astype(np.float64), [heads * size, heads * size + groups * numbers], axis=-1)
    x = x.reshape(batch, length, heads, size)
    b, c = (np.repeat(part.reshape(batch, length, groups, numbers), share, 2) for part in (b, c))
    a_log, d, bias = naive.wide(dynamics.a_log, dynamics.d, dynamics.dt_bias)
    step = np.clip(np.log1p(np.exp(numpy(dt).astype(np.float64) + bias)), *limits)
    s, wanted = numpy(state).astype(np.float64), np.zeros(x.shape)
    for t in range(length):
        s = s * np.exp(-np.exp(a_log) * step[:, t])[..., None, None]
        s = s + (step[:, t, :, None] * x[:, t])[..., None] * b[:, t, :, None]
        wanted[:, t] = np.einsum("bhpn,bhn->bhp", s, c[:, t]) + d[:, None] * x[:, t]
    assert_close(out, wanted.reshape(out.shape), rounded_to=mx.float32, tolerance=3e-5)
    assert_close(after, s, rounded_to=mx.float32, tolerance=3e-5)


@few
@given(st.integers(1, 3), LENGTHS, st.integers(1, 5), st.integers(1, 70), FLOATS, st.booleans(), st.booleans(), SEEDS)
def test_gated_norm(
    ops: Ops, batch: int, length: int, groups: int, size: int, wt: mx.Dtype, first: bool, shared: bool, seed: int
) -> None:
    wt = mx.float32 if ops is PORTABLE else wt
    x = rand(batch, length, groups * size, seed=seed)
    gate = rand(batch, length, groups * size + 7, seed=seed + 1)[..., 3:-4]  # cut from what a projection put out
    weight = rand(size if shared else groups * size, seed=seed + 2, dtype=wt)
    found = ops.gated_norm(x, gate, weight, 1e-5, groups, first)
    wanted = naive.gated_norm(x, gate, weight, 1e-5, groups, first)
    assert_close(found, wanted, rounded_to=mx.float32, tolerance=1e-5)


@few
@given(st.integers(1, 2), st.integers(1, 3), LENGTHS, st.integers(1, 40), SEEDS)
def test_gate(ops: Ops, batch: int, heads: int, length: int, size: int, seed: int) -> None:
    x = rand(batch, heads, length, size, seed=seed)
    gate = rand(batch, length, heads, 2 * size, seed=seed + 1).swapaxes(1, 2)[..., size:]
    wanted = numpy(x) / (1 + np.exp(-numpy(gate)))
    assert_close(ops.gate(x, gate), wanted, rounded_to=mx.float32, tolerance=1e-5)


@few
@given(
    st.integers(1, 9), st.integers(1, 2), st.integers(1, 3), st.sampled_from([1, 16, 37]), st.sampled_from([5, 16, 70]),
    st.sampled_from(["delta", "states", "conv"]), SEEDS,
)  # fmt: skip
def test_several_sequences_move_as_each_alone(
    ops: Ops, count: int, groups: int, share: int, dk: int, dv: int, kind: str, seed: int
) -> None:
    """To the last bit, wherever each one is, and whatever the others hold."""
    heads = groups * share
    width = heads * dv + 2 * groups * dk
    taps = Taps(rand(3, width, seed=seed), rand(width, seed=seed + 1), "silu")
    a_log, bias, d = (rand(heads, seed=seed + i) for i in (2, 3, 4))
    a, b = rand(1, count, heads + 3, seed=seed + 5)[..., 3:], rand(1, count, heads, seed=seed + 6)
    mixed = rand(1, count, width + 2, seed=seed + 7)[..., :width]  # cut from what a projection put out
    shapes = {"conv": (2, 1, 2, width)} | ({} if kind == "conv" else {kind: (2, 1, heads, dv, dk)})
    at = [seed % 5 + i * i for i in range(count)]

    def buffers(i: int) -> dict[str, mx.array]:
        found = {name: rand(*shape, seed=seed + 10 * i + 8) for name, shape in shapes.items()}
        return found if i % 4 < 3 else {name: x * np.nan for name, x in found.items()}

    def moved(rows: list[int]) -> Stepped | None:
        slots = functools.partial(list, [buffers(i) for i in rows])
        now, where = slice(rows[0], rows[-1] + 1), [at[i] for i in rows]
        x = mixed[:, now]
        if kind == "delta":
            return ops.delta_step(slots, where, x, taps, Gates(a[:, now], b[:, now], a_log, bias), groups)
        if kind == "states":
            dynamics = Dynamics(a_log, d, bias, groups, (0.0, float("inf")))
            return ops.space_step(slots, where, x, a[:, now], taps, dynamics)
        return ops.conv_step(slots, where, x, taps)

    together = moved(list(range(count)))
    if together is None:
        assert ops is PORTABLE
        return
    for i in range(count):
        alone = moved([i])
        assert alone is not None
        assert np.array_equal(numpy(together[0][:, i]), numpy(alone[0][:, 0]), equal_nan=True)
        for name, (buffer,) in alone[1].items():
            assert np.array_equal(numpy(together[1][name][i]), numpy(buffer), equal_nan=True)
