"""A pass: the next tokens of some rows go through the model together, and a token is picked for those that are ready.

Nothing is waited for: what is returned is being computed, and the next pass can be built over it.
"""

from __future__ import annotations

import itertools
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakKeyDictionary

import mlx.core as mx

from runner.cache.several import SeveralCaches
from runner.engine.compiled import Broken, Compiled, Known, RowSteps, greatest
from runner.engine.loaded import Loaded
from runner.engine.rows import AnySteps, Feed, Row
from runner.engine.sampler import Sampled, Sampler, SamplingState, Token
from runner.errors import NumericsError
from runner.nn.batch import Batch, Segment

if TYPE_CHECKING:
    from runner.ops.cuda.rows_decoder import RowsStep

SCORED = 64
"""Rows of a prompt whose logits are held at a time, where all are wanted: 64 of a vocabulary of 150,000 take 40 MB."""


@dataclass(eq=False)
class Flight:
    """A pass under way.

    Attributes:
        fed: the rows whose known tokens it reads.
        read: how many of these there are.
        rows: those that it picks tokens for, and by how many rows of logits.
        logits: `[R, V]`, until tokens are picked; None where it picks nothing.
        states: what they are picked by.
        waits: arrays whose end is the end of the pass, where others would have to wait for it.
        session: a kernel's tokens, where it computes and picks them, ahead of what is read; the next one is this pass'.
        step: what kernels compute for all rows; they find the likeliest tokens, and others are picked from its logits.
        compiled: whose kernels these are.
        lost: whether they have failed.
    """

    fed: list[Row]
    read: int
    rows: list[tuple[Row, int]]
    logits: mx.array | None
    waits: list[mx.array]
    states: list[SamplingState] = field(default_factory=list)
    sampled: Sampled | None = None
    session: Generator[Token | NumericsError] | None = None
    step: RowsStep | None = None
    compiled: Compiled | None = None
    lost: bool = False
    _known: list[int] = field(default_factory=list)

    @property
    def plain(self) -> bool:
        """Whether its tokens can be picked before those of the last pass are known."""
        return all(row.course is None or row.course.plain for row, _ in self.rows)

    @property
    def tokens(self) -> mx.array:
        """The tokens `[R]` that it picked, which may still be computed."""
        if self.sampled is not None:
            return self.sampled.tokens
        assert self.step is not None
        return mx.array([token for token, _ in self.step.best], mx.uint32)

    def token(self, place: int) -> int:
        """The token that it picked at a place, as the next step by kernels takes it: see `RowsDecoder.begin`."""
        if self.sampled is None and self.step is not None and self.step.latest:
            return ~place
        if not self._known:
            self._known = cast(list[int], self.tokens.tolist())
        return self._known[place]

    def step_logits(self) -> mx.array:
        """The logits of its step by kernels, once that has ended.

        Raises:
            Broken: it has failed.
        """
        assert self.step is not None and self.compiled is not None
        return self.compiled.row_logits(self.step)

    def rest(self) -> None:
        """Wait until its kernels have ended, if it is computed by any."""
        if self.step is not None:
            self.step.wait()

    def land(self) -> list[list[Token | NumericsError]]:
        """Wait for the pass, and return what it picked for each row: nothing where its kernel has failed."""
        if self.session is not None:
            try:
                return [[next(self.session)]]
            except Broken:
                return [[]]
        if self.waits:
            mx.eval(self.waits)
            self.waits = []  # who holds a cache's buffer keeps it from being written in place
        if self.step is not None and self.sampled is None and not self.lost:
            assert self.compiled is not None
            try:
                return [[token] for token in self.compiled.likeliest(self.step)]
            except Broken:
                self.lost = True
        if self.lost:
            return [[] for _ in self.rows]
        picked = [] if self.sampled is None else self.sampled.read(self.states)
        ends = itertools.accumulate((count for _, count in self.rows), initial=0)
        return [picked[first:last] for first, last in itertools.pairwise(ends)]


