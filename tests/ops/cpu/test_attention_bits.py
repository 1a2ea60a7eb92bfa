"""A row's bits are its own: whatever stands beside it, however the work is cut, and on any number of threads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from instruction_sets import available
from twins import attention, numpy, rand

from runner.cache.kv import History
from runner.ops import cpu as kernels
from runner.ops.cpu import _C
from runner.ops.cpu.ops import DENSE, KERNELS

LEVELS = available()[1:]
KEPT = ["int16", "float32", "float16", "bfloat16"]
BAD = [float("nan"), float("inf"), -float("inf"), 1e30]


@contextmanager
def machine(level: str, threads: int = 2) -> Iterator[None]:
    best, before = _C.isa(), _C.num_threads()
    assert _C.set_isa(level)
    _C.set_num_threads(threads)
    yield
    _C.set_isa(best)
    _C.set_num_threads(before)


def stored(rows: mx.array, kept: str) -> Any:
    """A cache's buffer of the rows, with room for three more that hold what is no number."""
    if kept != "int16":
        spare = mx.full((*rows.shape[:2], 3, rows.shape[3]), float("nan"))
        return mx.concatenate([rows, spare], axis=2).astype(getattr(mx, kept))
    powers = mx.zeros((rows.shape[1], rows.shape[3]), dtype=mx.int16)
    powers[:, ::3] = 2
    buffer = kernels.empty((*rows.shape[:2], rows.shape[2] + 4, rows.shape[3] + 2), mx.int16, powers)
    return kernels.append(buffer, mx.array(buffer), rows, rows, 0)[0]


def case(draw: Any) -> dict[str, Any]:
    rows = draw(st.one_of(st.integers(1, 8), st.integers(9, 70)))
    keys = rows + draw(st.sampled_from([0, 1, 5, 63, 64, 130, 700]))
    window = draw(st.one_of(st.none(), st.integers(1, keys)))
    return {
        "level": draw(st.sampled_from(LEVELS)),
        "kv": draw(st.integers(1, 3)),
        "group": draw(st.integers(1, 5)),
        "rows": rows,
        "keys": keys,
        "sizes": (draw(st.sampled_from([1, 8, 20, 64, 80])), draw(st.sampled_from([3, 16, 64]))),
        "kept": draw(st.sampled_from(KEPT)),
        "window": window,
        "start": 0 if window is None else draw(st.integers(0, 600)),
        "masked": window is None and draw(st.booleans()),
        "softcap": draw(st.sampled_from([None, 1.5])),
        "sinks": draw(st.booleans()),
        "bad": draw(st.sampled_from(BAD)),
        "seed": draw(st.integers(0, 99)),
    }


