"""Where the caches of rows come from, and what becomes of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from runner.engine.rows import Row


class Keeper(Protocol):
    """Gives rows the caches that they begin with, and keeps what these hold at the end: for whoever begins alike.

    `runner.engine.sharing.Sharing` does so for many requests, `runner.engine.prompt_cache.PromptCache` for the turns of
    one conversation.
    """

    def begin(self, row: Row) -> None: ...
    def stop(self, row: Row) -> int | None: ...
    def mark(self, row: Row) -> None: ...
    def leave(self, row: Row, *, sound: bool = True) -> None: ...
    def offered(self, row: Row) -> int: ...
    def awaits(self, row: Row, live: Sequence[Row]) -> bool: ...
    def clear(self) -> None: ...


def part(row: Row, keeper: Keeper, *, sound: bool = True) -> None:
    """Take the caches from a row, and let them be kept; not `sound`: after a pass that failed."""
    row.rest()  # first: kernels may write ahead of them
    keeper.leave(row, sound=sound)
    row.leave()
