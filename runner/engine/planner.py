"""What rows are fed in the next pass: those that decode a token each, prompts the rest of a budget of tokens.

Prompts are cut into pieces, which take no longer than somebody may wait for a token, in the order of the rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from runner.engine.keeper import Keeper, part
from runner.engine.loaded import Loaded
from runner.engine.pace import Pace
from runner.engine.rows import Feed, Row

ALONE = 32
"""Tokens of a prompt from which its last one is read by itself, where that saves layers for the others: reading it so
costs a pass over all weights."""

Feeds = list[tuple[Row, Feed]]
"""What some rows are fed."""


class Planner:
    """Divides the tokens of passes of one model among rows.

    Attributes:
        pace: is told how long passes take.
    """

    def __init__(self, loaded: Loaded, keeper: Keeper) -> None:
        self._loaded = loaded
        self._keeper = keeper
        self.pace = Pace(loaded.device.pause)

    def plan(self, live: Sequence[Row]) -> list[Feeds]:
        """What the rows put into the next pass; into several, where adapters differ and layers cannot share one."""
        room = self._loaded.device.chunk
        ready = [row for row in live if not row.finished]
        if len(ready) > 1:
            for row in ready:
                row.end_session()
        turned = [row for row in ready if not row.reading and self._crosses(row)]
        deciding = [row for row in ready if not row.reading and row not in turned]
        readers = [row for row in ready if row.reading]
        for row in turned:
            if row.length == len(row.ids):  # all of it is read from the device
                part(row, self._keeper)
                row.anew()
                self._keeper.begin(row)
                readers.append(row)
        room = max(1, room - len(deciding))
        if deciding and readers:
            left = len(readers[0].ids) - readers[0].offset
            paced = self.pace.room(len(deciding), len(ready), left)
            room = min(room, max(self._loaded.device.cut, paced))
        exact = self._loaded.config.rope_depends_on_length
        chosen = [(row, self._next(row)) for row in deciding]
        room -= sum(feed.count - 1 for _, feed in chosen)
        begun = False
        for row in readers:
            if room < 1:
                break
            count = self._piece(row, room, alone=not chosen)
            if begun and count < min(self._loaded.device.cut, len(row.ids) - row.offset):
                break  # a small piece of a prompt has a length of its own
            begun = True
            feed = row.feed(count, exact=exact)
            chosen.append((row, feed))
            room -= feed.count
        if self._loaded.adapters is not None:  # neighbours that have the same are computed together
            chosen.sort(key=lambda one: _adapters(one[0]))
        if self._loaded.adapters is None or self._loaded.mixes:
            return self._apart(chosen)
        return [list(feeds) for _, feeds in itertools.groupby(chosen, lambda one: _adapters(one[0]))]

    def _apart(self, chosen: Feeds) -> list[Feeds]:
        """Single tokens apart from prompts, where kernels compute them: they do not go the way of those beside them."""
        ends = [(row, feed) for row, feed in chosen if feed.count == 1 and row.offset]
        if not ends or len(ends) == len(chosen) or not self._loaded.decodes_rows:
            return [chosen] if chosen else []
        return [ends, [one for one in chosen if one not in ends]]

    def _next(self, row: Row) -> Feed:
        """What a row that decodes is fed: guesses only behind a token that is certain."""
        assert row.course is not None
        if row.course.plain or row.unread:
            return Feed(None, None, 1)
        self._loaded.use_adapters((1, row.order.weights))  # the model's own layers may take part in guessing
        return row.guessed()

    def _piece(self, row: Row, room: int, *, alone: bool) -> int:
        """How many known tokens of a row to read next."""
        left = len(row.ids) - row.offset
        if (stop := self._keeper.stop(row)) is not None and stop - row.offset <= min(room, left):
            room = stop - row.offset
        elif self._loaded.device.cut <= room < left:
            room -= room % self._loaded.device.cut
        # Layers without keys leave nothing for later tokens: only the last one, whose logits are wanted, passes them.
        if alone and ALONE < left <= room and self._loaded.shares_keys and row.order.scores is None:
            return left - 1
        return min(left, room)

    def _crosses(self, row: Row) -> bool:
        """Whether the next token has keys of other frequencies than those before it: all is read anew then."""
        border = self._loaded.config.rope_border
        return border is not None and row.prompt <= border < row.length


def _adapters(row: Row) -> list[tuple[str, float]]:
    """Which adapters a row has, in an order."""
    return sorted(row.order.weights.items())
