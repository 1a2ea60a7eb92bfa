"""A progress bar for what takes over a second; nothing is drawn, and nothing imported, before that."""

from __future__ import annotations

import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

PATIENCE = 1.0
"""Seconds without a bar."""


class ProgressBar:
    """`with ProgressBar("loading") as bar: work(bar.update)`; draws on stderr."""

    def __init__(self, title: str, *, enabled: bool) -> None:
        self._title = title
        self._enabled = enabled
        self._started = time.monotonic()
        self._bar: tuple[Progress, TaskID] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar[0].stop()

    def update(self, done: int, total: int) -> None:
        """Bytes done and in all."""
        if not self._enabled or (self._bar is None and time.monotonic() - self._started < PATIENCE):
            return
        if self._bar is None:
            from rich.console import Console
            from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

            columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
            progress = Progress(*columns, console=Console(stderr=True), transient=True)
            self._bar = progress, progress.add_task(self._title, total=total)
            progress.start()
        self._bar[0].update(self._bar[1], completed=done, total=total)
