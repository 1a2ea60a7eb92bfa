"""Progress bar for work that takes over a second; before that nothing is drawn and `rich` is not imported."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

Watched = bool | Callable[[int, int], None]
"""Whether a bar shows progress on stderr; or what is called with the bytes that are done, and those in all."""

PATIENCE = 1.0
"""Seconds of work after which the bar appears."""


class ProgressBar:
    """Progress bar on stderr: `with ProgressBar("loading", enabled=True) as bar: work(bar.update)`."""

    def __init__(self, title: str, *, enabled: Watched, rate: bool = False) -> None:
        """Make a bar for bytes, on a terminal if `enabled`; `rate`: with bytes per second and the time left."""
        self._told = enabled if callable(enabled) else None
        self._title = title
        self._enabled = enabled is True
        self._rate = rate
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
        """Show that `done` of `total` bytes are done."""
        if self._told is not None:
            self._told(done, total)
        if not self._enabled or (self._bar is None and time.monotonic() - self._started < PATIENCE):
            return
        if self._bar is None:
            from rich import progress as parts
            from rich.console import Console

            columns = [parts.TextColumn("{task.description}"), parts.BarColumn(), parts.DownloadColumn()]
            if self._rate:
                columns += [parts.TransferSpeedColumn(), parts.TimeRemainingColumn(), parts.TextColumn("left")]
            progress = parts.Progress(*columns, console=Console(stderr=True), transient=True)
            self._bar = progress, progress.add_task(self._title, total=total)
            progress.start()
        self._bar[0].update(self._bar[1], completed=done, total=total)
