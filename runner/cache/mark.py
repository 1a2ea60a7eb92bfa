"""What is kept of a sequence beside its caches: places to come back to, and rows to make other caches of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx

from runner.cache.storage import cut, gathered


class Mark(NamedTuple):
    """One cache at one place: the number of tokens, and the arrays that bring it back there."""

    offset: int
    arrays: Mapping[str, mx.array]

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return sum(array.nbytes for array in self.arrays.values())


@dataclass(frozen=True, eq=False)
class Edge:
    """The rows of the tokens from `first` up to `last`: those of each cache that keeps all rows, none of the others."""

    first: int
    last: int
    rows: tuple[Mapping[str, mx.array], ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return sum(array.nbytes for array in self.arrays)

    @property
    def arrays(self) -> list[mx.array]:
        """The rows, for `mx.eval`."""
        return [array for rows in self.rows for array in rows.values()]

    def part(self, first: int, last: int) -> Edge:
        """The rows from token `first` up to `last`: views."""
        start, end = first - self.first, last - self.first
        return Edge(first, last, tuple({name: cut(array, start, end) for name, array in r.items()} for r in self.rows))

    def copied(self) -> Edge:
        """A copy in memory that nothing else holds."""
        return self.joined(())

    def joined(self, others: Sequence[Edge]) -> Edge:
        """One edge of this one and those that follow on it, all of which have the same powers: a copy."""
        edges = (self, *others)
        rows = zip(*(edge.rows for edge in edges), strict=True)
        joined = tuple({name: gathered([one[name] for one in each]) for name in each[0]} for each in rows)
        return Edge(self.first, edges[-1].last, joined)


@dataclass(frozen=True, eq=False)
class Marks:
    """A place that all caches can come back to: a mark of each."""

    offset: int
    marks: tuple[Mark, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays that are kept for it."""
        return sum(mark.nbytes for mark in self.marks)

    @property
    def arrays(self) -> list[mx.array]:
        """The arrays that are kept for it, for `mx.eval`."""
        return [array for mark in self.marks for array in mark.arrays.values()]
