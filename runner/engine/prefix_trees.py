"""The trees of all kept prefixes: what their nodes must hold, what is counted, and in which order they are let go.

A request's prefix is found in the tree of its key. Who changes a tree does so through what is here, so that a node is
in it as long as it leads somewhere, and no longer.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Hashable, Iterable, Iterator

import mlx.core as mx

from runner.cache.caches import Caches
from runner.cache.mark import Marks
from runner.engine.prefix_tree import Kept, Node


class Trees:
    """A tree over token ids for each key.

    Attributes:
        roots: by key; a root without children may be missing.
        needs_marks: whether there are places that only marks can bring caches back to.
        keeps_rows: whether caches keep a row of every token.
        evicted: tokens that were let go.
    """

    def __init__(self, empty: Caches) -> None:
        """No tree yet; `empty` are caches like those that will be kept."""
        self.roots: dict[Hashable, Node] = {}
        self.needs_marks = empty.needs_marks
        self.keeps_rows = empty.keeps_rows
        self.evicted = 0
        self.events = 0

    def __repr__(self) -> str:
        return f"Trees({len(self.roots)}, {self.nbytes / 1e6:.1f} MB)"

    @property
    def nbytes(self) -> int:
        """Bytes of copied rows and of marks."""
        return sum(root.tally.nbytes for root in self.roots.values())

    def nodes(self) -> Iterator[Node]:
        """All nodes but the roots."""
        for root in self.roots.values():
            yield from root.below()

    def root(self, key: Hashable) -> Node:
        """The root of a key's tree, which is there from now on."""
        return self.roots.setdefault(key, Node())

    def key(self, node: Node) -> Hashable:
        """The key of the tree that a node is in."""
        root = node.root
        return next(key for key, one in self.roots.items() if one is root)

    def now(self) -> int:
        """The number of an event."""
        self.events += 1
        return self.events

    def touch(self, node: Node) -> None:
        """A request has come by a node."""
        now = self.now()
        for above in node.up():
            above.used = now

    def mark(self, kept: Kept) -> None:
        """Mark the place of caches, which is the end of their node."""
        kept.node.marks, kept.node.marked = kept.caches.mark(), self.now()
        mx.eval(kept.node.marks.arrays)

    def covered(self, node: Node) -> bool:
        """Whether the rows of a node are held somewhere."""
        return bool(node.lines) or node.edge is not None or node.file is not None or not self.keeps_rows

    def remove(self, node: Node) -> Node | None:
        """Take a node, and all below it, out of its tree; returns the node above."""
        self.evicted += len(node.ids) + sum(len(other.ids) for other in node.below())
        node.remove()
        return node.parent

    def prune(self, node: Node | None) -> None:
        """Remove a node, and those above it, that lead nowhere any more."""
        while node is not None and node.parent is not None and not node.children and not node.lines:
            if self.covered(node) and not (self.needs_marks and not node.has_marks):
                return
            node = self.remove(node)

    def ends(self) -> list[Node]:
        """The nodes that memory is held for, but none for what follows them."""
        holding = [node for node in self.nodes() if node.in_memory]
        inner = {above for node in holding for above in node.up() if above is not node}
        return [node for node in holding if node not in inner]


def marks_above(node: Node) -> list[Marks]:
    """The marks on the way to the end of a node."""
    return [above.marks for above in node.up() if above.marks is not None]


class Oldest:
    """Marks, and ends of sequences that no request uses, by when they were used last.

    Looked at when their turn comes: what is not to be let go yet comes in again when something below it has gone.
    """

    def __init__(self, nodes: Iterable[Node]) -> None:
        self._heap: list[tuple[int, bool, int, Node]] = []
        self._queued: set[tuple[Node, bool]] = set()
        self._count = itertools.count()  # nodes cannot be compared
        for node in nodes:
            self.push(node)

    def push(self, node: Node) -> None:
        """Look at a node again, if it is in the tree and memory is held for it."""
        for end, held in ((False, node.marks is not None), (True, node.in_memory)):
            if held and node.attached and (node, end) not in self._queued:
                self._queued.add((node, end))
                heapq.heappush(self._heap, (_age(node, end), end, next(self._count), node))

    def pop(self) -> tuple[Node, bool] | None:
        """The node to let go next, and whether all of it goes or just its marks; None: nothing is left."""
        while self._heap:
            age, end, _, node = heapq.heappop(self._heap)
            self._queued.remove((node, end))
            if not node.attached:
                continue
            if age != _age(node, end):
                self.push(node)
            elif _is_end(node) if end else node.marks is not None and (node.children or node.lines):
                return node, end
        return None


def _age(node: Node, end: bool) -> int:
    return node.used if end else node.marked


def _is_end(node: Node) -> bool:
    """Whether memory that no request uses is held for a node, and none for what follows it."""
    return (
        node.in_memory and not any(kept.lent for kept in node.lines) and not any(one.in_memory for one in node.below())
    )