class Passes:
    """Makes the passes of one model."""

    def __init__(self, loaded: Loaded) -> None:
        self._loaded = loaded
        self._ops = loaded.device.ops
        self._sampler = Sampler(self._ops)
        self._several: tuple[SeveralCaches, AnySteps] | None = None  # of the last passes, while the rows are the same
        self._known: Known = WeakKeyDictionary()

    def waits(self, row: Row, rows: int) -> bool:
        """Whether the next pass of a row, which is one of so many, is made only when the token before it is known.

        Guesses are read behind tokens that are certain; so do a kernel's steps begin, for one that is alone.
        """
        assert row.course is not None
        return row.course.waits(rows) or (rows == 1 and self._fits_kernel(row))

    def launch(self, feeds: Sequence[tuple[Row, Feed]]) -> Flight:
        """Begin a pass; the caches of the rows go forward by what they are fed."""
        if len(feeds) == 1 and (session := self._session(*feeds[0])) is not None:
            row = feeds[0][0]
            row.picked, row.flight = row.picked + 1, None
            return Flight([], 0, [(row, 1)], None, [], session=session)
        fed = [row for row, feed in feeds if feed.ids is not None]
        watched = any(row.course is not None and row.course.watched for row, _ in feeds)
        # A single token that is known goes the way of those that were picked, where kernels compute them.
        single = all(feed.count == feed.picks == 1 and row.offset and row.order.scores is None for row, feed in feeds)
        by_steps = not watched and (not fed or (single and self._loaded.decodes_rows))
        step = self._begin(feeds) if by_steps else None
        logits = None if step is not None else self._step(feeds) if by_steps else self._read(feeds)
        # Behind what others wait for: a prompt's last layers have nobody else who asks for their rows.
        waits = [array for row in fed if row.caches is not None for array in row.caches.arrays]
        read = sum(feed.count for _, feed in feeds if feed.ids is not None)
        flight = Flight(fed, read, [(row, feed.picks) for row, feed in feeds if feed.picks], logits, waits)
        flight.step, flight.compiled = step, self._loaded.compiled
        if step is None and (logits is None or not flight.plain):
            self._ops.schedule(*([] if logits is None else [logits]), *waits)
        place = 0
        for row, count in flight.rows:
            row.picked += 1
            row.flight = (flight, place)
            place += count
        return flight

    def pick(self, flight: Flight) -> None:
        """Begin to pick the tokens of a pass; those that came before are known, where its rows need that.

        What kernels compute is waited for, unless they pick all of its tokens.
        """
        if flight.step is not None:
            states = [row.course.state for row, _ in flight.rows if row.course is not None and row.course.plain]
            if len(states) == len(flight.rows) and all(map(greatest, states)):
                for state in states:
                    state.position += 1
                return
        elif flight.logits is None:
            return
        for row, count in flight.rows:
            assert row.course is not None
            if row.done or row.course.plain:
                flight.states += [row.course.state] * count
                continue
            if count == 1:
                row.course.plan(0)
            flight.states += row.course.rows
        try:
            given = flight.step_logits if flight.logits is None else flight.logits
            flight.sampled = self._sampler(given, flight.states)
        except Broken:
            flight.lost = True
            return
        flight.logits = None
        self._ops.schedule(*[array for array in flight.sampled if array is not None], *flight.waits)

    def _session(self, row: Row, feed: Feed) -> Generator[Token | NumericsError] | None:
        """The tokens of a row that is alone, by one kernel for whole steps; None where it is none for that."""
        if row.session is None and feed.ids is None and not row.unread and self._fits_kernel(row):
            assert row.course is not None and row.caches is not None
            count = row.order.budget - row.picked
            self._known.pop(row.caches, None)
            row.session = self._loaded.compiled.decode(row.caches, row.ids[-1], count, row.course.state)
        return row.session

    def _fits_kernel(self, row: Row) -> bool:
        assert row.course is not None
        return not row.broken and row.course.plain and self._loaded.compiled.prepare()

    def _steps(self, feeds: Sequence[tuple[Row, Feed]]) -> AnySteps:
        """What takes these rows through a step."""
        rows = [row for row, _ in feeds]
        each = [row.caches for row in rows if row.caches is not None]
        if len(each) == 1:
            if rows[0].steps is None:
                rows[0].steps = self._loaded.steps(each[0], self._known)
            if not isinstance(rows[0].steps, RowSteps):
                self._known.pop(each[0], None)
            return rows[0].steps
        if self._several is None or not _same(self._several[0].each, each):
            caches = SeveralCaches(each, [1] * len(each))
            self._several = (caches, self._loaded.steps(caches, self._known))
        return self._several[1]

    def _begin(self, feeds: Sequence[tuple[Row, Feed]]) -> RowsStep | None:
        """A step behind a token of each row, begun by kernels; None where these cannot."""
        steps = self._steps(feeds)
        if not isinstance(steps, RowSteps) or self._loaded.compiled.rows() is None:
            return None
        tokens: list[int] = []
        for row, feed in feeds:
            if feed.ids is not None:
                tokens.append(feed.ids[0])
            elif row.unread:
                assert row.flight is not None
                tokens.append(row.flight[0].token(row.flight[1]))
            else:
                tokens.append(row.ids[-1])
        try:
            return steps.begin(tokens)
        except Broken:
            return None

    def _step(self, feeds: Sequence[tuple[Row, Feed]]) -> mx.array:
        """Logits `[R, V]` behind a token of each row."""
        for row, _ in feeds:
            row.rest()
        self._use([(row, 1) for row, _ in feeds])
        return self._steps(feeds)(self._ids(feeds))

    def _read(self, feeds: Sequence[tuple[Row, Feed]]) -> mx.array | None:
        """Logits `[R, V]` of the rows that pick a token; None: there are none."""
        model, rows = self._loaded.model, [row for row, _ in feeds]
        for row in rows:
            row.rest()
            row.steps = None
            if row.caches is not None:
                self._known.pop(row.caches, None)
        self.forget()
        segments = [Segment(feed.count, row.offset, feed.length) for row, feed in feeds]
        ids = self._ids(feeds)
        self._use([(row, feed.count) for row, feed in feeds])
        if len(feeds) == 1:
            assert rows[0].caches is not None
            hidden = model(Batch(ids, rows[0].offset, segments[0].length), rows[0].caches)
        else:
            each = [row.caches for row in rows if row.caches is not None]
            hidden = model(Batch.of(ids, segments), SeveralCaches(each, [segment.count for segment in segments]))
        last: list[int] = []
        start = 0
        for (row, feed), segment in zip(feeds, segments, strict=True):
            self._use([(row, 1)])
            if row.order.scores is not None and feed.ids is not None:
                self._score(row, hidden[:, start : start + segment.count], segment)
            if row.course is not None and row.course.watched:
                certain = feed.ids is not None and feed.picks < 2
                shows = row.course.saw if certain else row.course.show
                shows(hidden[:, start : start + segment.count], segment.offset)
            start += segment.count
            last += range(start - feed.picks, start)
        if not last:
            return None
        self._use([(row, feed.picks) for row, feed in feeds])
        return model.logits(hidden if len(last) == start else mx.take(hidden, mx.array(last), axis=1))[0]

    def _use(self, counts: Sequence[tuple[Row, int]]) -> None:
        """Let layers compute with the adapters of these rows, which have so many tokens each."""
        if self._loaded.adapters is None:
            return
        runs: list[tuple[int, Mapping[str, float]]] = []
        for row, count in counts:
            if runs and runs[-1][1] == row.order.weights:
                runs[-1] = (runs[-1][0] + count, row.order.weights)
            elif count:
                runs.append((count, row.order.weights))
        self._loaded.use_adapters(*runs)

    def _ids(self, feeds: Sequence[tuple[Row, Feed]]) -> mx.array:
        """The ids `[1, T]` of a pass; those of single tokens may still be computed."""
        if all(feed.ids is None for _, feed in feeds):
            return self._picked([row for row, _ in feeds])[None]
        pieces: list[mx.array] = []
        for known, group in _runs(feeds):
            if known:
                pieces.append(mx.array([token for _, feed in group for token in feed.ids or ()], dtype=mx.int32))
            else:
                pieces.append(self._picked([row for row, _ in group]).astype(mx.int32))
        return mx.concatenate(pieces)[None]

    def _picked(self, rows: Sequence[Row]) -> mx.array:
        """The tokens `[R]` that were picked last for these rows."""
        found = [row.flight for row in rows]
        first = found[0]
        assert first is not None
        parts: list[mx.array] = []
        places: list[int] = []
        of: Flight | None = None
        for one in [*found, None]:
            if of is not None and (one is None or one[0] is not of):
                tokens = of.tokens
                whole = places == list(range(tokens.shape[0]))
                parts.append(tokens if whole else mx.take(tokens, mx.array(places)))
                places = []
            if one is not None:
                of = one[0]
                places.append(one[1])
        return parts[0] if len(parts) == 1 else mx.concatenate(parts)

    def forget(self) -> None:
        """Let go of the caches of rows that have ended."""
        self._several = None

    def _score(self, row: Row, hidden: mx.array, segment: Segment) -> None:
        """Add the log-probabilities of those tokens of the prompt that follow this segment's, `hidden` `[1, L, H]`."""
        found, top = row.mailbox.scores, row.order.scores or 0
        if not found:
            found.append(Token(row.order.ids[0]))
        first = len(found)  # a prompt that is read again has some already
        following = row.order.ids[first : segment.offset + segment.count + 1]
        for start in range(0, len(following), SCORED):
            ids = following[start : start + SCORED]
            place = first + start - 1 - segment.offset
            logits = self._loaded.model.logits(hidden[:, place : place + len(ids)])[0].astype(mx.float32)
            scores = self._ops.log_probabilities(logits, mx.array(ids, dtype=mx.uint32), [top] * len(ids))
            lists: list[Any] = [array.tolist() for array in scores]
            likeliest = [list(zip(*pair, strict=True)) for pair in zip(*lists[1:], strict=True)]
            found += [Token(*one) for one in zip(ids, lists[0], likeliest or [None] * len(ids), strict=True)]  # type: ignore[list-item]


def _runs(feeds: Sequence[tuple[Row, Feed]]) -> list[tuple[bool, list[tuple[Row, Feed]]]]:
    """Neighbours whose ids are all known, or all not."""
    runs: list[tuple[bool, list[tuple[Row, Feed]]]] = []
    for one in feeds:
        known = one[1].ids is not None
        if not runs or runs[-1][0] != known:
            runs.append((known, []))
        runs[-1][1].append(one)
    return runs


def _same(one: Sequence[object], other: Sequence[object]) -> bool:
    return len(one) == len(other) and all(a is b for a, b in zip(one, other, strict=True))