@settings(max_examples=60, deadline=None)
@given(st.composite(case)())
def test_attention(case: dict[str, Any]) -> None:
    """A prompt at once, and each of its queries alone: over a cache that has forgotten what is behind the window, on
    one thread, while keys that it does not see and queries beside it are no numbers.
    """
    kv, group, rows, keys, seed = (case[name] for name in ("kv", "group", "rows", "keys", "seed"))
    wide, narrow = case["sizes"]
    q = rand(1, kv * group, rows, wide, seed=seed)
    k, v = rand(1, kv, keys, wide, seed=seed + 1), rand(1, kv, keys, narrow, seed=seed + 2)
    sinks = rand(kv * group, seed=seed + 3) if case["sinks"] else None
    rule: dict[str, Any] = {"scale": 0.3, "sinks": sinks, "softcap": case["softcap"], "window": case["window"]}
    visible = np.tri(keys, keys, dtype=bool)[keys - rows :]
    if case["masked"]:
        visible = visible & (np.random.default_rng(seed).random((rows, keys)) < 0.7)
        visible[:, 0] = True
        rule["mask"] = mx.array(visible)
    else:
        rule["mask"] = "causal"
    if case["window"] is not None:
        visible = visible & ~np.tri(keys, keys, -case["window"], dtype=bool)[keys - rows :]
    with machine(case["level"]):
        whole = kernels.attention(
            q, stored(k, case["kept"]), stored(v, case["kept"]), length=keys, start=case["start"], **rule
        )
        mx.eval(whole)
    for row in {0, rows // 2, rows - 1}:
        end = keys - rows + row + 1
        first = 0 if case["window"] is None else max(0, end - case["window"])
        # What the row does not see: keys before its window, masked ones, and any number of later ones.
        unseen = mx.array(~visible[row, first:end])[:, None]
        alone = [mx.where(unseen, case["bad"], part[:, :, first:end]) for part in (k, v)]
        later = [mx.concatenate([part, mx.full((1, kv, 2, part.shape[3]), case["bad"])], axis=2) for part in alone]
        query = mx.concatenate([q[:, :, row : row + 1]] + [mx.full((1, kv * group, 1, wide), case["bad"])] * 2, axis=2)
        mask = rule["mask"]
        if case["masked"]:
            mask = mx.pad(mx.array(visible[row : row + 1, first:end]), [(0, 2), (0, 2)])
        with machine(case["level"], threads=1):
            found = kernels.attention(
                query, *(stored(part, case["kept"]) for part in later),
                length=end - first + 2, start=case["start"] + first, **{**rule, "mask": mask},
            )  # fmt: skip
            assert mx.array_equal(found[:, :, :1], whole[:, :, row : row + 1]), row
    naive = numpy(whole)
    number = [numpy(DENSE.read(stored(part, case["kept"]), keys)) for part in (k, v)]
    wanted = attention(
        numpy(q), *number, scale=0.3, visible=visible, sinks=None if sinks is None else numpy(sinks),
        softcap=case["softcap"],
    )  # fmt: skip
    assert np.abs(naive - wanted).max() < 3e-5


@settings(max_examples=40, deadline=None)
@given(st.composite(case)(), st.lists(st.tuples(st.integers(1, 9), st.integers(0, 200)), min_size=1, max_size=5))
def test_several_sequences(case: dict[str, Any], sizes: list[tuple[int, int]]) -> None:
    """Attention and positions of several sequences side by side are those of each alone; chunks are masks."""
    kv, group, (wide, narrow) = case["kv"], case["group"], case["sizes"]
    counts = [count for count, _ in sizes]
    q = rand(1, kv * group, sum(counts), wide, seed=case["seed"])
    sinks = rand(kv * group, seed=7) if case["sinks"] else None
    histories = []
    for index, (count, before) in enumerate(sizes):
        k, v = (rand(1, kv, count + before, size, seed=index + 9) for size in (wide, narrow))
        kinds = [{"window": case["window"], "start": case["start"]}, {"chunk": 64}, {}]
        kept = [stored(rows, case["kept"]) for rows in (k, v)]
        histories.append(History(*kept, count + before, storage=DENSE, **kinds[index % 3]))
    with machine(case["level"]):
        found = KERNELS.attention_rows(q, histories, counts, scale=0.3, sinks=sinks, softcap=case["softcap"])
        mx.eval(found)
    first = 0
    with machine(case["level"], threads=1):
        for history, count in zip(histories, counts, strict=True):
            own = q[:, :, first : first + count]
            mask: Any = "causal"
            if history.chunk is not None:
                place = np.arange(history.length)
                same = place[:, None] // 64 == place[None] // 64
                mask = mx.array((same & np.tri(history.length, dtype=bool))[-count:])
            alone = kernels.attention(
                own, history.stored_keys, history.stored_values, length=history.length, start=history.start,
                window=history.window, mask=mask, scale=0.3, sinks=sinks, softcap=case["softcap"],
            )  # fmt: skip
            assert mx.array_equal(found[:, :, first : first + count], alone)
            first += count


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(LEVELS), st.lists(st.integers(1, 9), min_size=1, max_size=6), st.sampled_from(KEPT),
    st.integers(1, 70), st.sampled_from(BAD), st.integers(0, 99),
)  # fmt: skip
def test_rows_of_a_cache(level: str, counts: list[int], kept: str, dim: int, bad: float, seed: int) -> None:
    """Rows are the same bits whether they are written at once, in pieces beside a bad one, or into several buffers."""
    k = rand(1, 2, sum(counts), dim, seed=seed)
    with machine(level, threads=1):
        whole = stored(k, kept)
        parts, side_by_side, at = [stored(k, kept) for _ in range(2)], [], 0
        for count in counts:
            piece = mx.concatenate([k[:, :, at : at + count], mx.full((1, 2, 1, dim), bad)], axis=2)
            parts = list(kernels.append(*parts, piece, piece, at))
            side_by_side.append((stored(k[:, :, :1] * mx.ones((1, 1, 9, 1)), kept),) * 2)
            side_by_side[-1] = tuple(mx.array(buffer) for buffer in side_by_side[-1])
            at += count
        assert mx.array_equal(parts[0][:, :, :at].view(mx.int16), whole[:, :, :at].view(mx.int16))
        written = kernels.append_rows(side_by_side, k, k, [0] * len(counts), counts)
        at = 0
        for pair, count in zip(written, counts, strict=True):
            for buffer in pair:
                rows = whole[:, :, at : at + count]
                assert mx.array_equal(buffer[:, :, :count].view(mx.int16), rows.view(mx.int16))
            at += count


@pytest.mark.parametrize("level", LEVELS)
def test_a_recorded_step_of_several_sequences(level: str) -> None:
    """All rows of a step advance by one: it can be recorded, and replayed."""
    lengths, heads, dim = [3, 70, 11], 4, 16
    table = rand(5, heads * dim, seed=1)
    before = [(rand(1, 2, length, dim, seed=length), rand(1, 2, length, dim, seed=99 + length)) for length in lengths]

    def buffers() -> list[tuple[mx.array, mx.array]]:
        made = [tuple(mx.concatenate([x, mx.zeros((1, 2, 8, dim))], axis=2) for x in pair) for pair in before]
        mx.eval(made)
        return made

    def step(ids: mx.array, pairs: list[tuple[mx.array, mx.array]], ahead: int) -> tuple[mx.array, Any]:
        x = kernels.embed(ids, table, mx.float32).reshape(1, 3, heads, dim).swapaxes(1, 2)
        places = tuple(length + ahead for length in lengths)
        x = kernels.rope(x, places, dims=dim, base=100.0)
        k = x[:, :2]
        pairs = KERNELS.append_rows(pairs, k, k, list(places), [1, 1, 1])
        seen = [History(*pair, place + 1) for pair, place in zip(pairs, places, strict=True)]
        # Heads of a position lie side by side, as `merge_heads` wants them: no copy, which could not be recorded.
        return KERNELS.attention_rows(x, seen, [1, 1, 1], scale=0.3).swapaxes(1, 2).reshape(1, -1), pairs

    ids = [mx.array([[i % 5, (i + 2) % 5, (2 * i) % 5]], dtype=mx.int32) for i in range(6)]
    with machine(level):
        pairs, wanted = buffers(), []
        for ahead, token in enumerate(ids):
            out, pairs = step(token, pairs, ahead)
            wanted.append(np.array(out))
        again, slot = buffers(), _C.slot([1, 3])
        program = _C.record(slot, [step(slot, again, ahead)[0] for ahead in (0, 1, 5)], [0, 1, 5], [])
        assert program is not None
        for token, want in zip(ids, wanted, strict=True):
            assert np.array_equal(np.array(program.run(token)), want)
