"""Prefix reuse: what was computed for one prompt serves every later one that begins with the same ids.

Rows (keys and values of full attention) can be cut at any token; windows, chunks and states only come back to places
where they were marked. What the tree keeps and what a request uses never share memory: caches are written in place, so
a prefix is either handed over as it is, where nobody else uses it, or copied. Everything here is done on the thread
that owns the device, between two passes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import mlx.core as mx

from runner.cache.caches import Caches, agreeing
from runner.cache.mark import Edge
from runner.engine.prefix_tree import Found, Kept, Node, alike
from runner.engine.prefix_trees import Oldest, Trees, marks_above

if TYPE_CHECKING:  # read by who keeps prefixes on disk
    from runner.engine.prefix_disk import PrefixDisk
    from runner.engine.prefix_files import PrefixFiles, Stored

SPACING = 4096
"""Tokens of a long prompt between two marks."""


@dataclass(frozen=True)
class PrefixStats:
    """What prefix reuse has done so far.

    Attributes:
        requests: how many prompts were looked up.
        tokens: tokens of these prompts.
        reused: how many of them were not read again.
        evicted: tokens that were let go, to hold the byte budget or to make room.
        nbytes: bytes held now, beside what requests use.
        budget: the most bytes that are held.
        restored: tokens of those reused that were read from disk.
        note: why nothing more is written to disk; None where it is, or was not asked for.
    """

    requests: int
    tokens: int
    reused: int
    evicted: int
    nbytes: int
    budget: int
    restored: int = 0
    note: str | None = None

    @property
    def read(self) -> int:
        """Tokens of the prompts that had to be read."""
        return self.tokens - self.reused


class Prefixes:
    """The kept prefixes of one loaded model.

    A request takes the caches that hold the longest usable beginning of its prompt, and gives them back at its end.
    In between they are its own, and others can still begin with the part of its prompt that was read.
    """

    def __init__(self, new_caches: Callable[[], Caches], budget: int, files: PrefixFiles | None = None) -> None:
        """Keep nothing yet but what lies on disk.

        Args:
            new_caches: makes empty caches of the model.
            budget: the most bytes to hold beside what requests use; 0: nothing is kept.
            files: where to put what memory has no room for, and what is there at the end.
        """
        self.budget = budget
        self._new_caches = new_caches
        self._trees = Trees(new_caches())
        self._lent: set[Kept] = set()
        self._idle: set[Kept] = set()
        self._idle_bytes = 0  # of their caches
        self._disk: PrefixDisk | None = None
        self._requests = self._tokens = self._reused = self._nbytes = self._restored = 0
        if files is not None:
            from runner.engine.prefix_disk import PrefixDisk

            self._disk = PrefixDisk(self._trees, files, new_caches)

    def __repr__(self) -> str:
        held = f"{self._nbytes / 1e6:.1f} MB of {self.budget / 1e6:.1f} MB"
        return f"Prefixes({len(self._idle)} sequences idle, {len(self._lent)} lent, {held})"

    @property
    def stats(self) -> PrefixStats:
        """What was done so far, as of the last call that ended: callable from any thread."""
        counts = (self._requests, self._tokens, self._reused, self._trees.evicted, self._nbytes, self.budget)
        return PrefixStats(*counts, self._restored, None if self._disk is None else self._disk.note)

    @property
    def nbytes(self) -> int:
        """Bytes held beside what requests use."""
        return self._nbytes

    @property
    def busy(self) -> bool:
        """Nothing is computed by what is kept."""
        return False

    def offered(self, ids: Sequence[int], key: Hashable = ()) -> int:
        """Bytes of what `take` would hand over as it is; what it would take is used last in `evict` from now on."""
        found = self._found(self._trees.roots.get(key), ids)
        if nodes := found.nodes():
            self._trees.touch(nodes[-1])
        chosen = self._chosen(found)
        return 0 if chosen is None else chosen[0].nbytes

    def reusable(self, ids: Sequence[int], key: Hashable = ()) -> int:
        """How many tokens of a prompt `take` would find now."""
        found = self._found(self._trees.roots.get(key), ids)
        chosen = self._chosen(found)
        return self._buildable(found) if chosen is None else chosen[1]

    def take(self, ids: Sequence[int], key: Hashable = (), turns: Collection[int] = (), *, reuse: bool = True) -> Kept:
        """Lend caches that hold the longest usable beginning of a prompt, at least its last token excluded.

        Args:
            ids: the prompt, one token or more.
            key: what else the computation depends on (adapters and their weights, whose prompts may meet); prompts
                with different keys share nothing.
            turns: positions in the prompt where the next one may part from it: before the assistant's turn.
            reuse: false: the caches are empty, for who needs all of the prompt's rows of logits.
        """
        root = self._trees.root(key)
        found = self._found(root, ids if reuse else ())
        kept = self._moved(found) or self._built(root, found) or Kept(self._new_caches(), root)
        kept.ids, kept.reused, kept.lent = list(ids), kept.caches.offset, True
        kept.places = self._places(kept, found.common, turns)
        self._rouse(kept)
        self._lent.add(kept)
        self._trees.touch(kept.node)
        self._requests += 1
        self._tokens += len(ids)
        self._reused += kept.reused
        self._settle()
        return kept

    def mark(self, kept: Kept) -> None:
        """Let windows and states come back to where the caches are: one of `kept.places`."""
        self._grow(kept, kept.ids)
        node = kept.node
        if node.end == kept.caches.offset > 0 and node.marks is None:
            self._trees.mark(kept)
        self._settle()

    def give(self, kept: Kept, ids: Sequence[int]) -> None:
        """Take back what a request used; `ids` are its prompt and its answer, as far as they are known.

        The caches may hold fewer tokens than that, or, after a pass that nobody waited for, more.
        """
        if kept.caches.offset > len(ids):
            marks = marks_above(kept.node)
            place = kept.caches.reach(len(ids), marks)
            self._leave(kept, place)
            kept.caches.rewind(place, marks)
        self._grow(kept, ids)
        self._lent.discard(kept)
        if kept.caches.offset:
            kept.lent, kept.ids = False, ()
            mx.eval(kept.caches.arrays)  # or the graph of the last pass would be held as well
            kept.nbytes = kept.caches.nbytes
            self._idle.add(kept)
            self._idle_bytes += kept.nbytes
            self._trees.touch(kept.node)
            for node in kept.node.up():
                node.edge = None  # its own caches hold these rows
        self._settle()

    def drop(self, kept: Kept) -> None:
        """Forget what a request used, after a pass that failed: its layers may have come apart."""
        self._lent.discard(kept)
        self._forget(kept)
        lost = [node for node in kept.node.up() if not self._trees.covered(node)]
        if lost:  # and with the topmost all below, whose rows follow on its own
            self._trees.prune(self._trees.remove(lost[-1]))
        else:
            self._trees.prune(kept.node)
        self._settle()

    def evict(self, nbytes: int) -> int:
        """Let go of at least so many bytes, or of all that no request uses; returns how many it were.

        First goes what is held twice, then what was not used for longest.
        """
        before = self._held()
        self._dedupe()
        # What a sequence shares with others only shrinks from here on: each is looked at once.
        for kept in sorted(self._idle, key=lambda one: one.node.used) if self._trees.keeps_rows else ():
            if before - self._held() >= nbytes:
                break
            self._compact(kept)
        if before - self._held() < nbytes:
            oldest = Oldest(self._trees.nodes())
            while before - self._held() < nbytes and (found := oldest.pop()) is not None:
                self._let_go(*found, oldest)
        self._nbytes = self._held()
        roots = self._trees.roots
        self._trees.roots = {key: root for key, root in roots.items() if root.children or self._used(root)}
        return before - self._nbytes

    def clear(self) -> None:
        """Let go of all in memory that no request uses."""
        disk, self._disk = self._disk, None
        self.evict(self._held() + 1)
        self._disk = disk

    def flush(self) -> None:
        """Put on disk what memory holds, as far as there is room, and let go of it."""
        if self._disk is not None:
            self._disk.write_all()
        self.clear()

    # ---- taking

    def _found(self, root: Node | None, ids: Sequence[int]) -> Found:
        """How far the ids of a prompt but its last go along a tree, that of requests that are being read included."""
        for other in self._lent:
            self._grow(other, other.ids)
        return Found([], None, 0) if root is None else root.find(ids[:-1])

    def _moved(self, found: Found) -> Kept | None:
        """Caches that nobody uses, handed over as they are; None: there are none, or a copy serves better."""
        if (chosen := self._chosen(found)) is None:
            return None
        kept, place = chosen
        marks = marks_above(kept.node)
        self._leave(kept, place)
        kept.caches.rewind(place, marks)
        return kept

    def _chosen(self, found: Found) -> tuple[Kept, int] | None:
        """Caches to hand over as they are, and the place that they can go back to."""
        shared = {kept: min(node.end, found.common) for node in found.nodes() for kept in node.lines if not kept.lent}
        marks = [node.marks for node in found.path if node.marks is not None]
        places = {kept: kept.caches.reach(common, marks) for kept, common in shared.items()}
        if not any(places.values()):
            return None
        kept = max(places, key=lambda one: (places[one], -one.caches.offset, one.node.used))
        place, copy = places[kept], self._buildable(found)
        # What it holds behind that place would have to be copied, or be lost: rather copy what is before it.
        tail = kept.caches.offset - place
        if place < copy or (place == copy and tail > (place if self._trees.keeps_rows else 0)):
            return None
        return kept, place

    def _built(self, root: Node, found: Found) -> Kept | None:
        """New caches with copies of the rows and marks of others; None: nothing can be reused so."""
        while place := self._buildable(found):
            found = found.until(place)
            pieces = self._pieces(found)
            if pieces is None:  # a file was gone, and with it part of the tree
                ids = [token for node in found.nodes() for token in node.ids][:place]
                found = root.find(ids)
                continue
            if (count := agreeing(pieces)) == len(pieces):
                break
            found = found.until(pieces[count].first)
        else:
            return None
        kept = Kept(self._new_caches(), found.path[-1] if found.path else root)
        kept.caches.hold(pieces, kept.node.marks if self._trees.needs_marks else None)
        mx.eval(kept.caches.arrays)  # now, before anybody writes into what is copied
        kept.node.marked = self._trees.now()
        for node in found.path:
            node.lines.add(kept)
        return kept

    def _buildable(self, found: Found) -> int:
        """The furthest place that new caches can be brought to."""
        if not self._trees.needs_marks:
            return found.common
        return max((node.end for node in found.path if node.has_marks), default=0)

    def _pieces(self, found: Found) -> list[Edge] | None:
        """The rows of the tokens that were found: views. The marks at the end are in memory then. None: try again."""
        pieces: list[Edge] = []
        nodes = found.nodes()
        read: dict[Stored, Edge] = {}
        if self._trees.needs_marks and nodes[-1].marks is None:
            if self._restored_from(nodes[-1], read) is None:
                return None
            self._restored += 0 if self._trees.keeps_rows else found.common
        for node in reversed(nodes if self._trees.keeps_rows else ()):
            last = min(node.end, found.common)
            if node.lines:  # a sequence's caches hold everything from the first token on
                pieces.append(next(iter(node.lines)).caches.rows(0, last))
                break
            edge = node.edge
            if edge is None:
                if (edge := self._restored_from(node, read)) is None:
                    return None
                self._restored += last - node.start
            pieces.append(edge.part(node.start, last))
        return pieces[::-1] or [self._new_caches().rows(0, found.common)]

    def _restored_from(self, node: Node, read: dict[Stored, Edge]) -> Edge | None:
        """As `PrefixDisk.restore`: what memory lacks lies there."""
        assert self._disk is not None
        return self._disk.restore(node, read)

    def _places(self, kept: Kept, parted: int, turns: Collection[int]) -> frozenset[int]:
        if not self._trees.needs_marks or not self.budget:
            return frozenset()
        # Where this prompt parts from others the next may part too; at its end but one token, as one must be left to
        # read; and now and then in a long one.
        last = len(kept.ids) - 1
        wanted = (*turns, parted, *range(SPACING, last, SPACING), last)
        return frozenset(place for place in wanted if kept.reused < place <= last)

    # ---- the tree

    def _held(self) -> int:
        return self._trees.nbytes + self._idle_bytes

    def _settle(self) -> None:
        """The end of what changed the tree: the budget is held."""
        self._nbytes = self._held()
        if self._nbytes > self.budget:
            self.evict(self._nbytes - self.budget)

    def _used(self, root: Node) -> bool:
        return any(kept.node.root is root for kept in self._lent)

    def _grow(self, kept: Kept, ids: Sequence[int]) -> None:
        """Let the tree know what the caches of a sequence hold by now; `ids` are its tokens."""
        node, end = kept.node, min(kept.caches.offset, len(ids))
        while node.end < end:
            child = node.children.get(ids[node.end])
            if child is None:
                child = Node(ids[node.end : end], node)
                child.used = self._trees.now()
            elif (count := alike(child.ids, ids[:end], node.end)) < len(child.ids):
                child = child.split(count)
            child.lines.add(kept)
            node = child
        kept.node = node

    def _leave(self, kept: Kept, place: int, wanted: bool = True) -> None:
        """Take `kept` back to `place` in the tree; of what only its caches hold behind it, copy what is of use.

        Args:
            wanted: whether that is more than what others begin with.
        """
        made: list[mx.array] = []
        while (node := kept.node).end > place:
            if node.start < place:
                node.split(place - node.start)
            assert node.parent is not None
            kept.node = node.parent
            node.lines.discard(kept)
            # Where marks are needed, there is no way to tokens behind the last one.
            own = node.has_marks if self._trees.needs_marks else wanted
            if not (node.children or node.lines or node.file or (own and (wanted or not self._trees.keeps_rows))):
                self._trees.remove(node)
            elif not self._trees.covered(node):
                node.edge = kept.caches.rows(node.start, node.end).copied()
                made += node.edge.arrays
        mx.eval(made)

    def _forget(self, kept: Kept) -> None:
        """Count no longer on the caches of `kept`."""
        for node in kept.node.up():
            node.lines.discard(kept)
        self._rouse(kept)

    def _rouse(self, kept: Kept) -> None:
        """Count `kept` no longer among those that no request uses."""
        if kept in self._idle:
            self._idle.remove(kept)
            self._idle_bytes -= kept.nbytes

    # ---- letting go

    def _dedupe(self) -> None:
        """Let go of copied rows that a sequence's own caches hold, too."""
        for node in self._trees.nodes():
            if node.lines:
                node.edge = None

    def _compact(self, kept: Kept) -> None:
        """Let go of the caches of a sequence, if at least half of them is held elsewhere, and copy the rest."""
        shared = next((node.end for node in kept.node.up() if len(node.lines) > 1), 0)
        if shared * 2 >= kept.caches.offset:
            if self._trees.needs_marks and kept.node.marks is None:
                self._trees.mark(kept)
            self._leave(kept, shared)
            self._forget(kept)
            self._trees.prune(kept.node)

    def _let_go(self, node: Node, end: bool, oldest: Oldest) -> None:
        """Let go of the marks of a node or, at the end of a sequence, of all that it holds."""
        path = list(node.up())
        if end:
            if self._disk is not None:
                self._disk.write(node)
            for kept in list(node.lines):
                self._leave(kept, 0, wanted=False)
                self._rouse(kept)
            if node.file is not None:
                node.edge = node.marks = None
            elif node.attached:
                self._trees.prune(self._trees.remove(node))
        else:
            node.marks = None
        for above in path:  # nothing else has changed
            oldest.push(above)
