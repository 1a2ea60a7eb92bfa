"""Mamba's recurrence against a naive loop, in every table of operations, and several requests' steps in place."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from instruction_sets import available, table_at
from twins import assert_close, numpy, rand

from runner.ops.selective import Selective

pytestmark = pytest.mark.usefixtures("best_level")
by_table = pytest.mark.parametrize("table", available())


def case(batch: int, length: int, channels: int, states: int, seed: int) -> tuple[Selective, mx.array]:
    x, steps = (rand(batch, length, channels, seed=seed + i) for i in range(2))
    # Parts of a wider line, as a layer has them.
    b, c = mx.split(rand(batch, length, 2 * states + 3, seed=seed + 2)[..., 3:], 2, axis=-1)
    rates, skip = -mx.exp(rand(channels, states, seed=seed + 3)), rand(channels, seed=seed + 4)
    return Selective(x, steps - 1, b, c, rates, skip), rand(batch, channels, states, seed=seed + 5)


def looped(told: Selective, state: mx.array) -> tuple[Any, Any]:
    """One token and one channel after the other, in float64."""
    x, steps, b, c, rates, skip = (numpy(array).astype(np.float64) for array in told)
    after, out = numpy(state).astype(np.float64), np.zeros(x.shape)
    for row, t, channel in np.ndindex(*x.shape):
        step, own = np.logaddexp(steps[row, t, channel], 0), x[row, t, channel]
        after[row, channel] = after[row, channel] * np.exp(step * rates[channel]) + step * own * b[row, t]
        out[row, t, channel] = after[row, channel] @ c[row, t] + skip[channel] * own
    return out, after


def part(told: Selective, first: int, last: int) -> Selective:
    x, steps, b, c = (array[:, first:last] for array in told[:4])
    return told._replace(x=x, steps=steps, b=b, c=c)


@by_table
@given(
    batch=st.integers(1, 2), cuts=st.lists(st.integers(1, 6), min_size=1, max_size=3), seed=st.integers(0, 99),
    channels=st.sampled_from([1, 5, 64, 130]), states=st.sampled_from([1, 7, 8, 16, 24]),
)  # fmt: skip
@settings(max_examples=15, deadline=None)
def test_it_is_the_loop_wherever_it_is_cut(
    table: str, batch: int, cuts: list[int], seed: int, channels: int, states: int
) -> None:
    scan = table_at(table).selective_scan
    told, state = case(batch, sum(cuts), channels, states, seed)
    outputs, last = scan(told, state)
    wanted, after = looped(told, state)
    assert_close(outputs, wanted, rounded_to=mx.float32, tolerance=1e-5)
    assert_close(last, after, rounded_to=mx.float32, tolerance=1e-5)
    pieces, start = [], 0
    for cut in cuts:
        piece, state = scan(part(told, start, start + cut), state)
        pieces.append(piece)
        start += cut
    assert mx.array_equal(mx.concatenate(pieces, axis=1), outputs) and mx.array_equal(state, last)


@by_table
@pytest.mark.parametrize("rows", [1, 3])
def test_a_step_of_several_requests_is_that_of_each_alone(table: str, rows: int) -> None:
    """In place, each at a position of its own, bit for bit what the scan makes of it."""
    ops = table_at(table)
    each = [case(1, 5, 40, 16, seed) for seed in range(rows)]
    each = [(told._replace(rates=each[0][0].rates, skip=each[0][0].skip), state) for told, state in each]
    slots = [{"states": mx.stack([state, state])} for _, state in each]
    for t in range(5):
        now = [part(told, t, t + 1) for told, _ in each]
        said = [mx.concatenate(arrays, axis=1) for arrays in zip(*(one[:4] for one in now), strict=True)]
        all_of_them = now[0]._replace(x=said[0], steps=said[1], b=said[2], c=said[3])
        found = ops.selective_step(lambda: slots, [t + row for row in range(rows)], all_of_them)  # noqa: B023
        if found is None:  # no such step: nothing was touched
            assert table == "mlx"
            return
        output, moved = found
        slots = [{"states": buffer} for buffer in moved["states"]]
        for row, (told, state) in enumerate(each):
            outputs, after = ops.selective_scan(part(told, 0, t + 1), state)
            assert mx.array_equal(output[:, row], outputs[:, -1])
            assert mx.array_equal(slots[row]["states"][(t + row + 1) % 2], after)
