"""All kinds of memory under random schedules: cut, taken back, marked and come back to, each is as if never fed."""

from __future__ import annotations

import dataclasses
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_memories import CHUNK, KINDS, WINDOW, feed, fresh, row, shown

from runner.cache.caches import Caches, SharedCache, agreeing
from runner.cache.kv import KVCache
from runner.cache.mark import Edge, Marks
from runner.cache.recurrent import StateCache
from runner.cache.several import SeveralCaches
from runner.cache.storage import PLAIN, Storage
from runner.config.memory import Rows, State, needed
from runner.errors import UsageError
from runner.ops.side_by_side import append_rows

by_kind = pytest.mark.parametrize("kind", KINDS)


@by_kind
@given(st.lists(st.integers(1, 9), min_size=1, max_size=12))
@settings(max_examples=20, deadline=None)
def test_appended_in_any_cut_is_appended_at_once(kind: str, cuts: list[int]) -> None:
    kinds, caches, tokens = KINDS[kind], Caches.of(KINDS[kind]), list(range(1, sum(cuts) + 1))
    start = 0
    for cut in cuts:
        feed(caches, kinds, tokens[start : start + cut])
        start += cut
    assert shown(caches, kinds) == fresh(kinds, tokens)


STEPS = st.one_of(
    st.tuples(st.just("feed"), st.integers(1, 9)),
    st.tuples(st.just("speculate"), st.tuples(st.integers(1, 6), st.integers(0, 6))),
    st.tuples(st.just("mark"), st.none()),
    st.tuples(st.just("rewind"), st.integers(0, 60)),
)


@by_kind
@given(st.lists(STEPS, min_size=1, max_size=14))
@settings(max_examples=60, deadline=None)
def test_what_was_taken_back_was_never_fed(kind: str, steps: list[tuple[str, Any]]) -> None:
    """Fed, speculated, marked and gone back in any order; `reach` never promises what `rewind` does not do."""
    kinds, caches = KINDS[kind], Caches.of(KINDS[kind])
    tokens: list[int] = []
    marks: list[Marks] = []
    kept: list[tuple[Marks, Edge, list[int]]] = []
    number = 0
    for step, argument in steps:
        if step == "feed":
            new = list(range(number + 1, number + argument + 1))
            number += argument
            feed(caches, kinds, new)
            tokens = tokens + new
        elif step == "speculate":
            count, accepted = argument[0], min(argument)
            caches.reserve(count)
            new = list(range(number + 1, number + count + 1))
            number += count
            feed(caches, kinds, new)
            place = len(tokens) + accepted
            assert caches.reach(place) == place  # any tail of a reserved pass can be taken back
            caches.rewind(place)
            tokens = tokens + new[:accepted]
        elif step == "mark":
            marks.append(caches.mark())
            kept.append((marks[-1], caches.rows(0, len(tokens)).copied(), tokens))
        else:
            wanted = min(argument, len(tokens))
            place = caches.reach(wanted, marks)
            assert 0 <= place <= wanted
            assert place >= max((m.offset for m in marks if m.offset <= wanted), default=0)
            caches.rewind(place, marks)
            tokens = tokens[:place]
            marks = [m for m in marks if m.offset <= place]
        assert caches.offset == len(tokens) and {cache.offset for cache in caches} == {len(tokens)}
    feed(caches, kinds, [77])
    assert shown(caches, kinds) == fresh(kinds, [*tokens, 77])
    # What was kept on the way is as it was, whatever was written since; other caches can begin with it.
    for place, edge, then in kept:
        other = Caches.of(kinds)
        if then:
            half = len(then) // 2
            other.hold([edge.part(0, half), edge.part(half, len(then))], place)
        feed(other, kinds, [78, 79])
        assert shown(other, kinds) == fresh(kinds, [*then, 78, 79])


@pytest.mark.parametrize("kind", ["rows", "window", "chunk", "latent", "joined"])
@pytest.mark.parametrize(
    "storage", [PLAIN, dataclasses.replace(PLAIN, write_rows=append_rows)], ids=["apart", "at once"]
)
def test_rows_of_several_sequences_are_those_of_each(kind: str, storage: Storage) -> None:
    """Written one by one, or at once as on NVIDIA GPUs; each of them was alone before, or comes alone afterwards."""
    kinds, lines = KINDS[kind], [[8, 9], [5], list[int]()]
    each = [Caches.of(kinds, storage) for _ in lines]
    for caches, tokens in zip(each, lines, strict=True):
        if tokens:
            feed(caches, kinds, tokens)
    for parts in ([[1, 2, 3], [4], [5, 6]], [[7], [8], [9]], [list(range(10, 22)), [1], [2, 3]]):
        several, new = SeveralCaches(each, [len(part) for part in parts]), sum(parts, list[int]())
        for layer, (memory,) in zip(several.layers, kinds, strict=True):
            assert isinstance(memory, Rows)
            rows = (row(new, memory.heads, memory.key_size), -row(new, memory.heads, memory.value_size))
            assert len(layer.append(*rows).each) == len(each)
        lines = [[*line, *part] for line, part in zip(lines, parts, strict=True)]
        assert [shown(caches, kinds) for caches in each] == [fresh(kinds, line) for line in lines]
    for caches, line in zip(each, lines, strict=True):
        feed(caches, kinds, [77])
        assert shown(caches, kinds) == fresh(kinds, [*line, 77])


