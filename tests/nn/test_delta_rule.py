"""The gated delta rule and its layer: against a naive loop, cut at any place, taken back, and in a whole model."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from places import TESTS
from recurrent_twins import Inputs, delta, delta_inputs
from twins import assert_close, numpy, rand

from runner.cache.recurrent import StateCache
from runner.engine.loaded import Loaded, open_loaded
from runner.engine.prefill import new_caches
from runner.nn.batch import Batch
from runner.nn.delta_rule import each_token
from runner.ops.delta_rule import unit_lower_inverse
from runner.ops.device import CUDA, METAL, current
from runner.ops.table import PORTABLE, Ops

FAMILIES = TESTS / "fixtures" / "families"
ON_A_CPU = mx.default_device() == mx.Device(mx.cpu)
EXACT = list({ops.name: ops for ops in (PORTABLE, *([current().ops] if ON_A_CPU else []))}.values())
"""The tables of CPUs, where not one bit may depend on where a prompt is cut."""
by_exact = pytest.mark.parametrize("ops", EXACT, ids=lambda ops: ops.name)
GPUS = [METAL, CUDA]
by_table = pytest.mark.parametrize("ops", [*EXACT, *GPUS], ids=lambda ops: ops.name)


def cut(given: Inputs, state: mx.array, first: int, last: int) -> Inputs:
    q, k, v, gates, _ = given
    now = slice(first, last)
    return q[:, now], k[:, now], v[:, now], gates._replace(a=gates.a[:, now], b=gates.b[:, now]), state


def check(ops: Ops, given_: Inputs) -> None:
    output, state = ops.gated_delta(*given_)
    wanted, wanted_state = delta(*given_)
    dtype = given_[2].dtype
    assert output.dtype == dtype and state.dtype == mx.float32  # the state, whatever the activations are
    assert_close(output, wanted, rounded_to=dtype, tolerance=2e-5)
    assert_close(state, wanted_state, rounded_to=mx.float32, tolerance=2e-5)


@by_exact
@given(
    batch=st.integers(1, 2), length=st.sampled_from([1, 2, 7, 16, 17, 63, 64, 65, 130]), key_heads=st.integers(1, 3),
    share=st.integers(1, 3), dk=st.sampled_from([4, 16, 32, 40]), dv=st.sampled_from([8, 16, 33]),
    channels=st.booleans(), dtype=st.sampled_from([mx.float32, mx.bfloat16]), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=30, deadline=None)
def test_the_delta_rule(
    ops: Ops, batch: int, length: int, key_heads: int, share: int, dk: int, dv: int, channels: bool, dtype: mx.Dtype,
    seed: int,
) -> None:  # fmt: skip
    heads, sizes = (key_heads, share * key_heads), (dk, dv)
    check(ops, delta_inputs(seed, batch=batch, length=length, heads=heads, sizes=sizes, dtype=dtype, channels=channels))


@pytest.mark.parametrize("ops", GPUS, ids=lambda ops: ops.name)
@pytest.mark.parametrize(
    ("length", "dtype", "channels"),
    [(1, mx.bfloat16, False), (64, mx.float32, False), (130, mx.float32, False), (9, mx.float32, True)],
)
def test_the_delta_rule_of_gpus(ops: Ops, length: int, dtype: mx.Dtype, channels: bool) -> None:
    """Each form is compiled on its own: a few of them."""
    check(ops, delta_inputs(7, batch=2, length=length, dtype=dtype, channels=channels))


@pytest.mark.parametrize("size", [1, 2, 8, 64])
def test_the_inverse_of_a_triangle(size: int) -> None:
    lower = mx.tril(rand(2, 3, size, size, seed=size), -1)
    found = unit_lower_inverse(lower)
    wanted = np.linalg.inv(np.eye(size) + numpy(lower).astype(np.float64))
    assert np.max(np.abs(numpy(found) - wanted)) <= 1e-4 * np.max(np.abs(wanted))


@by_table
def test_a_long_prompt_with_little_decay_and_equal_keys(ops: Ops) -> None:
    """What makes the sums of a chunked form large: every key the same, everything learned, nothing forgotten."""
    q, k, v, gates, state = delta_inputs(3, length=200, sizes=(32, 32))
    k = mx.broadcast_to(k[:, :1], k.shape)
    gates = gates._replace(b=gates.b + 6, a=gates.a - 12)
    output, after = ops.gated_delta(q, k, v, gates, state)
    wanted, wanted_state = delta(q, k, v, gates, state)
    assert_close(output, wanted, rounded_to=mx.float32, tolerance=1e-4)
    assert_close(after, wanted_state, rounded_to=mx.float32, tolerance=1e-4)


@by_exact
@given(cuts=st.lists(st.sampled_from([1, 2, 7, 15, 16, 40]), min_size=1, max_size=5), channels=st.booleans())
@settings(max_examples=15, deadline=None)
def test_the_delta_rule_is_the_same_wherever_it_is_cut(ops: Ops, cuts: list[int], channels: bool) -> None:
    given_ = delta_inputs(1, batch=2, length=sum(cuts), channels=channels)
    whole, last = ops.gated_delta(*given_)
    state, parts = given_[-1], []
    for end, length in zip(np.cumsum(cuts), cuts, strict=True):
        part, state = ops.gated_delta(*cut(given_, state, int(end) - length, int(end)))
        parts.append(part)
    joined = mx.concatenate(parts, axis=1)
    assert mx.array_equal(joined, whole) and mx.array_equal(state, last)


@by_table
def test_the_states_behind_each_token(ops: Ops) -> None:
    given_ = delta_inputs(2, batch=2, length=6)
    output, states = each_token(ops, *given_)
    for end in range(1, 7):
        wanted, state = ops.gated_delta(*cut(given_, given_[-1], 0, end))
        assert_close(output[:, :end], numpy(wanted), rounded_to=mx.float32, tolerance=1e-5)
        assert_close(states[end - 1], numpy(state), rounded_to=mx.float32, tolerance=1e-5)


# --- in a model -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["qwen3_5_text-base", "qwen3_next-base"])
def engine(request: pytest.FixtureRequest) -> Loaded:
    return open_loaded(FAMILIES / request.param, dtype="float32")


IDS = np.random.default_rng(0).integers(8, 48, 100).tolist()


def fed(engine: Loaded, ids: list[int], sizes: list[int]) -> tuple[mx.array, Any]:
    """Logits `[L, V]` of `ids`, fed in pieces of these sizes (the last one repeats), and the caches after them."""
    caches, rows, start = new_caches(engine.config), [], 0
    while start < len(ids):
        size = sizes[min(len(rows), len(sizes) - 1)]
        piece = mx.array([ids[start : start + size]])
        rows.append(engine.model.logits(engine.model(Batch(piece, start, len(ids)), caches))[0])
        start += size
    return mx.concatenate(rows), caches


@pytest.mark.parametrize("size", [1, 7, 64])
def test_a_prompt_in_chunks(engine: Loaded, size: int) -> None:
    whole, caches = fed(engine, IDS, [len(IDS)])
    found, other = fed(engine, IDS, [size])
    assert_close(found, numpy(whole), rounded_to=mx.float32, tolerance=2e-4)
    states = [(one, two) for one, two in zip(caches, other, strict=True) if isinstance(one, StateCache)]
    for one, two in states:
        wanted, got = one.read(whole), two.read(whole)
        for name in ("conv", "delta"):
            assert_close(got[name], numpy(wanted[name]), rounded_to=mx.float32, tolerance=2e-4)
    assert len(states) == 2


@given(accepted=st.integers(0, 5), before=st.integers(1, 20))
@settings(max_examples=6, deadline=None)
def test_tokens_that_were_reserved_are_taken_back(engine: Loaded, accepted: int, before: int) -> None:
    """Speculation: a pass of five tokens, of which some are kept, and then others follow."""
    _, caches = fed(engine, IDS[:before], [before])
    caches.reserve(5)
    engine.model(Batch(mx.array([IDS[before : before + 5]]), before), caches)
    place = before + accepted
    assert caches.reach(place) == place
    caches.rewind(place)
    follow = IDS[50:60]
    found = engine.model.logits(engine.model(Batch(mx.array([follow]), place), caches))[0]
    wanted, _ = fed(engine, [*IDS[:place], *follow], [place + 10])
    assert_close(found, numpy(wanted)[place:], rounded_to=mx.float32, tolerance=2e-4)
