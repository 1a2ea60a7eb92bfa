"""Kept prefixes and the disk: what memory has no room for is written, what lies there is found and read again.

A file belongs to all nodes whose rows it has. Where one is gone, or was changed by somebody else, the tree forgets it
and what follows on it alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from runner.cache.caches import Caches, agreeing
from runner.cache.mark import Edge
from runner.engine.prefix_files import Listed, PrefixFiles, Stored
from runner.engine.prefix_tree import Node, alike
from runner.engine.prefix_trees import Trees


class PrefixDisk:
    """The disk's share of some trees."""

    def __init__(self, trees: Trees, files: PrefixFiles, new_caches: Callable[[], Caches]) -> None:
        """Enter what lies on disk into the trees, and remove what follows on nothing.

        Args:
            new_caches: makes empty caches of the model.
        """
        self._trees = trees
        self._files = files
        self._new_caches = new_caches
        listed = list(enumerate(files.listed(), 1))
        trees.events = len(listed)
        for used, one in sorted(listed, key=lambda pair: pair[1].stored.first):
            if not self._enter(one, used):
                files.remove(one.stored)

    @property
    def note(self) -> str | None:
        """Why nothing more is written; None where it is."""
        return self._files.note

    def write_all(self) -> None:
        """Put on disk what memory holds, as far as there is room, and wait for it."""
        room = self._files.limit
        written: list[Stored] = []
        for node in sorted(self._trees.ends(), key=lambda one: one.used, reverse=True):
            made = self.write(node, room)
            room -= sum(stored.nbytes for stored in made)
            written += made
        for stored in reversed(written):  # what was used last is the last to go
            self._files.touch(stored)
        self._files.finish()

    def write(self, node: Node, room: int | None = None) -> list[Stored]:
        """Put on disk what only memory holds of the way to the end of `node`; returns the new files.

        One file reaches from a marked place to the next one, or where other files begin.
        """
        trees, files = self._trees, self._files
        made: list[Stored] = []
        if files.note is not None:
            return made
        idle = [kept for kept in node.lines if kept.node is node and not kept.lent]
        if trees.needs_marks and node.marks is None and idle:
            trees.mark(idle[0])
        if trees.needs_marks and not node.has_marks:
            return made
        key = trees.key(node)
        path = list(node.up())[::-1]
        ids: list[int] = []
        run: list[Node] = []
        for above, following in itertools.zip_longest(path, path[1:]):
            ids += above.ids
            if above.file is None or (above.marks is not None and not above.marked_on_disk):
                run.append(above)
            if run and (following is None or above.marks is not None or following.file is not None):
                rows = self._rows(run)
                stored = None if rows is None else files.write(key, ids, rows, above.marks, room)
                if stored is None:
                    break
                for one in run:
                    one.file = stored
                made.append(stored)
                room, run = None if room is None else room - stored.nbytes, []
        return made

    def _rows(self, run: Sequence[Node]) -> Edge | None:
        """The rows of nodes that follow on each other, in memory all of them; None: they cannot be held together."""
        if not self._trees.keeps_rows:
            return self._new_caches().rows(run[0].start, run[-1].end)
        if run[-1].lines:
            return next(iter(run[-1].lines)).caches.rows(run[0].start, run[-1].end)
        edges: list[Edge] = []
        for node in run:
            if node.lines:
                edges.append(next(iter(node.lines)).caches.rows(node.start, node.end))
            elif node.edge is not None:
                edges.append(node.edge)
        if sum(edge.last - edge.first for edge in edges) != run[-1].end - run[0].start or agreeing(edges) < len(edges):
            return None
        return edges[0].joined(edges[1:])

    def restore(self, node: Node, read: dict[Stored, Edge]) -> Edge | None:
        """The rows of a file, and its marks to memory; None: it was lost, and with it part of the tree."""
        assert node.file is not None
        stored = node.file
        if stored not in read:
            if (found := self._files.read(stored)) is None:
                self._lose(stored)
                return None
            read[stored], marks = found
            if marks is not None and node.end == stored.last:
                node.marks, node.marked = marks, self._trees.now()
        return read[stored]

    def _lose(self, stored: Stored) -> None:
        """Forget a file, and what follows on it alone."""
        trees = self._trees
        nodes = list(trees.nodes())
        files = {node.file for node in nodes if node.file is not None}
        for node in nodes:
            if node.file is stored:
                node.file = None
                if not trees.covered(node) and node.attached:
                    trees.remove(node)
        for node in list(trees.nodes()):
            if node.attached:
                trees.prune(node)
        for lost in files - {node.file for node in trees.nodes()}:
            self._files.remove(lost)

    def _enter(self, listed: Listed, used: int) -> bool:
        """Take a file that was found into the tree; false: what it follows on is not there."""
        ids, stored = listed.ids, listed.stored
        root = self._trees.root(listed.key)
        found = root.find(ids[: stored.first])
        if found.common < stored.first:
            return False
        node = found.path[-1] if found.path else root
        if found.partly is not None:
            node = found.partly.split(stored.first - found.partly.start)
        while node.end < stored.last:
            child = node.children.get(ids[node.end])
            if child is None:
                child = Node(ids[node.end :], node)
            elif (count := alike(child.ids, ids, node.end)) < len(child.ids):
                child = child.split(count)
            if child.file is None or (child.end == stored.last and stored.marked):
                child.file = stored
            node = child
        for above in node.up():
            above.used = max(above.used, used)
        self._trees.prune(node)
        return True
