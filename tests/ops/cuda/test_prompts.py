"""Several prompts in one pass: attention against that of each by itself, anywhere; their rows in caches on a GPU."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from runner.cache.kv import History
from runner.cache.storage import PLAIN
from runner.errors import UsageError
from runner.ops.cuda import prompts
from runner.ops.device import current
from runner.ops.side_by_side import append_rows
from runner.ops.table import PORTABLE

needs_gpu = pytest.mark.skipif(not current().compiles, reason="there is no kernel for this device")


def numbers(*shape: int, seed: int = 0, dtype: mx.Dtype = mx.float32) -> mx.array:
    return mx.array(np.random.default_rng(seed).standard_normal(shape).astype(np.float32)).astype(dtype)


def history(count: int, more: int = 0, window: int | None = None, seed: int = 0) -> History:
    """The rows of `count` new tokens, behind `more` older ones, in buffers with room behind them."""
    room = -(-(count + more + 128) // 64) * 64
    buffers = [
        mx.pad(numbers(1, 2, count + more, 16, seed=seed + i), [(0, 0)] * 2 + [(0, room), (0, 0)]) for i in (0, 1)
    ]
    return History(*buffers, count + more, window)


CASES: list[list[History]] = [
    [history(64, seed=1), history(64, seed=2), history(64, seed=3), history(64, seed=4)],
    [history(70, seed=1), history(128, seed=2)],  # filled up to 128
    [history(70, seed=1), history(128, seed=2), history(65, seed=3)],  # of which two are taken together
    [history(70, seed=1), history(200, seed=2), history(90, seed=3), history(193, seed=4)],  # two groups
    [history(100, seed=1), history(5, seed=2), history(100, seed=3), history(100, more=40, seed=4)],
    [history(100, window=50, seed=1), history(100, window=50, seed=2)],  # sees not all of itself
    [history(100, window=100, seed=1), history(100, window=100, seed=2)],
]


@pytest.mark.parametrize("case", range(len(CASES)))
@pytest.mark.parametrize("sinks", [False, True])
def test_attention_of_each(case: int, sinks: bool) -> None:
    histories = CASES[case]
    counts = [min(one.length, 100) if one.length == 140 else one.length for one in histories]
    query = numbers(1, 4, sum(counts), 16, seed=9)
    settings = {"scale": 0.25, "sinks": numbers(4, seed=5) if sinks else None}
    asked = []

    def others(*arguments: object, **options: object) -> mx.array:
        asked.append(arguments)
        found: mx.array = PORTABLE.attention_rows(*arguments, **options)
        return found

    want = PORTABLE.attention_rows(query, histories, counts, **settings)
    got = prompts.attention(others, query, histories, counts, **settings)
    assert got.shape == want.shape and np.allclose(np.array(got), np.array(want), atol=2e-6)
    assert len(asked) == (case in (2, 4, 5))


@pytest.mark.parametrize(
    ("count", "more", "window", "filled"),
    [(70, 0, None, 128), (100, 512, None, 640), (64, 0, None, 64), (70, 0, 80, 70)],
)
def test_a_piece_of_one_prompt(count: int, more: int, window: int | None, filled: int) -> None:
    one, query, lengths = history(count, more), numbers(1, 4, count, 16, seed=9), []

    def others(*arguments: object, **options: object) -> mx.array:
        lengths.append(options["length"])
        found: mx.array = PORTABLE.attention(*arguments, **options)
        return found

    settings = {"scale": 0.25, "window": window, "sinks": None, "length": one.length}
    want = PORTABLE.attention(query, one.stored_keys, one.stored_values, "causal", **settings)
    got = prompts.attention_of_one(others, query, one.stored_keys, one.stored_values, "causal", **settings)
    assert got.shape == want.shape and np.allclose(np.array(got), np.array(want), atol=2e-6) and lengths == [filled]


def test_attention_with_counts_that_do_not_fit() -> None:
    with pytest.raises(UsageError):
        prompts.attention(PORTABLE.attention_rows, numbers(1, 4, 100, 16), CASES[0], [64, 64, 64], scale=1.0)


@needs_gpu
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float32])
@pytest.mark.parametrize("counts", [[5, 300, 64], [32] * 8, [40, 1, 7, 256, 9, 10, 11, 12, 13, 14, 15], [9]])
def test_rows_in_new_buffers(counts: list[int], dtype: mx.Dtype) -> None:
    keys, values = numbers(1, 2, sum(counts), 64, dtype=dtype), numbers(1, 2, sum(counts), 128, seed=1, dtype=dtype)
    turned = keys.swapaxes(1, 2)[:, :, ::-1].swapaxes(1, 2)  # no array that lies as its rows do
    old = [[mx.full((1, 2, 512, width), 3.0, dtype) for width in (64, 128)] for _ in counts]
    at = [0 if index % 4 != 3 else 17 for index in range(len(counts))]
    buffers = [
        tuple(mx.zeros_like(one) if row == 0 else one for one in pair) for pair, row in zip(old, at, strict=True)
    ]
    want = append_rows([tuple(mx.array(one) for one in pair) for pair in buffers], turned, values, at, counts)  # type: ignore[misc]
    got = prompts.write_rows(buffers, turned, values, at, counts)  # type: ignore[arg-type]
    assert all(mx.array_equal(a, b).item() for x, y in zip(got, want, strict=True) for a, b in zip(x, y, strict=True))
    assert PLAIN.empty is current().ops.storage.empty
