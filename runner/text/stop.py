"""Stop strings, matched on text rather than ids: one that spans several tokens is found, and no part of it is shown."""

from __future__ import annotations

from collections.abc import Sequence

from runner.errors import UsageError


class StopMatcher:
    """Finds stop strings in text that arrives in pieces; holds back only text that could still become a stop string.

    Attributes:
        found: the stop string that was found; None so far.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        """Match any of `stops`.

        Raises:
            UsageError: a stop string is not a string, or is empty, which would end every answer before it begins.
        """
        if not all(isinstance(stop, str) for stop in stops):
            raise UsageError(f"stop strings must be text, not {stops!r}")
        if any(not stop for stop in stops):
            raise UsageError("a stop string must not be empty")
        self._stops = tuple(stops)
        self._held = ""
        self.found: str | None = None

    def add(self, text: str) -> tuple[str, bool]:
        """Take the next piece; return the text that may now be shown and whether a stop string was found.

        The text ends before the stop string; what follows the stop string is dropped.
        """
        if not self._stops:
            return text, False
        self._held += text
        starts = [(start, stop) for stop in self._stops if (start := self._held.find(stop)) >= 0]
        if starts:
            start, self.found = min(starts, key=lambda each: each[0])
            shown, self._held = self._held[:start], ""
            return shown, True
        # The tail that begins a stop string waits for the next piece; all before it can be in no stop string.
        cut = len(self._held) - unfinished(self._held, self._stops)
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown, False

    def flush(self) -> str:
        """Return the text held back, once no more text comes."""
        tail, self._held = self._held, ""
        return tail


def unfinished(text: str, wanted: Sequence[str]) -> int:
    """Length of the longest suffix of `text` that begins one of `wanted` but is shorter than it; 0 if there is none."""
    longest = max(map(len, wanted), default=0)
    for size in range(min(longest - 1, len(text)), 0, -1):
        if any(len(one) > size and one.startswith(text[-size:]) for one in wanted):
            return size
    return 0
