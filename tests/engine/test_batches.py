"""Several requests in one pass: each gets what it gets alone, for every family."""

from __future__ import annotations

import random
from pathlib import Path

import mlx.core as mx
import pytest
from places import TESTS
from references import error, tolerance

from runner.cache.several import SeveralCaches
from runner.engine.loaded import Loaded, open_loaded
from runner.nn.batch import Batch, Segment
from runner.ops.device import current

FIXTURES = sorted(path.parent for path in TESTS.glob("fixtures/*/**/config.json"))
PASSES = ([1, 20, 12, 3], [0, 0, 1, 17], [0, 17, 0, 0], [1, 1, 1, 1], [1, 1, 0, 1])
"""How many tokens each request has in each pass: pieces of prompts, decoded tokens beside them, then only such.

The second is longer than the fixtures' windows and chunks, and its prompt takes two passes.
"""


def prompts() -> list[list[int]]:
    """The tokens of each request, as many as `PASSES` feed."""
    draw = random.Random(7)
    return [[1 + draw.randrange(29) for _ in range(sum(counts))] for counts in zip(*PASSES, strict=True)]


def alone(engine: Loaded, ids: list[int], counts: list[int]) -> mx.array:
    """Logits `[T, V]` of one request, by passes of its own."""
    caches, rows = engine.new_caches(), []
    for start, count, length in pieces(counts):
        batch = Batch(mx.array([ids[start : start + count]]), start, length)
        rows.append(engine.model.logits(engine.model(batch, caches))[0])
        mx.eval(rows[-1])
    return mx.concatenate(rows).astype(mx.float32)


def pieces(counts: list[int]) -> list[tuple[int, int, int | None]]:
    """Start, count and length of the whole prompt of each piece: what is longer than a token is a prompt's."""
    starts = [sum(counts[:i]) for i in range(len(counts))]
    read = max((start + count for start, count in zip(starts, counts, strict=True) if count > 1), default=0)
    return [(s, c, read if s < read else None) for s, c in zip(starts, counts, strict=True) if c]


def together(engine: Loaded, prompts: list[list[int]]) -> list[mx.array]:
    """Logits `[T, V]` of each request, by passes that they share."""
    caches = [engine.new_caches() for _ in prompts]
    rows: list[list[mx.array]] = [[] for _ in prompts]
    waiting = [pieces([counts[index] for counts in PASSES]) for index in range(len(prompts))]
    for counts in PASSES:
        taking = [index for index, count in enumerate(counts) if count]
        parts = [waiting[index].pop(0) for index in taking]
        ids: list[int] = []
        for index, (start, count, _) in zip(taking, parts, strict=True):
            ids += prompts[index][start : start + count]
        batch = Batch.of(mx.array([ids]), [Segment(count, start, length) for start, count, length in parts])
        hidden = engine.model(batch, SeveralCaches([caches[index] for index in taking], [c for c in counts if c]))
        for index, logits in zip(taking, batch.split(engine.model.logits(hidden)), strict=True):
            rows[index].append(logits[0])
        mx.eval([row[-1] for row in rows if row])
    return [mx.concatenate(row).astype(mx.float32) for row in rows]


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.name)
def test_every_fixture(path: Path) -> None:
    engine = open_loaded(path, dtype="float32")
    for index, (ids, found) in enumerate(zip(prompts(), together(engine, prompts()), strict=True)):
        wanted = alone(engine, ids, [counts[index] for counts in PASSES])
        if current().ops.one_form:
            assert mx.array_equal(found, wanted), index
        else:
            assert error(found, wanted) < tolerance(path), index
