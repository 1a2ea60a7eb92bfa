"""How many tokens of prompts a pass may read while others wait for their next token: as many as take a set time.

A pass is taken to last as long as a step of the rows that decode, and a time for each token of a prompt besides. Both
are measured as passes go by. Where a prompt is cut changes nothing of what is computed.

How long a pass may be, so that tokens keep coming and prompts are read all the same:

- As long as if all requests took turns with steps of their own: n of them, n times as long as a step of one alone. So
  nobody's tokens come slower than they would without being computed together.
- Or, for a prompt of which much is left, as long as cuts that into `PIECES`: each of them looks at all that was read
  before, and waits for a step of the others.
- No less than `SHORT` and no more than `LONG`; but twice a step of those that decode, where that is longer: at least
  half of a pass, which reads all weights, is then the piece's. Nor less than a step and the pause of a device, whose
  passes with prompts take their time however short they are.
"""

from __future__ import annotations

import math

SHORT = 0.02
"""Seconds that any pass may last: 50 tokens a second are more than anybody reads."""

LONG = 0.1
"""Seconds that a pass lasts at most for a prompt's sake: a stream still gets 10 tokens a second."""

PIECES = 32
"""Pieces that what is left of a long prompt is cut into: fewer make others wait longer, and more the prompt."""

LEAST = 16
"""Tokens of a piece, however slow the machine is: fewer cost nearly as much."""

FEW = 8
"""Tokens from which a pass tells anything of the time that each takes."""


class Pace:
    """Measures passes, and says how much of prompts the next one is to read."""

    def __init__(self, pause: float = 0.0) -> None:
        """`pause` is a device's: seconds by which a piece may prolong a step in any case."""
        self._pause = pause
        self._steps: dict[int, float] = {}  # seconds of a step, by its rows: of more rows no less
        self._token = 0.0  # seconds that a prompt's token adds; 0: not known yet

    def took(self, seconds: float, read: int, rows: int) -> None:
        """Count a pass that read so many tokens of prompts, and made a token of each of `rows` that wait for them."""
        if not read:
            rows = max(1, rows)
            now = _mean(self._steps.get(rows, 0.0), seconds)
            # What was measured when contexts had another length, or the machine other work, goes.
            kept = {n: old for n, old in self._steps.items() if (old < now if n < rows else old > now)}
            self._steps = {**kept, rows: now}
        elif read >= FEW:
            # More than nothing, even where a step takes less time now than it did.
            self._token = _mean(self._token, (seconds - min(self._step(rows), seconds / 2)) / read)

    def room(self, rows: int, requests: int, left: int) -> int:
        """Tokens of prompts for the next pass with so many rows that decode: few where nothing is known, to learn.

        Args:
            requests: how many there are, those that decode and those whose prompts are read.
            left: tokens of the prompt that is read next.
        """
        if not self._token:
            return LEAST
        step = self._step(rows)
        wanted = max(requests * self._step(1), step + left * self._token / PIECES)
        seconds = max(min(max(wanted, SHORT), LONG), 2 * step, step + self._pause)
        return max(LEAST, int((seconds - step) / self._token))

    def _step(self, rows: int) -> float:
        """Seconds of a step of so many rows, 0 where none was seen.

        One of others is taken to grow with the root of the rows: it would not at all where reading the weights is all
        of it, and would with the rows where nothing is shared.
        """
        if not rows or not self._steps:
            return 0.0
        if rows in self._steps:
            return self._steps[rows]
        fewer = max((n for n in self._steps if n < rows), default=0)
        more = min((n for n in self._steps if n > rows), default=0)
        near = fewer or more
        found = self._steps[near] * math.sqrt(rows / near)
        return min(found, self._steps[more]) if more else found


def _mean(old: float, new: float) -> float:
    """The latest counts as much as all before it."""
    return (old + new) / 2 if old else new
