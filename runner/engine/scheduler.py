"""Decides, between two passes, whose tokens go into the next one: ids in, ids out.

Rows that decode go first, with a token each; prompts fill the rest of a budget of tokens, piece by piece, by priority
and then in the order in which they came. The next pass is begun before the last one's tokens are read. All of it
happens on the thread that owns the device.
"""

from __future__ import annotations

import bisect
import itertools
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from runner.engine.loaded import Loaded
from runner.engine.passes import Flight, Passes
from runner.engine.rows import Feed, Row
from runner.engine.sampler import SamplingState, Token
from runner.engine.speculation import Continuation
from runner.engine.ticket import Mailbox, Order
from runner.errors import NumericsError, RunnerError
from runner.nn.batch import Apart
from runner.ops.memory import Memory

if TYPE_CHECKING:
    from runner.engine.budget import Budget

MOST = 64
"""Rows at once, where nothing else is said."""

PAUSE = 0.08
"""Seconds that a pass should take at most while somebody waits for a token: pieces of prompts are cut to that."""

LEAST = 32
"""Tokens of a piece of a prompt, however slow the machine is: a matrix is read from memory for each pass."""

ALONE = 32
"""Tokens of a prompt from which its last one is read by itself, where that saves layers for the others: reading it so
costs a pass over all weights."""

WEIGHED_EVERY = 16
"""Passes between two looks at how much the rows have grown; what they are admitted with lasts for some of these."""

SETTLED_EVERY = 256
"""Passes after which freed buffers are given back, on devices where they pile up."""


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


