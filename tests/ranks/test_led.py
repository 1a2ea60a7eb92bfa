"""What rank 0 says to the others, and what it makes of their answers; the others are lists here."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, TypeVar

import mlx.core as mx
import pytest
from places import TESTS
from toy_memories import KINDS, feed

from runner.cache.caches import Caches
from runner.cache.mark import Edge
from runner.cache.several import Memories
from runner.engine.budget import SHARE
from runner.engine.loaded import open_loaded
from runner.errors import UsageError
from runner.nn.batch import Batch, Segment
from runner.ranks.led import LedCaches
from runner.ranks.link import Message
from runner.ranks.part import least_room, room_beside
from runner.ranks.passes import batch_of, described

T = TypeVar("T")


@dataclass
class Voice:
    """Notes what the others are told, and answers as they would: each rank can be at certain places only."""

    places: list[set[int]]
    told: list[Message] = field(default_factory=list)
    count: int = 0

    def named(self, make: Callable[[int], T]) -> T:
        self.count += 1
        return make(self.count)

    def tell(self, **message: Any) -> None:
        self.told.append(message)

    def answers(self) -> list[Message]:
        asked = self.told[-1]["offset"]
        return [{"offset": max(place for place in own if place <= asked)} for own in self.places]

    def passed(self, batch: Batch, caches: Memories) -> Batch:
        raise AssertionError

    def there(self, hidden: mx.array) -> mx.array:
        raise AssertionError

    def asked(self, hidden: mx.array) -> mx.array:
        raise AssertionError


def led(kind: str, voice: Voice, *, alike: bool = False) -> LedCaches:
    memories = KINDS[kind]
    return LedCaches(Caches.of(memories), memories, voice, 7, alike=alike)


def test_all_go_to_a_place_where_each_rank_can_be() -> None:
    voice = Voice([{0, 3, 6, 9}, {0, 2, 3, 5, 9}])
    caches = led("hybrid", voice)
    marks = []
    for token in range(10):
        feed(caches, KINDS["hybrid"], [token])
        if token in (2, 5):
            marks.append(caches.mark())
    # Rank 0 could be at 6, by its mark, and so could one of the others; the other one at 5, where rank 0 could not.
    assert caches.reach(8, marks) == 3
    numbers = [mark.name for mark in marks]
    asked = [one for one in voice.told if one["do"] == "reach"]
    assert [one["offset"] for one in asked] == [6, 3] and all(one["marks"] == numbers for one in asked)
    caches.rewind(3, marks)
    assert voice.told[-1] == {"do": "rewind", "caches": 7, "offset": 3, "marks": numbers} and caches.offset == 3


def test_nobody_is_asked_where_all_remember_alike() -> None:
    voice = Voice([])
    caches = led("rows", voice)
    feed(caches, KINDS["rows"], list(range(10)))
    assert caches.reach(8) == 8 and [one["do"] for one in voice.told] == ["new"]
    voice = Voice([])
    caches = led("hybrid", voice, alike=True)
    feed(caches, KINDS["hybrid"], list(range(10)))
    assert caches.reach(8) == 0 and [one["do"] for one in voice.told] == ["new"]


def test_rows_are_told_with_their_places() -> None:
    voice = Voice([])
    caches = led("rows", voice)
    feed(caches, KINDS["rows"], list(range(10)))
    edge = caches.rows(2, 8)
    part = edge.part(3, 6)
    joined = part.joined([edge.part(6, 8)])
    assert [(one.first, one.last) for one in (edge, part, joined)] == [(2, 8), (3, 6), (3, 8)]
    other = led("rows", voice)
    other.hold([joined])
    assert voice.told[1:] == [
        {"do": "rows", "made": 1, "caches": 7, "first": 2, "last": 8},
        {"do": "part", "made": 2, "edge": 1, "first": 3, "last": 6},
        {"do": "part", "made": 3, "edge": 1, "first": 6, "last": 8},
        {"do": "joined", "made": 4, "edge": 2, "others": [3]},
        {"do": "new", "caches": 7},
        {"do": "hold", "caches": 7, "edges": [4], "marks": []},
    ]
    with pytest.raises(AssertionError, match="of one process alone"):
        caches.hold([Edge(0, 1, ())])


@pytest.mark.parametrize(
    "batch",
    [
        Batch(mx.array([[1, 2, 3]]), 4, 9),
        Batch(mx.array([[1]]), 4),
        Batch.of(mx.array([[1, 2, 3, 4]]), [Segment(3, 5, 11), Segment(1, 8)]),
    ],
)
def test_a_pass_is_the_same_for_all(batch: Batch) -> None:
    message = json.loads(json.dumps(described(batch)))
    other = batch_of(message, mx.zeros(message["shape"], mx.int32))
    assert other.ids.shape == batch.ids.shape
    for name in ("offset", "length", "segments", "mask"):
        assert getattr(other, name) == getattr(batch, name), name


def test_what_has_no_words_is_refused() -> None:
    for batch in (Batch(mx.array([[1]]), mx.array([1])), Batch(mx.array([[1]]), mask=mx.ones((1, 1)))):
        with pytest.raises(UsageError, match="a mask or with offsets of its own"):
            described(batch)


def test_requests_have_room_on_every_rank() -> None:
    """Rank 1 keeps three times as much of each token as rank 0, in memory that is half full of weights."""
    memory = 8000
    one = {"available": memory, "loaded": 2000, "caches": [30, 300]}
    other = {"available": None, "loaded": 100, "caches": [10, 100]}
    assert room_beside(10_000, one, [10, 100]) == int((int(memory * SHARE) - 2000) / 3)
    assert room_beside(10_000, other, [10, 100]) == 9900  # what the machine has, its system does not say
    ranks = [("rank 1", one), ("rank 2", other)]
    assert least_room(10_000, 9000, [10, 100], ranks) == least_room(10_000, 9000, [10, 100], ranks[:1])
    assert least_room(10_000, 9000, [10, 100], ranks[:1]) == room_beside(10_000, one, [10, 100]) < 9000
    assert least_room(10_000, 20, [10, 100], ranks) == 20
    with pytest.raises(UsageError, match="rank 1 has no memory beside its weights"):
        least_room(1900, 9000, [10, 100], ranks)


def test_a_model_of_a_run_that_is_over_is_closed_without_a_call_of_mlx(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLX waits for a ring that is broken and holds up all threads, also the one that says which rank was lost."""
    loaded = open_loaded(TESTS / "fixtures" / "llama" / "llama-gqa")
    called: list[str] = []
    monkeypatch.setattr("runner.engine.loaded.mx.clear_cache", lambda: called.append("clear_cache"))
    loaded.part = SimpleNamespace(over=True)  # type: ignore[assignment]
    loaded.close()
    assert loaded.closed and not called
