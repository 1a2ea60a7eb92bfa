"""How many tokens of prompts a pass may read while others wait for their next token: as many as take a set time.

A pass is taken to last as long as a step of the rows that decode, and a time for each token of a prompt besides. Both
are measured as passes go by. Where a prompt is cut changes nothing of what is computed.
"""

from __future__ import annotations

PAUSE = 0.02
"""Seconds by which a piece of a prompt may prolong a step, where nothing else is said; or as long as the step takes,
where that is longer: at least half of a pass, which reads all weights, is then the piece's."""

LEAST = 16
"""Tokens of a piece, however slow the machine is: fewer cost nearly as much."""

FEW = 8
"""Tokens from which a pass tells anything of the time that each takes."""

MOST_TIMES = 8
"""How many times as long as the last step one of more rows is taken to be at most."""


class Pace:
    """Measures passes, and says how much of prompts the next one is to read."""

    def __init__(self, pause: float = PAUSE) -> None:
        """`pause` is for a device's `PAUSE`."""
        self._pause = pause
        self._step = 0.0  # seconds of a step; 0: not known yet, as below
        self._rows = 1  # of that step
        self._token = 0.0  # seconds that a prompt's token adds

    def took(self, seconds: float, read: int, rows: int) -> None:
        """Count a pass that read so many tokens of prompts, and made a token of each of `rows` that wait for them."""
        if not read:
            self._step = _mean(self._step if rows == self._rows else 0.0, seconds)
            self._rows = max(1, rows)
        elif read >= FEW:
            # More than nothing, even where a step takes less time now than it did.
            self._token = _mean(self._token, (seconds - min(self._beside(rows), seconds / 2)) / read)

    def room(self, rows: int) -> int:
        """Tokens of prompts for the next pass with so many rows that decode: few where nothing is known, to learn."""
        return max(LEAST, int(max(self._pause, self._beside(rows)) / self._token)) if self._token else LEAST

    def _beside(self, rows: int) -> float:
        """Seconds of a step of so many rows: no less than the last one's, and growing with them. While prompts are read
        one after the other, rows become more, and no step tells what that costs."""
        return self._step * min(MOST_TIMES, max(1.0, rows / self._rows)) if rows else 0.0


def _mean(old: float, new: float) -> float:
    """The latest counts as much as all before it."""
    return (old + new) / 2 if old else new