def test_rows_of_int16_are_held_together_where_their_powers_are_equal() -> None:
    rows = mx.concatenate([mx.ones((1, 1, 5, 4)), mx.full((1, 1, 1, 4), 2)], axis=2).astype(mx.int16)
    one, other = (Edge(0, 5, ({"keys": rows, "values": rows + added},)) for added in (0, 1))
    assert agreeing([one]) == 1 and agreeing([one, one.part(2, 4).copied(), other, one]) == 2
    plain = Edge(0, 6, ({"keys": rows.astype(mx.float32), "values": rows.astype(mx.bfloat16)},))
    assert agreeing([plain, Edge(0, 6, ({"keys": rows * 2.0, "values": rows * 3.0},))]) == 2


def test_a_recurrent_pass_can_be_taken_back_as_a_whole_but_not_in_part() -> None:
    """The token that was computed one ahead when an answer stops: no mark is needed for it."""
    kinds = KINDS["hybrid"]
    caches = Caches.of(kinds)
    feed(caches, kinds, [1, 2, 3, 4])
    feed(caches, kinds, [5])
    assert caches.reach(4) == 4
    caches.rewind(4)
    feed(caches, kinds, [6])
    assert shown(caches, kinds) == fresh(kinds, [1, 2, 3, 4, 6])
    assert caches.reach(2) == 0  # inside the first pass: rows could be cut there, the state could not


def test_marks_bring_back_windows_and_states() -> None:
    kinds = [(Rows(2, 4, 4, window=WINDOW),), (State({"sum": (3,), "last": (2, 3)}, {}),), (Rows(2, 4, 4),)]
    caches = Caches.of(kinds)
    feed(caches, kinds, list(range(40)))
    marks = [caches.mark()]
    for token in range(600):  # the window's buffer moves on
        feed(caches, kinds, [token])
    assert caches.reach(639, marks) == 639 and caches.reach(300, marks) == 40 and caches.reach(39, marks) == 0
    caches.rewind(40, marks)
    feed(caches, kinds, [50, 51])
    assert shown(caches, kinds) == fresh(kinds, [*range(40), 50, 51])
    assert marks[0].nbytes == 2 * (WINDOW - 1) * 2 * 4 * 4 + (3 + 6) * 4  # rows of full attention cost nothing


def test_the_start_of_a_chunk_needs_no_mark() -> None:
    kinds = KINDS["chunk"]
    caches = Caches.of(kinds)
    for token in range(40):
        feed(caches, kinds, [token])
    assert caches.reach(37) == 37 and caches.reach(34) == 28  # 35 is where the newest chunk starts
    caches.rewind(28)
    feed(caches, kinds, [50, 51])
    assert shown(caches, kinds) == fresh(kinds, [*range(28), 50, 51])
    assert caches[0].room == CHUNK - 2 and caches[0].bytes_read(30) == 2 * 2 * 2 * 4 * 4


def test_a_sharer_sees_the_whole_pass_of_its_owner() -> None:
    caches = Caches.of(KINDS["shared"])
    feed(caches, KINDS["shared"], [1, 2, 3])
    sharer = caches.layers[3]
    assert isinstance(sharer, SharedCache) and sharer.history is caches.layers[0].history and len(caches) == 2
    ahead = caches.ahead(1)
    assert ahead.layers[3].owner is ahead.layers[0] is not caches.layers[0]
    with pytest.raises(UsageError, match="came before it"):
        Caches.of(KINDS["shared"]).layers[2].history  # noqa: B018


def test_a_reserved_pass_has_the_reserved_length() -> None:
    cache = StateCache(State({"sum": (3,)}, {}))
    cache.reserve(2)
    with pytest.raises(UsageError, match="2 tokens was reserved, not one of 3"):
        cache.write(3, sum=mx.zeros((3, 1, 3)))


def test_bytes_are_counted_from_data_alone() -> None:
    memories = [memory for layer in KINDS["shared"] for memory in layer] + [
        State({"a": (2, 3), "b": (5,)}, {"a": "float32"})
    ]
    rows, window = 2 * (4 + 4), 2 * (4 + 4) * WINDOW
    assert needed([Rows(2, 4, 4, chunk=CHUNK)], 100, 2) == rows * CHUNK * 2
    assert needed(memories, 100, 2) == (100 * rows + window) * 2 + 6 * 4 + 5 * 2


def test_states_keep_their_own_dtype() -> None:
    cache = StateCache(State({"sum": (3,), "rows": (2, 4)}, {"sum": "float32"}))
    states = cache.read(mx.zeros((2, 1), dtype=mx.bfloat16))
    assert states["sum"].dtype == mx.float32 and states["rows"].dtype == mx.bfloat16
    assert states["sum"].shape == (2, 3) and states["rows"].shape == (2, 2, 4)


def test_only_rows_need_no_marks() -> None:
    assert not Caches.of(KINDS["rows"]).needs_marks and not Caches.of(KINDS["latent"]).needs_marks
    assert all(
        Caches.of(KINDS[kind]).needs_marks
        for kind in ("window", "chunk", "shared", "state", "hybrid", "both in a layer")
    )
    assert isinstance(Caches.of(KINDS["rows"]).layers[0], KVCache)
