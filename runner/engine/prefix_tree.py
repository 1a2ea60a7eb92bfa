"""A tree over token ids: what is kept of sequences that begin alike lies in nodes, which part where the ids part.

Ids are compared, never hashes of them. A node may be split at any token, so that no block size divides prompts.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from runner.cache.caches import Caches
from runner.cache.mark import Edge, Marks

if TYPE_CHECKING:
    from runner.engine.prefix_files import Stored


class Tally:
    """The bytes that all nodes of one tree hold: counted where they change, as trees are large and changes many."""

    __slots__ = ("nbytes",)

    def __init__(self) -> None:
        self.nbytes = 0


class Node:
    """Some tokens of every sequence that comes by here, from token `start` up to `end`.

    Attributes:
        ids: these tokens.
        children: what follows, by its first id.
        lines: the sequences whose own caches hold the rows of this node; each holds those of all nodes above it, too.
        edge: a copy of the rows; None while the caches of a sequence hold them, or where nothing keeps rows.
        marks: what windows and states need to be at `end`; None: only its sequences' own caches can be there, if at
            all.
        file: where on disk its rows are, and perhaps its marks; rows of other nodes may lie in the same file.
        used: when a request last came by, as a count of events.
        marked: when `marks` were made or last come back to.
        tally: of the tree that it is in.
    """

    __slots__ = (
        "_edge", "_marks", "_sizes", "children", "file", "ids", "lines", "marked", "parent", "start", "tally", "used"
    )  # fmt: skip

    def __init__(self, ids: Sequence[int] = (), parent: Node | None = None) -> None:
        self.parent = parent
        self.tally: Tally = Tally() if parent is None else parent.tally
        self.ids = list(ids)
        self.start = 0 if parent is None else parent.end
        self.children: dict[int, Node] = {}
        self.lines: set[Kept] = set()
        self._edge: Edge | None = None
        self._marks: Marks | None = None
        self.file: Stored | None = None
        self._sizes = [0, 0]  # their bytes, which are in `tally`, too
        self.used = self.marked = 0
        if parent is not None:
            parent.children[self.ids[0]] = self

    def __repr__(self) -> str:
        kept = [name for name in ("edge", "marks") if getattr(self, name) is not None]
        return f"Node({self.start} to {self.end}, {len(self.children)} children, {len(self.lines)} lines, {kept})"

    @property
    def end(self) -> int:
        """The number of tokens from the root to here, those of this node included."""
        return self.start + len(self.ids)

    @property
    def edge(self) -> Edge | None:
        """See the class."""
        return self._edge

    @edge.setter
    def edge(self, edge: Edge | None) -> None:
        self._edge = edge
        self._resize(0, 0 if edge is None else edge.nbytes)

    @property
    def marks(self) -> Marks | None:
        """See the class."""
        return self._marks

    @marks.setter
    def marks(self, marks: Marks | None) -> None:
        self._marks = marks
        self._resize(1, 0 if marks is None else marks.nbytes)

    def _resize(self, which: int, nbytes: int) -> None:
        self.tally.nbytes += nbytes - self._sizes[which]
        self._sizes[which] = nbytes

    @property
    def nbytes(self) -> int:
        """Bytes of the copied rows and the marks."""
        return self._sizes[0] + self._sizes[1]

    @property
    def marked_on_disk(self) -> bool:
        """Whether `file` has the marks of this node's end."""
        return self.file is not None and self.file.marked and self.file.last == self.end

    @property
    def has_marks(self) -> bool:
        """Whether windows and states can be brought to its end."""
        return self._marks is not None or self.marked_on_disk

    @property
    def in_memory(self) -> bool:
        """Whether memory is held for it."""
        return bool(self.lines) or self.nbytes > 0

    def up(self) -> Iterator[Node]:
        """This node and those above it, without the root."""
        node = self
        while node.parent is not None:
            yield node
            node = node.parent

    @property
    def root(self) -> Node:
        """The node without ids that all of this tree is below."""
        node = self
        while node.parent is not None:
            node = node.parent
        return node

    @property
    def attached(self) -> bool:
        """Whether this node has not been removed from its tree."""
        return self.parent is not None and self.parent.children.get(self.ids[0]) is self

    def below(self) -> Iterator[Node]:
        """All nodes below this one."""
        waiting = list(self.children.values())
        while waiting:
            node = waiting.pop()
            yield node
            waiting += node.children.values()

    def find(self, ids: Sequence[int]) -> Found:
        """How far `ids` go along the tree, from this root on."""
        path: list[Node] = []
        node, at = self, 0
        while at < len(ids) and (child := node.children.get(ids[at])) is not None:
            count = alike(child.ids, ids, at)
            at += count
            if count < len(child.ids):
                return Found(path, child, at)
            path.append(child)
            node = child
        return Found(path, None, at)

    def split(self, count: int) -> Node:
        """Cut after the first `count` tokens: they become a node of their own, above this one, which is returned."""
        assert self.parent is not None and 0 < count < len(self.ids)
        upper = Node(self.ids[:count], self.parent)  # takes this one's place among the parent's children
        upper.lines, upper.used, upper.file = set(self.lines), self.used, self.file
        if self.edge is not None:
            middle = upper.end
            upper.edge = self.edge.part(self.start, middle).copied()
            self.edge = self.edge.part(middle, self.end).copied()
        self.parent, self.start, self.ids = upper, upper.end, self.ids[count:]
        upper.children[self.ids[0]] = self
        return upper

    def remove(self) -> None:
        """Take this node, and all below it, out of the tree."""
        assert self.parent is not None
        del self.parent.children[self.ids[0]]
        away = Tally()
        for node in (self, *self.below()):
            node.tally.nbytes -= node.nbytes
            node.tally = away
            away.nbytes += node.nbytes


