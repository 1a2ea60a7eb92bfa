"""Stop strings, matched on text: a stop that begins in one token and ends in another is found, and none of it leaks."""

from __future__ import annotations

from collections.abc import Sequence

from runner.errors import UsageError


class StopMatcher:
    """Feed pieces of text; get back what is safe to show. Holds back only what could still become a stop string."""

    def __init__(self, stops: Sequence[str]) -> None:
        """Raises `UsageError` for what is no text, and an empty one, which would end every answer before it begins."""
        if not all(isinstance(stop, str) for stop in stops):
            raise UsageError(f"stop strings must be text, not {stops!r}")
        if any(not stop for stop in stops):
            raise UsageError("a stop string must not be empty")
        self._stops = tuple(stops)
        self._longest = max(map(len, stops), default=0)
        self._held = ""

    def add(self, text: str) -> tuple[str, bool]:
        """Text that may be shown, and whether a stop was found: then nothing after it is ever shown."""
        if not self._stops:
            return text, False
        self._held += text
        starts = [start for start in map(self._held.find, self._stops) if start >= 0]
        if starts:
            shown, self._held = self._held[: min(starts)], ""
            return shown, True
        keep = self._pending()
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown, False

    def flush(self) -> str:
        """What was held back, once no more text comes."""
        tail, self._held = self._held, ""
        return tail

    def _pending(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        for size in range(min(self._longest - 1, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-size:]) for stop in self._stops):
                return size
        return 0
