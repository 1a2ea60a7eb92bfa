"""The order of heads in matrices of several: of Gated DeltaNets' values, and of queries, keys and values.

llama.cpp's converters sort value heads so that it can repeat keys as a whole, and put all queries before all keys.

A key head serves as many value heads as there are for each. transformers has a key head's value heads side by side,
GGUF files first of each key head its first, then of each its second, and so on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from runner.errors import CheckpointError


class ValueHeads(NamedTuple):
    """How the value heads of one tensor lie.

    Attributes:
        keys, share: key heads, and value heads of each.
        before: rows ahead of the values: queries and keys.
        size: rows of a head; None: it is columns that belong to heads, all of them.
    """

    keys: int
    share: int
    before: int
    size: int | None

    def places(self, first: int, count: int) -> npt.NDArray[np.int64]:
        """Where `count` stored rows from `first` on belong."""
        assert self.size is not None
        rows = np.arange(first, first + count)
        head, inner = np.divmod(rows - self.before, self.size)
        slot, key = np.divmod(head, self.keys)
        return np.where(rows < self.before, rows, self.before + (key * self.share + slot) * self.size + inner)

    def columns(self, rows: Any) -> Any:
        """Rows `[n, columns]` with their columns in transformers' order; all heads have equally many."""
        parts = rows.reshape(rows.shape[0], self.share, self.keys, -1)
        return np.ascontiguousarray(parts.swapaxes(1, 2)).reshape(rows.shape)


class GroupedHeads(NamedTuple):
    """How the rows of queries, keys and values lie: transformers has a group's queries, then its key and its value.

    Attributes:
        groups, share: key heads, and queries of each.
        size: rows of a head.
    """

    groups: int
    share: int
    size: int

    def places(self, first: int, count: int) -> npt.NDArray[np.int64]:
        """Where `count` stored rows from `first` on belong."""
        head, inner = np.divmod(np.arange(first, first + count), self.size)
        queries = self.groups * self.share
        group, slot = np.divmod(head, self.share)
        part, other = np.divmod(head - queries, self.groups)
        place = np.where(head < queries, group * (self.share + 2) + slot, other * (self.share + 2) + self.share + part)
        return place * self.size + inner


def grouped_heads(rows: int, heads: int, groups: int) -> GroupedHeads:
    """The order in a matrix of `rows` rows for `heads` queries, and keys and values of `groups`."""
    if heads % groups or rows % (heads + 2 * groups):
        raise CheckpointError(f"{rows} rows do not divide into {heads} heads and keys and values of {groups}")
    return GroupedHeads(groups, heads // groups, rows // (heads + 2 * groups))


def value_heads(kind: str, config: Mapping[str, Any]) -> ValueHeads | None:
    """The heads of a tensor that has rows for queries, keys and values ("mixed"), rows for values ("values"), a row or
    number for each head ("heads"), or columns for values ("columns"); None where the order is the same."""
    keys, values = config["linear_num_key_heads"], config["linear_num_value_heads"]
    if keys == values or values % keys:
        return None  # the config refuses what is no multiple
    size = {"heads": 1, "columns": None}.get(kind, config["linear_value_head_dim"])
    before = 2 * keys * config["linear_key_head_dim"] if kind == "mixed" else 0
    return ValueHeads(keys, values // keys, before, size)