class Found(NamedTuple):
    """How far ids went along a tree: the nodes that they have wholly, then one in part, and the tokens in all."""

    path: list[Node]
    partly: Node | None
    common: int

    def until(self, place: int) -> Found:
        """How far the first `place` of the tokens that were found go."""
        path = [node for node in self.path if node.end <= place]
        partly = next((node for node in (*self.path, self.partly) if node and node.start < place < node.end), None)
        return Found(path, partly, place)

    def nodes(self) -> list[Node]:
        """The nodes from the root's child down, the one in part last."""
        return self.path if self.partly is None else [*self.path, self.partly]


class Kept:
    """The caches of one sequence: lent to a request, or kept for the next that begins alike.

    Attributes:
        caches: of the sequence alone; who it is lent to appends to them.
        ids: the prompt that it was lent for.
        reused: how many tokens of it the caches held then.
        places: positions in it at which its reading should pause for `Prefixes.mark`.
        node: up to where the tree knows what the caches hold.
        lent: whether a request uses the caches.
        nbytes: bytes of the caches while none does.
    """

    def __init__(self, caches: Caches, node: Node) -> None:
        self.caches = caches
        self.node = node
        self.ids: Sequence[int] = ()
        self.reused = 0
        self.places: frozenset[int] = frozenset()
        self.lent = True
        self.nbytes = 0

    def __repr__(self) -> str:
        return f"Kept({self.caches}, {'lent' if self.lent else 'idle'}, {self.reused} tokens reused)"

    def pause(self, place: int) -> None:
        """Have the reading pause at `place`, too, where windows and states need it: another prompt parts there."""
        if self.caches.needs_marks and place > self.caches.offset:
            self.places |= {place}


def alike(ids: Sequence[int], others: Sequence[int], at: int) -> int:
    """How many of `ids` are those of `others` from position `at` on."""
    count = min(len(ids), len(others) - at)
    if count > 0 and ids[0] != others[at]:  # most have nothing in common
        return 0
    if ids[:count] == others[at : at + count]:
        return count
    # Whole slices are compared, in C: token by token takes a millisecond for each 20,000.
    return bisect.bisect_left(range(count), True, key=lambda n: ids[: n + 1] != others[at : at + n + 1])