class Scheduler:
    """The requests to one model: those that wait, and the rows that are computed."""

    def __init__(
        self,
        loaded: Loaded,
        keeper: Keeper,
        *,
        rows: int = MOST,
        budget: Budget | None = None,
        memory: Memory | None = None,
    ) -> None:
        """Begin with none; a job of the owner's thread.

        Args:
            keeper: where caches come from, and what becomes of them.
            rows: how many sequences are computed at once at most.
            budget: the bytes that they may take; None: as many as there are.
            memory: watches what is held; None: nobody asks.
        """
        self.loaded = loaded
        self.budget = budget
        self.rows = rows
        self.waiting: list[Row] = []  # by rank, as `live` is
        self.live: list[Row] = []
        self.passes = 0
        self.held = 0  # bytes of their caches, when these were last weighed
        self.memory = memory or Memory(loaded.device.clears)
        self.keeper = keeper
        self._maker = Passes(loaded)
        self._flights: list[Flight] = []
        self._pace = 0.0  # seconds for a token of a prompt, beside decoding rows; 0: not known yet

    def add(self, order: Order, mailbox: Mailbox) -> None:
        """Take a request in; its turn comes in `step`."""
        bisect.insort(self.waiting, Row(order, mailbox), key=lambda row: row.rank)

    def step(self) -> bool:
        """Begin the next pass, and read the last one's tokens; false where there is nothing more to do."""
        self._sweep()
        self._admit()
        begun = time.perf_counter()
        if any(self._maker.waits(row, alone=len(self.live) == 1) for row in self.live if row.unread):
            self._land()
        flights = []
        try:
            for feeds in self._planned():
                flights.append(self._maker.launch(feeds))
                if flights[-1].plain:
                    self._maker.pick(flights[-1])
        except Apart:
            self._separate()
        self._land()
        for flight in flights:
            self._maker.pick(flight)
        self._flights, read = flights, sum(flight.read for flight in flights)
        if read or any(flight.session for flight in flights):
            # A prompt's piece takes long: what follows it is built when it is done, over buffers that nobody holds. And
            # a kernel for whole steps is ahead by itself.
            self._land()
        if read >= LEAST:
            now = (time.perf_counter() - begun) / read
            self._pace = now if not self._pace else (self._pace + now) / 2
        self.passes += 1
        if self.passes % WEIGHED_EVERY == 0:
            self._relieve()
        if self.passes % SETTLED_EVERY == 0 or read >= LEAST:
            self.memory.settle()
        if self.live or self.waiting or self._flights:
            return True
        self._maker.forget()
        self.loaded.unwire(self)
        self.held = 0
        return False

    def keep(self) -> None:
        """Before the end: let what was computed be kept."""
        self._land()
        for row in self.live:
            self._part(row)

    def safe_step(self) -> bool:
        """`step`; where it raises, every request has ended with its error, and nothing it computed is kept."""
        try:
            return self.step()
        except BaseException as error:
            self.fail(error)
            raise

    def fail(self, error: BaseException) -> None:
        """End every request with `error`."""
        rows, self.live, self.waiting, self._flights = [*self.live, *self.waiting], [], [], []
        for row in rows:
            row.end("error", error)
            self._part(row, sound=False)
        self.keeper.clear()
        self._maker.forget()
        self.loaded.unwire(self)

    @property
    def starting(self) -> bool:
        """Whether a prompt is still to be read, and no token was made of it."""
        return any(row.reading and not row.picked for row in (*self.live, *self.waiting))

    @property
    def busy(self) -> bool:
        """Whether any row is computed."""
        return bool(self.live)

    @property
    def nbytes(self) -> int:
        """Bytes of the caches of all rows, and of what guesses for them."""
        return sum(row.nbytes for row in self.live)

    def evict(self, nbytes: int) -> int:
        """Nothing of live rows goes as long as there are prefixes: see `_relieve`."""
        return 0

    # ---- who takes part

    def _sweep(self) -> None:
        """End what nobody waits for any more, and what has taken too long."""
        now = time.monotonic()
        for row in [*self.live, *self.waiting]:
            if row.mailbox.cancelled:
                self._end(row, "cancelled")
            elif row.order.deadline <= now:
                self._end(row, "timeout")

    def _admit(self) -> None:
        """Let those who wait begin, in their order, while there is room."""
        for row in list(self.waiting):
            if len(self.live) >= self.rows:
                return
            if self.live and self.keeper.awaits(row, self.live):
                continue
            if self.budget is not None and not self._fits(row, self.budget):
                return
            self.waiting.remove(row)
            try:
                self._begin(row)
            except RunnerError as error:
                self._end(row, "error", error)
                continue
            bisect.insort(self.live, row, key=lambda row: row.rank)
            self.loaded.wire(self, sum(len(other.order.ids) + other.order.budget for other in self.live))

    def _fits(self, row: Row, budget: Budget) -> bool:
        """Whether there are bytes for a row to begin now; kept prefixes make room for it."""
        from runner.engine.budget import ALLOWANCE

        tokens = min(len(row.ids) + ALLOWANCE, row.length + row.order.budget)
        # Those that are reading their prompts will take more than they have.
        growth = sum(max(0, self._size(one, len(one.ids)) - one.nbytes) for one in self.live if one.reading)
        needed = growth + max(0, self._size(row, tokens) - self.keeper.offered(row))
        budget.press(budget.used + needed - budget.room)
        return not budget.busy or budget.used + needed <= budget.room

    def _size(self, row: Row, tokens: int) -> int:
        """Bytes that a row's caches, and those of what guesses for it, have at so many tokens."""
        beside = row.order.beside
        return self.loaded.footprint.of(tokens) + (0 if beside is None else beside.of(tokens))

    def _begin(self, row: Row) -> None:
        if row.course is None:
            row.course = self._course(row.order)
        self.keeper.begin(row)

    def _course(self, order: Order) -> Continuation:
        config = self.loaded.config
        state = SamplingState(order.params, config.vocab_size, order.ids, choice=order.choice)
        single = config.rope_depends_on_length
        proposer = None if single or order.proposer is None else order.proposer()
        return Continuation(state, order.ids, guide=order.guide, proposer=proposer, single=single)

    def _relieve(self) -> None:
        """Where the live rows have grown beyond the budget: kept prefixes go, then the youngest row goes on later."""
        self.held = self.nbytes
        if (budget := self.budget) is None:
            return
        budget.press(budget.used - budget.room)
        while len(self.live) > 1 and budget.used > budget.room:
            self._land()
            if len(self.live) < 2:
                return
            self._pause(self.live[-1])
            budget.press(budget.used - budget.room)

    def _pause(self, row: Row, *, sound: bool = True) -> None:
        """Put a row back among those that wait; what its caches held is read again, if it has to go."""
        self.live.remove(row)
        self._part(row, sound=sound)
        self._maker.forget()
        bisect.insort(self.waiting, row, key=lambda row: row.rank)

    def _end(self, row: Row, reason: str, error: BaseException | None = None) -> None:
        row.end(reason, error)
        for rows in (self.live, self.waiting):
            if row in rows:
                rows.remove(row)
        self._part(row, sound=error is None)
        self._maker.forget()

    def _part(self, row: Row, *, sound: bool = True) -> None:
        """Take the caches from a row; not `sound`: after a pass that failed."""
        row.end_session()  # first: the kernel may write ahead of them
        self.keeper.leave(row, sound=sound)
        row.leave()

    # ---- what they are fed

    def _planned(self) -> list[list[tuple[Row, Feed]]]:
        """What the rows put into the next pass; into several, where adapters differ and layers cannot share one."""
        room = self.loaded.device.chunk
        ready = [row for row in self.live if not row.finished]
        if len(ready) > 1:
            for row in ready:
                row.end_session()
        turned = [row for row in ready if not row.reading and self._crosses(row)]
        deciding = [row for row in ready if not row.reading and row not in turned]
        readers = [row for row in ready if row.reading]
        for row in turned:
            if row.length == len(row.ids):  # all of it is read from the device
                self._part(row)
                row.anew()
                self.keeper.begin(row)
                readers.append(row)
        room = max(1, room - len(deciding))
        if deciding and self._pace:
            room = min(room, max(LEAST, self.loaded.device.cut, int(PAUSE / self._pace)))
        exact = self.loaded.config.rope_depends_on_length
        chosen = [(row, self._next(row)) for row in deciding]
        room -= sum(feed.count - 1 for _, feed in chosen)
        begun = False
        for row in readers:
            if room < 1:
                break
            count = self._piece(row, room, alone=not chosen)
            if begun and count < min(self.loaded.device.cut, len(row.ids) - row.offset):
                break  # a small piece of a prompt has a length of its own
            begun = True
            feed = row.feed(count, exact=exact)
            chosen.append((row, feed))
            room -= feed.count
        if self.loaded.adapters is not None:  # neighbours that have the same are computed together
            chosen.sort(key=lambda one: _adapters(one[0]))
        if self.loaded.adapters is None or self.loaded.mixes:
            return self._apart(chosen)
        return [list(feeds) for _, feeds in itertools.groupby(chosen, lambda one: _adapters(one[0]))]

    def _apart(self, chosen: list[tuple[Row, Feed]]) -> list[list[tuple[Row, Feed]]]:
        """Single tokens apart from prompts, where kernels compute them: they do not go the way of those beside them."""
        ends = [(row, feed) for row, feed in chosen if feed.count == 1 and row.offset]
        if not ends or len(ends) == len(chosen) or not self.loaded.decodes_rows:
            return [chosen] if chosen else []
        return [ends, [one for one in chosen if one not in ends]]

    def _separate(self) -> None:
        """A layer could not tell the rows apart in one pass: from now on each set of adapters has its own.

        The layers before it may have gone forward, so that all rows begin anew, from prefixes that were kept.
        """
        self._land()
        self.loaded.mixes = False
        for row in list(self.live):
            self._pause(row, sound=False)

    def _next(self, row: Row) -> Feed:
        """What a row that decodes is fed: guesses only behind a token that is certain."""
        assert row.course is not None
        if row.course.plain or row.unread:
            return Feed(None, None, 1)
        self.loaded.use_adapters((1, row.order.weights))  # the model's own layers may take part in guessing
        return row.guessed()

    def _piece(self, row: Row, room: int, *, alone: bool) -> int:
        """How many known tokens of a row to read next."""
        left = len(row.ids) - row.offset
        if (stop := self.keeper.stop(row)) is not None and stop - row.offset <= min(room, left):
            room = stop - row.offset
        elif self.loaded.device.cut <= room < left:
            room -= room % self.loaded.device.cut
        # Layers without keys leave nothing for later tokens: only the last one, whose logits are wanted, passes them.
        if alone and ALONE < left <= room and self.loaded.shares_keys and row.order.scores is None:
            return left - 1
        return min(left, room)

    def _crosses(self, row: Row) -> bool:
        """Whether the next token has keys of other frequencies than those before it: all is read anew then."""
        border = self.loaded.config.rope_border
        return border is not None and row.prompt <= border < row.length

    # ---- what comes of it

    def _land(self) -> None:
        """Read the tokens of the passes under way, and end the rows that they finish."""
        flights, self._flights = self._flights, []
        for flight in flights:
            place, landed = 0, flight.land()
            for row in flight.fed:
                if not row.done:
                    self.keeper.mark(row)
                    row.progressed()
            for (row, count), picked in zip(flight.rows, landed, strict=True):
                if not picked:
                    row.lose()
                elif not row.done:
                    self._took(row, flight, place, picked)
                place += count
            for row in flight.fed:
                if row.order.budget == 0 and not row.done and not row.reading:
                    self._end(row, "length")

    def _took(self, row: Row, flight: Flight, place: int, picked: list[Token | NumericsError]) -> None:
        """Add to a row what was picked for it at `place` and behind it, as far as guesses were right."""
        try:
            tokens = self._certain(row, picked)
        except NumericsError as error:
            self._end(row, "error", self._explained(row, error))
            return
        except RunnerError as error:  # its grammar has become too much work
            self._end(row, "error", error)
            return
        ended = ""
        for token in tokens:
            row.take(token)
            if token.id in row.order.ends:
                ended = "stop"
                break
        if len(row.ids) == len(row.order.ids) + row.order.budget:
            ended = ended or "length"
        if len(picked) > 1:
            row.settle(flight, place + len(tokens) - 1, len(tokens), len(picked))
        if ended:
            self._end(row, ended)

    def _certain(self, row: Row, picked: list[Token | NumericsError]) -> list[Token]:
        assert row.course is not None
        if not row.course.plain:
            self.loaded.use_adapters((1, row.order.weights))
            return row.course.accept(picked)
        (token,) = picked
        if isinstance(token, NumericsError):
            raise token
        return [token]

    def _explained(self, row: Row, error: NumericsError) -> NumericsError:
        return NumericsError(
            f"no token can be picked at position {len(row.ids)}: the logits hold {error} "
            f"({str(self.loaded.dtype).removeprefix('mlx.core.')}); weights or activations are out of the range of "
            "their type (dtype='float32' may help), or a bias or penalty is too large"
        )


def _adapters(row: Row) -> list[tuple[str, float]]:
    """Which adapters a row has, in an order."""
    return sorted(row.order.weights.items())
