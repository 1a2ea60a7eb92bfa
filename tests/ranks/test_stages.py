"""Which layers each rank of a pipeline has."""

from __future__ import annotations

import itertools
import random

import pytest

from runner.config.memory import Memory, Rows, Shared
from runner.errors import UsageError
from runner.nn.stages import shared_out

ROWS: tuple[Memory, ...] = (Rows(1, 8, 8),)


def by_trying_all(
    layers: list[int], memories: list[tuple[Memory, ...]], first: int, every: int, shares: list[float]
) -> float | None:
    """The fullest rank's fullness, of the best of all ways to cut."""
    best = None
    for cuts in itertools.combinations(range(1, len(layers)), len(shares) - 1):
        spans = [range(a, b) for a, b in itertools.pairwise([0, *cuts, len(layers)])]
        looks = all(m.layer in span for span in spans for i in span for m in memories[i] if isinstance(m, Shared))
        remembers = all(any(not isinstance(m, Shared) for i in span for m in memories[i]) for span in spans)
        if looks and remembers:
            value = fullness(layers, spans, first, every, shares)
            best = value if best is None else min(best, value)
    return best


def fullness(layers: list[int], spans: list[range], first: int, every: int, shares: list[float]) -> float:
    return max(
        (sum(layers[i] for i in span) + (every if rank else first)) / shares[rank] for rank, span in enumerate(spans)
    )


def test_a_larger_machine_has_more_layers() -> None:
    assert shared_out([10] * 8, [ROWS] * 8, 0, 0, [2, 1, 1]) == [range(0, 4), range(4, 6), range(6, 8)]
    assert shared_out([10] * 8, [ROWS] * 8, 40, 0, [1, 1]) == [range(0, 2), range(2, 8)]


def test_no_way_to_cut_is_better() -> None:
    draw = random.Random(0)
    refused = 0
    for _ in range(300):
        count, ranks = draw.randint(1, 8), draw.randint(2, 4)
        layers = [draw.randint(1, 50) for _ in range(count)]
        memories: list[tuple[Memory, ...]] = []
        for index in range(count):
            owners = [i for i in range(index) if memories[i] == ROWS]
            options: list[tuple[Memory, ...]] = [ROWS, ROWS, (), *([(Shared(draw.choice(owners)),)] if owners else [])]
            memories.append(draw.choice(options))
        first, every = draw.randint(0, 60), draw.randint(0, 10)
        shares = [float(draw.randint(1, 3)) for _ in range(ranks)]
        wanted = by_trying_all(layers, memories, first, every, shares)
        if wanted is None:
            refused += 1
            with pytest.raises(UsageError, match="cannot be shared out"):
                shared_out(layers, memories, first, every, shares)
            continue
        spans = shared_out(layers, memories, first, every, shares)
        assert [i for span in spans for i in span] == list(range(count))
        assert fullness(layers, spans, first, every, shares) == wanted
    assert 30 < refused < 270
