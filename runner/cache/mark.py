"""What is kept of a sequence beside its caches: places to come back to, and rows to make other caches of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import mlx.core as mx


class Mark(NamedTuple):
    """One cache at one place: the number of tokens, and the arrays that bring it back there."""

    offset: int
    arrays: Mapping[str, mx.array]

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return sum(array.nbytes for array in self.arrays.values())


class Edge(NamedTuple):
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
