"""A place in a sequence that a cache can come back to after it has moved on."""

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
