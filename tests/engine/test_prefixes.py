"""Prefixes of any conversations, kept, cut, copied and let go in any order, hold what was computed for their ids.

The twin of every sequence is the list of its ids, read by empty caches.
"""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from toy_memories import KINDS, feed, fresh, shown

from runner.cache.caches import Caches
from runner.cache.mark import Edge
from runner.engine.prefix_files import PrefixFiles
from runner.engine.prefix_tree import Kept, Node, alike
from runner.engine.prefixes import Oldest, Prefixes
from runner.ops.device import current

IDS = st.lists(st.integers(1, 3), max_size=12)


@dataclass(eq=False)
class Holder:
    """A request that uses caches: its ids, prompt and answer, and how many of them were fed."""

    kept: Kept
    ids: list[int]
    prompt: int
    fed: int = field(init=False)

    def __post_init__(self) -> None:
        self.fed = self.kept.reused


class Chats(RuleBasedStateMachine):
    """Requests that begin, read, answer, end, fail and are cancelled side by side, over one kind of memory."""

    kind = "rows"

    @initialize(budget=st.sampled_from([900, 20_000, 1 << 30]), disk=st.sampled_from([None, None, 40_000, 1 << 30]))
    def start(self, budget: int, disk: int | None) -> None:
        self.memories, self.budget, self.disk = KINDS[self.kind], budget, disk
        self.directory = tempfile.TemporaryDirectory()
        self.open()

    def open(self) -> None:
        # The device's own operation writes in place, whoever else holds the buffer.
        new = functools.partial(Caches.of, self.memories, current().ops.storage)
        place = Path(self.directory.name) / "kept"
        self.files = None if self.disk is None else PrefixFiles(place, self.disk, "0" * 64, new())
        self.prefixes = Prefixes(new, self.budget, self.files)
        self.holders: list[Holder] = []
        self.said: list[list[int]] = [[]]
        self.kept_ids: list[list[int]] = []  # that were given back
        self.read = 0

    def feed(self, holder: Holder, count: int) -> None:
        feed(holder.kept.caches, self.memories, holder.ids[holder.fed : holder.fed + count])
        holder.fed += count
        if holder.fed <= holder.prompt:
            self.read += count

    @rule(data=st.data(), tail=IDS, key=st.sampled_from("aab"), turns=st.sets(st.integers(1, 30), max_size=2))
    def begin(self, data: st.DataObject, tail: list[int], key: str, turns: set[int]) -> None:
        known = data.draw(st.sampled_from(self.said))
        ids = [*known[: data.draw(st.integers(0, len(known)))], *tail, data.draw(st.integers(1, 3))]
        # A key is a part of what is computed: here of the ids, so that rows of another would be seen.
        ids = [token + 10 * (key == "b") for token in ids]
        kept = self.prefixes.take(ids, key, turns)
        assert kept.reused == kept.caches.offset < len(ids)
        if (
            not kept.caches.needs_marks and self.budget > 1 << 16 and self.disk is None
        ):  # all that was ever read, but for what failed
            others = [*self.kept_ids, *(holder.ids[: min(holder.fed, holder.prompt)] for holder in self.holders)]
            assert kept.reused == max(alike(other, ids[:-1], 0) for other in [[], *others])
        self.holders.append(Holder(kept, ids, len(ids)))

    @precondition(lambda self: self.holders)
    @rule(data=st.data(), count=st.integers(1, 9))
    def go_on(self, data: st.DataObject, count: int) -> None:
        holder = data.draw(st.sampled_from(self.holders))
        left = holder.prompt - holder.fed
        if left > 0:
            stops = [place - holder.fed for place in holder.kept.places if place > holder.fed]
            self.feed(holder, min([count, left, *stops]))
            if holder.fed in holder.kept.places:
                self.prefixes.mark(holder.kept)
        else:
            holder.ids.append(holder.ids[0] // 10 * 10 + count % 3 + 1)
            self.feed(holder, 1)

    @precondition(lambda self: self.holders)
    @rule(data=st.data(), unseen=st.booleans())
    def end(self, data: st.DataObject, unseen: bool) -> None:
        """At the end of an answer, or wherever it was cancelled; a token may have been fed that nobody saw."""
        holder = data.draw(st.sampled_from(self.holders))
        self.holders.remove(holder)
        if holder.fed > holder.kept.reused:
            assert shown(holder.kept.caches, self.memories) == fresh(self.memories, holder.ids[: holder.fed])
        ids = holder.ids
        if unseen and holder.fed == len(ids) > holder.prompt:
            ids = ids[:-1]
        self.said.append([token % 10 for token in ids])
        self.kept_ids.append(ids[: holder.fed])
        self.prefixes.give(holder.kept, ids)

    @precondition(lambda self: self.holders and self.budget < 1 << 16)
    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        holder = data.draw(st.sampled_from(self.holders))
        self.holders.remove(holder)
        for cache in holder.kept.caches[: len(holder.kept.caches) // 2 + 1]:
            cache.go_back(0)  # layers have come apart
        self.prefixes.drop(holder.kept)

    @precondition(lambda self: self.budget < 1 << 16)
    @rule(nbytes=st.integers(1, 3000))
    def press(self, nbytes: int) -> None:
        held = self.prefixes.stats.nbytes
        freed = self.prefixes.evict(nbytes)
        assert freed >= min(nbytes, held) or self.holders
        assert self.prefixes.stats.nbytes == held - freed

    @precondition(lambda self: self.disk is not None and not self.holders)
    @rule()
    def restart(self) -> None:
        self.prefixes.flush()
        assert self.prefixes.stats.nbytes == 0 and self.prefixes.stats.note is None
        self.kept_ids, self.read = [], 0
        self.open()

    @precondition(lambda self: self.disk is not None and self.budget < 1 << 16)
    @rule(data=st.data())
    def break_a_file(self, data: st.DataObject) -> None:
        paths = self.written("*.safetensors")
        if paths:
            path = data.draw(st.sampled_from(paths))
            size = path.stat().st_size
            how = data.draw(st.sampled_from(["gone", "cut", "changed"]))
            at = data.draw(st.integers(0, size - 1))
            if how == "gone":
                path.unlink()
            elif how == "cut":
                os.truncate(path, at)
            else:
                content = bytearray(path.read_bytes())
                content[at] ^= 1 << data.draw(st.integers(0, 7))
                path.write_bytes(content)

    @invariant()
    def disk_is_within_its_limit(self) -> None:
        if self.disk is not None:
            assert sum(path.stat().st_size for path in self.written("*")) <= self.disk

    def written(self, pattern: str) -> list[Path]:
        """The files on disk, once all that waits is written: what is drawn must not depend on a thread's pace."""
        if self.files is not None:
            self.files.finish()
        return sorted(Path(self.directory.name).glob(f"kept/{pattern}"))

    @invariant()
    def tree_is_sound(self) -> None:
        prefixes = self.prefixes
        nodes = list(prefixes._trees.nodes())
        # What is counted as it changes is what a recount of everything finds.
        recounted = sum(node.nbytes for node in nodes) + sum(kept.caches.nbytes for kept in prefixes._idle)
        assert prefixes.stats.nbytes == prefixes._held() == recounted
        in_use = any(node.lines & prefixes._lent for node in nodes)
        assert prefixes.stats.nbytes <= prefixes.budget or in_use
        for node in nodes:
            assert node.ids and node.attached and node.start == (node.parent.end if node.parent else 0)
            assert prefixes._trees.covered(node)
            assert node.children or node.lines or node.has_marks or not prefixes._trees.needs_marks
            assert all(child.lines <= node.lines for child in node.children.values())
            assert node.edge is None or (node.edge.first, node.edge.last) == (node.start, node.end)
            assert node.marks is None or node.marks.offset == node.end
            assert node.file is None or node.file.first <= node.start < node.end <= node.file.last
        for kept in prefixes._lent | prefixes._idle:
            assert kept.caches.offset >= kept.node.end and all(kept in node.lines for node in kept.node.up())
            assert kept.lent or kept.caches.offset == kept.node.end
        assert {kept for node in nodes for kept in node.lines} <= prefixes._lent | prefixes._idle
        assert prefixes._lent == {holder.kept for holder in self.holders}
        stats = prefixes.stats
        assert stats.reused + stats.read == stats.tokens and self.read <= stats.read

    def teardown(self) -> None:
        for holder in list(self.holders):
            self.prefixes.give(holder.kept, holder.ids)
        self.prefixes.clear()
        assert self.prefixes.stats.nbytes == 0 and not self.prefixes._idle
        assert not self.prefixes._trees.roots or self.disk is not None
        self.written("*")
        self.directory.cleanup()


class OldestByLooking(Oldest):
    """The naive twin beside: all nodes are looked at for each that goes."""

    def __init__(self, nodes: Iterable[Node]) -> None:
        nodes = list(nodes)
        self._roots = {node.root for node in nodes}
        super().__init__(nodes)

    def pop(self) -> tuple[Node, bool] | None:
        nodes = [node for root in self._roots for node in root.below()]
        holding = [node for node in nodes if node.in_memory]
        inner = {above for node in holding for above in node.up() if above is not node}
        choices = [(n.marked, False, n) for n in nodes if n.marks is not None and (n.children or n.lines)]
        choices += [(n.used, True, n) for n in holding if n not in inner and not any(one.lent for one in n.lines)]
        wanted = min(choices, key=lambda one: one[:2], default=None)
        found = super().pop()
        assert (wanted and wanted[1:]) == (found and found[::-1])
        return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("examples", [12, pytest.param(600, marks=pytest.mark.long)])
def test_any_conversations(kind: str, examples: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runner.cache.kv.STEP", 4)
    monkeypatch.setattr("runner.engine.prefixes.SPACING", 8)
    monkeypatch.setattr("runner.engine.prefixes.Oldest", OldestByLooking)
    machine = type("Chats", (Chats,), {"kind": kind})
    run_state_machine_as_test(machine, settings=settings(max_examples=examples, stateful_step_count=30, deadline=None))


def read(prefixes: Prefixes, memories: list, ids: list[int]) -> Kept:
    """A request's prompt, read with pauses; returns the caches, still lent."""
    kept = prefixes.take(ids)
    for start, end in zip([kept.reused, *sorted(kept.places)], [*sorted(kept.places), len(ids)], strict=True):
        feed(kept.caches, memories, ids[start:end])
        if end in kept.places:
            prefixes.mark(kept)
    return kept


def made(kind: str, budget: int = 1 << 30) -> tuple[Prefixes, functools.partial[Kept]]:
    prefixes = Prefixes(lambda: Caches.of(KINDS[kind], current().ops.storage), budget)
    return prefixes, functools.partial(read, prefixes, KINDS[kind])


FIRST = list(range(1, 41))


@pytest.mark.parametrize("kind", KINDS)
def test_one_turn_after_the_other_costs_no_copy(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    prefixes, ask = made(kind)
    kept = ask(FIRST)
    prefixes.give(kept, FIRST)
    copies: list[Edge] = []
    monkeypatch.setattr(Edge, "copied", lambda edge: copies.append(edge))
    again = ask([*FIRST, 50, 51])
    assert again is kept and again.reused == len(FIRST) and not copies


@pytest.mark.parametrize("kind", KINDS)
def test_a_prefix_serves_others_while_it_is_in_use(kind: str) -> None:
    """Of eight requests at once with a known prefix, all reuse it; also one that is being read."""
    _, ask = made(kind)
    kept = ask(FIRST)
    place = len(FIRST) - 1 if kept.caches.needs_marks else len(FIRST)
    others = [ask([*FIRST, 60 + index, 61, 62]) for index in range(7)]
    assert [other.reused for other in others] == [place, *[len(FIRST)] * 6]  # where the first parts is a mark
    feed(kept.caches, KINDS[kind], [70])
    for index, other in enumerate(others):
        assert shown(other.caches, KINDS[kind]) == fresh(KINDS[kind], [*FIRST, 60 + index, 61, 62])
    assert shown(kept.caches, KINDS[kind]) == fresh(KINDS[kind], [*FIRST, 70])


@pytest.mark.parametrize("kind", KINDS)
def test_an_edit_keeps_what_it_parted_from(kind: str) -> None:
    prefixes, ask = made(kind)
    prefixes.give(ask([*FIRST, 50, 51, 52]), [*FIRST, 50, 51, 52])
    edited = ask([*FIRST[:30], 60, 61])
    assert edited.reused == 30 or edited.caches.needs_marks
    prefixes.give(edited, [*FIRST[:30], 60, 61])
    back = ask([*FIRST, 50, 51, 52, 53])
    assert back.reused >= 42
    third = ask([*FIRST[:30], 62, 63])  # where the second parted from the first, there is a mark now
    assert third.reused == 30


def test_marks_are_made_where_the_next_prompt_may_part() -> None:
    prefixes, _ = made("hybrid")
    prompt = [1 + index % 7 for index in range(9000)]
    kept = prefixes.take(prompt, turns=[8990])
    assert kept.places == {4096, 8192, 8990, 8999}
    assert made("rows")[0].take(prompt, turns=[8990]).places == frozenset()
    assert made("hybrid", budget=0)[0].take(prompt).places == frozenset()


def test_prompts_with_other_keys_share_nothing() -> None:
    prefixes, ask = made("rows")
    prefixes.give(ask(FIRST), FIRST)
    assert prefixes.take(FIRST, key=(("style", 0.5),)).reused == 0
    assert prefixes.take(FIRST).reused == len(FIRST) - 1


def test_rows_in_common_are_kept_once_under_pressure() -> None:
    prefixes, ask = made("rows", budget=1 << 40)
    shared = [1 + index % 9 for index in range(3000)]
    prompts = [[*shared, 20 + index, 7] for index in range(6)]
    for kept, prompt in [(ask(prompt), prompt) for prompt in prompts]:  # all at once
        prefixes.give(kept, prompt)
    row = 2 * 2 * (4 + 4) * 4
    before = prefixes.stats.nbytes
    assert before > 6 * 3000 * row
    prefixes.evict(before - 5000 * row)
    assert prefixes.stats.nbytes < 5000 * row and prefixes.stats.evicted == 0
    assert [ask([*prompt, 8]).reused for prompt in prompts] == [3002] * 6


def test_what_was_not_used_for_longest_goes_first() -> None:
    prefixes, ask = made("rows")
    talks = [[10 * index + 1, *range(2, 600)] for index in range(4)]
    for talk in talks:
        prefixes.give(ask(talk), talk)
    prefixes.give(ask([*talks[0], 5]), [*talks[0], 5])
    prefixes.evict(1)
    assert prefixes.stats.evicted == len(talks[1])
    assert prefixes.take([*talks[0], 6]).reused == 599 and prefixes.take([*talks[1], 6]).reused == 0


def test_the_oldest_marks_go_before_newer_sequences() -> None:
    prefixes, ask = made("state", budget=1 << 20)
    prompt = [1, 2, 3]
    for turn in range(20):
        prompt = [*prompt, 4 + turn, 5, 6]
        prefixes.give(ask(prompt), prompt)
    marks = [node for node in prefixes._trees.nodes() if node.marks is not None]
    assert len(marks) == 20
    prefixes.evict(sum(node.marks.nbytes for node in marks[:10] if node.marks))
    left = sorted(node.end for node in prefixes._trees.nodes() if node.marks is not None)
    assert left == sorted(node.end for node in marks)[10:] and prefixes.stats.evicted == 0


def test_a_failed_request_takes_only_its_own_with_it() -> None:
    prefixes, ask = made("rows")
    prefixes.give(ask(FIRST), FIRST)
    fork = ask([*FIRST[:10], 50, 51])  # a copy: the other has more behind its place
    prefixes.drop(fork)
    assert prefixes.take([*FIRST, 9]).reused == len(FIRST)
    assert prefixes.take([*FIRST[:10], 50, 51]).reused == 10


def test_ids_are_compared_not_hashes() -> None:
    """-1 and -2 have the same hash, as have 0 and 2^61 - 1."""
    prefixes, ask = made("rows")
    prefixes.give(ask([-1, 0, 5, 6]), [-1, 0, 5, 6])
    assert prefixes.take([-2, 0, 5, 6]).reused == 0 and prefixes.take([-1, 2**61 - 1, 5]).reused == 1


@pytest.mark.parametrize("size", [1, 2, 7, 100])
def test_alike_counts_token_by_token(size: int) -> None:
    for parted in range(size + 1):
        ids = list(range(size))
        others = [9, 9, *ids[:parted], *[-1] * (size - parted)]
        assert alike(ids, others, 2) == parted
    assert alike([1, 2, 3], [1, 2], 0) == 2 and alike([1], [1], 1) == 0


def test_nothing_is_held_but_what_is_counted() -> None:
    """A hundred conversations of any length: what MLX holds stays within the budget, and all goes at the end."""
    mx.clear_cache()
    start = mx.get_active_memory()
    prefixes, ask = made("joined", budget=1 << 20)
    for index in range(100):
        talk = [index % 5, *range(index % 3, 40 + 13 * index % 900)]
        prefixes.give(ask(talk), talk)
        assert mx.get_active_memory() - start < 1.2 * prefixes.stats.nbytes + 200_000
        assert prefixes.stats.nbytes <= 1 << 20
    prefixes.clear()
    assert mx.get_active_memory() - start < 10_000
