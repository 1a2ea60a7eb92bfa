"""Greatest, draws and log-probabilities against twins in float64 that sort everything, over every device's table."""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from draws import KINDS as ALL_KINDS
from draws import in_order, made, shares
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from twins import FLOATS, rand

from runner.ops.picking import Draw
from runner.ops.table import PORTABLE, Ops

fast_settings = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)
SEEDS = st.integers(0, 2**31)
SIZES = st.one_of(st.integers(1, 700), st.sampled_from([1023, 1024, 1025, 4099, 49152, 300_001]))
KINDS = st.sampled_from(ALL_KINDS)


def draw(ops: Ops, logits: mx.array, chance: float, **options: Any) -> tuple[mx.array, mx.array]:
    """A draw from one row `[V]`."""
    token, peak = ops.draw(logits[None], [Draw(chance, **options)])
    return token[0], peak[0]


@fast_settings
@given(
    SIZES,
    KINDS,
    st.sampled_from([0.3, 1.0, 1.7, 50.0]),
    st.sampled_from([0, 1, 2, 7, 50, 1000, 10**6]),
    st.one_of(st.sampled_from([0.0, 1e-6, 0.5, 0.9, 0.999, 1 - 1e-7, 1.0]), st.floats(1e-6, 1.0)),
    st.sampled_from([0.0, 0.0, 0.05, 1.0]),
    SEEDS,
)
def test_each_token_is_drawn_in_its_share(
    ops: Ops, size: int, kind: str, temperature: float, top_k: int, top_p: float, min_p: float, seed: int
) -> None:
    x = made(kind, size, seed)
    # The sum that top_p is compared with is rounded: try what stays just below it and just above.
    rounding = 4e-7 + (size * 2.0**-24 if ops is PORTABLE else 0)
    options = dict(temperature=temperature, top_k=top_k, min_p=min_p)
    with np.errstate(over="ignore", invalid="ignore"):
        fewer, more = (shares(x, top_p=top_p * (1 + sign * rounding), **options) for sign in (-1, 1))
    logits = mx.array(x)
    sure = np.array_equal(fewer, more)
    ends = np.cumsum(more)
    # The likeliest, the last that stays (a filter's edge) and some between them; those before and after the edge are
    # not drawn at any chance, or all the shares would have moved.
    kept = [token for token in in_order(x) if more[token] > 0]
    for token in {*kept[:3], *kept[-3:], *kept[:: len(kept) // 4 + 1]}:
        found, peak = draw(ops, logits, float(min(ends[token] - more[token] / 2, 1 - 2**-53)), top_p=top_p, **options)
        assert peak.item() == x.max() and found.dtype == mx.uint32
        if sure and more[token] > 4 * rounding:
            assert found.item() == token
        else:
            assert more[found.item()] > 0
    for chance, token in (0.0, min(kept)), (1 - 2.0**-53, max(kept)):
        found = draw(ops, logits, chance, top_p=top_p, **options)[0].item()
        assert more[found] > 0 and (not sure or more[token] < 4 * rounding or found == token)


@pytest.mark.parametrize("size", [1, 2, 10, 63, 64, 1000, 49152, 300_000])
@pytest.mark.parametrize("share", [0.0, 1e-6, 0.1, 0.5, 0.9, 0.999])
def test_equal_tokens_stay_by_their_ids(ops: Ops, size: int, share: float) -> None:
    """Weights of 1 add up without rounding, so the count is exact: the fewest that reach the share, at least one."""
    logits = mx.full((size,), -3.5)
    count = max(1, math.ceil(float(np.float32(share * size))))
    assert draw(ops, logits, 1 - 2.0**-53, temperature=0.7, top_p=share)[0].item() == count - 1
    assert draw(ops, logits, 1 - 2.0**-53, temperature=0.7, top_k=count)[0].item() == count - 1
    # A share of what top-k left, not of all.
    assert (
        draw(ops, logits, 1 - 2.0**-53, temperature=0.7, top_k=10, top_p=0.5)[0].item() == min(5, (size + 1) // 2) - 1
    )


@fast_settings
@given(SIZES, KINDS, st.sampled_from([0, 1, 2, 5, 20, 1024]), SEEDS)
def test_log_probabilities(ops: Ops, size: int, kind: str, top: int, seed: int) -> None:
    x = made(kind, size, seed)
    token = seed % size
    with np.errstate(over="ignore"):
        exact = x.astype(np.float64)
        wanted = exact - (exact.max() + math.log(np.exp(exact - exact.max()).sum()))
    picked, *likeliest = (
        row[0] for row in ops.log_probabilities(mx.array(x)[None], mx.array([token], mx.uint32), [top])
    )
    close = {"rtol": 3e-7, "atol": 1e-6 + (size * 2.0**-24 if ops is PORTABLE else 0)}
    assert picked.shape == () and np.allclose(picked.item(), wanted[token], **close)
    assert len(likeliest) == (2 if top else 0)
    if top:
        ids, values = (np.array(array) for array in likeliest)
        assert ids.tolist() == in_order(x)[:top].tolist()
        assert np.allclose(values, wanted[ids], **close)


@fast_settings
@given(st.integers(1, 4), SIZES.filter(lambda size: size < 20000), FLOATS, st.booleans(), SEEDS)
def test_greatest(ops: Ops, rows: int, size: int, dtype: mx.Dtype, ties: bool, seed: int) -> None:
    x = rand(rows, size, seed=seed, dtype=dtype)
    x = mx.round(x) if ties else x
    found, peak = ops.greatest(x)
    values = np.array(x.astype(mx.float32))
    assert found.tolist() == values.argmax(-1).tolist() and peak.tolist() == values.max(-1).tolist()


@pytest.mark.parametrize("size", [1, 15, 16, 17, 300, 9000])
@pytest.mark.parametrize(
    "odd, wanted", [([math.nan], math.nan), ([math.inf], math.inf), ([math.inf, math.nan], math.nan)]
)
def test_what_cannot_be_drawn_from_shows_in_the_peak(ops: Ops, size: int, odd: list[float], wanted: float) -> None:
    for at in {0, size // 2, size - 1}:
        x = np.full(size, -math.inf, np.float32)
        x[: size // 3] = 1
        x[at] = odd[0]
        x[0] = odd[-1]
        logits = mx.array(x)
        want = math.nan if math.isnan(x[at]) else wanted
        for peak in (
            ops.greatest(logits)[1],
            draw(ops, logits, 0.5, temperature=1.0)[1],
            draw(ops, logits, 0.5, temperature=1.0, top_k=3, top_p=0.5, min_p=0.1)[1],
        ):
            assert np.array_equal(np.array(peak), np.float32(want), equal_nan=True)
        mx.eval(ops.log_probabilities(logits[None], mx.array([0], mx.uint32), [3]))
    nothing = mx.full((size,), -math.inf)
    assert ops.greatest(nothing)[1].item() == draw(ops, nothing, 0.5, temperature=1.0)[1].item() == -math.inf


OPTIONS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.7},
    {"temperature": 1.0, "top_k": 5},
    {"temperature": 1.3, "top_p": 0.9},
    {"temperature": 1.0, "min_p": 0.1},
    {"temperature": 0.8, "top_k": 40, "top_p": 0.8, "min_p": 0.05},
    {"temperature": 2.0, "top_k": 3, "min_p": 0.3},
    {"temperature": 1.0, "top_p": 0.0},
]


@fast_settings
@given(st.lists(st.tuples(st.sampled_from(OPTIONS), KINDS, st.floats(0, 1 - 2**-53)), min_size=1, max_size=9), SEEDS)
def test_a_row_among_others_is_as_alone(ops: Ops, rows: list[tuple[dict[str, Any], str, float]], seed: int) -> None:
    """Bit by bit, whatever the others' options; rows of a matrix that is not contiguous too."""
    size = [37, 1000, 4099][seed % 3]
    logits = mx.array(np.stack([made(kind, size, seed + i) for i, (_, kind, _) in enumerate(rows)]))
    wanted = [seed % 4 - 1 if i % 2 else 7 for i in range(len(rows))]
    for x in (logits, mx.contiguous(logits.T).T):
        tokens, peaks = ops.draw(x, [Draw(chance, **options) for options, _, chance in rows])
        picked, *likeliest = ops.log_probabilities(x, tokens, wanted)
        for row, (options, _, chance) in enumerate(rows):
            alone = draw(ops, logits[row], chance, **options)
            assert (tokens[row].item(), peaks[row].item()) == (alone[0].item(), alone[1].item())
            if wanted[row] < 0:
                continue
            scored = ops.log_probabilities(logits[row][None], tokens[row][None], [wanted[row]])
            for one, all_of_them in zip(scored, [picked, *likeliest], strict=False):
                assert np.array_equal(np.ravel(one[0]), np.ravel(all_of_them[row])[: one[0].size])


@fast_settings
@given(st.integers(1, 3), st.sampled_from([1, 31, 32, 33, 700, 49152]), SEEDS)
def test_a_mask_leaves_the_tokens_whose_bits_are_set(ops: Ops, rows: int, size: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    x = random.normal(size=(rows, size)).astype(np.float32)
    allowed = random.random((rows, size)) < random.choice([0.0, 0.02, 0.9, 1.0])
    padded = np.zeros((rows, -(-size // 32) * 32), np.uint8)
    padded[:, :size] = allowed
    bits = np.packbits(padded, axis=1, bitorder="little").view(np.uint32)
    assert np.array_equal(np.array(ops.masked(mx.array(x), mx.array(bits))), np.where(allowed, x, -math.inf))
