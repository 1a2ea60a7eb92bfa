"""Decides, between two passes, who takes part in the next one, and what comes of the last: ids in, ids out.

Requests go by priority, and then in the order in which they came. The next pass is begun before the last one's tokens
are read. All of it happens on the thread that owns the device. What each row is fed is `runner.engine.planner`'s part.
"""

from __future__ import annotations

import bisect
import dataclasses
import time
import traceback
from collections.abc import Mapping
from typing import TYPE_CHECKING

from runner.engine.keeper import Keeper, part
from runner.engine.loaded import Loaded
from runner.engine.pace import LEAST
from runner.engine.passes import Flight, Passes
from runner.engine.planner import Planner
from runner.engine.rows import Row
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

WEIGHED_EVERY = 16
"""Passes between two looks at how much the rows have grown; what they are admitted with lasts for some of these."""

SETTLED_EVERY = 256
"""Passes after which freed buffers are given back, on devices where they pile up."""


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
        self.memory = memory or Memory(loaded.device.keeps)
        self.keeper = keeper
        self._maker = Passes(loaded)
        self._planner = Planner(loaded, keeper)
        self._flights: list[Flight] = []
        self._begun = 0.0  # when the last pass was

    def add(self, order: Order, mailbox: Mailbox) -> None:
        """Take a request in; its turn comes in `step`."""
        bisect.insort(self.waiting, Row(order, mailbox), key=lambda row: row.rank)

    def step(self) -> bool:
        """Begin the next pass, and read the last one's tokens; false where there is nothing more to do.

        Raises:
            UsageError: the model was closed while there is something to do.
        """
        if self.live or self.waiting:
            self.loaded.check_open()
        self._sweep()
        self._admit()
        begun = time.perf_counter()
        if any(self._maker.waits(row, len(self.live)) for row in self.live if row.unread):
            self._land()
        flights = []
        try:
            for feeds in self._planner.plan(self.live):
                flights.append(self._maker.launch(feeds))
                if flights[-1].plain and flights[-1].step is None:  # kernels' steps would be waited for
                    self._maker.pick(flights[-1])
        except Apart:
            self._separate()
        lost = False
        if self._flights:
            rows = sum(len(flight.rows) for flight in self._flights)
            lost = self._land()
            now = time.perf_counter()
            self._planner.pace.took(now - self._begun, 0, rows)
            begun = now  # what was launched is computed from here on
        for flight in flights:
            self._maker.pick(flight)
        self._flights, read = flights, sum(flight.read for flight in flights)
        if read or lost or any(flight.session or flight.lost for flight in flights):
            # A prompt's piece takes long: what follows it is built when it is done, over buffers that nobody holds. A
            # kernel for whole steps is ahead by itself. And of kernels that have failed nothing else comes.
            self._land()
            if read:
                rows = sum(row not in flight.fed for flight in flights for row, _ in flight.rows)
                self._planner.pace.took(time.perf_counter() - begun, read, rows)
        self._begun = begun
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
            part(row, self.keeper)

    def safe_step(self) -> bool:
        """`step`; where it raises, every request has ended with its error, and nothing it computed is kept."""
        try:
            return self.step()
        except BaseException as error:
            self.fail(error)
            raise

    def fail(self, error: BaseException) -> None:
        """End every request with `error`, which is told of for as long as somebody may ask: it holds no arrays."""
        one: BaseException | None = error
        while one is not None:
            traceback.clear_frames(one.__traceback__)
            one = one.__cause__ or one.__context__
        rows, self.live, self.waiting, self._flights = [*self.live, *self.waiting], [], [], []
        for row in rows:
            row.end("error", error)
            part(row, self.keeper, sound=False)
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
        if not self.waiting or len(self.live) >= self.rows:
            return
        weighed = {} if self.budget is None else {row: row.nbytes for row in self.live}
        for row in list(self.waiting):
            if len(self.live) >= self.rows:
                return
            if self.live and self.keeper.awaits(row, self.live):
                continue
            if self.budget is not None and not self._fits(row, self.budget, weighed):
                return
            self.waiting.remove(row)
            try:
                self._begin(row)
            except RunnerError as error:
                self._end(row, "error", error)
                continue
            bisect.insort(self.live, row, key=lambda row: row.rank)
            weighed[row] = row.nbytes
            self.loaded.wire(self, sum(len(other.order.ids) + other.order.budget for other in self.live))

    def _fits(self, row: Row, budget: Budget, weighed: Mapping[Row, int]) -> bool:
        """Whether there are bytes for a row to begin now, beside those of the live ones; kept prefixes make room."""
        from runner.engine.budget import ALLOWANCE

        tokens = min(len(row.ids) + ALLOWANCE, row.length + row.order.budget)
        # Those that are reading their prompts will take more than they have.
        growth = sum(max(0, self._size(one, len(one.ids)) - nbytes) for one, nbytes in weighed.items() if one.reading)
        needed = growth + max(0, self._size(row, tokens) - self.keeper.offered(row)) + sum(weighed.values())
        budget.press(budget.beside(self) + needed - budget.room)
        return not budget.busy or budget.beside(self) + needed <= budget.room

    def _size(self, row: Row, tokens: int) -> int:
        """Bytes that a row's caches, and those of what guesses for it, have at so many tokens."""
        beside = row.order.beside
        return self.loaded.footprint.of(tokens) + (0 if beside is None else beside.of(tokens))

    def _begin(self, row: Row) -> None:
        if row.course is None:
            row.course = self._course(row.order)
        self.keeper.begin(row)

    def _course(self, order: Order) -> Continuation:
        config, params = self.loaded.config, order.params
        if params.penalty_window >= len(order.ids) + order.budget:  # it would never forget, and hold room for all of it
            params = dataclasses.replace(params, penalty_window=0)
        state = SamplingState(params, config.vocab_size, order.ids, choice=order.choice)
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
        part(row, self.keeper, sound=sound)
        self._maker.forget()
        bisect.insort(self.waiting, row, key=lambda row: row.rank)

    def _end(self, row: Row, reason: str, error: BaseException | None = None) -> None:
        row.end(reason, error)
        for rows in (self.live, self.waiting):
            if row in rows:
                rows.remove(row)
        part(row, self.keeper, sound=error is None)
        self._maker.forget()

    def _separate(self) -> None:
        """A layer could not tell the rows apart in one pass: from now on each set of adapters has its own.

        The layers before it may have gone forward, so that all rows begin anew, from prefixes that were kept.
        """
        self._land()
        self.loaded.mixes = False
        for row in list(self.live):
            self._pause(row, sound=False)

    # ---- what comes of it

    def _land(self) -> bool:
        """Read the tokens of the passes under way, and end rows that they finish; true where kernels have failed."""
        flights, self._flights = self._flights, []
        for flight in flights:
            place, landed = 0, flight.land()
            for row in flight.fed:
                if not row.done:
                    self.keeper.mark(row)
                    row.progressed()
            for (row, count), picked in zip(flight.rows, landed, strict=True):
                if not row.done and not picked:
                    row.lose(0 if flight.step is None else count)
                elif not row.done:
                    self._took(row, flight, place, picked)
                place += count
            for row in flight.fed:
                if row.order.budget == 0 and not row.done and not row.reading:
                    self._end(row, "length")
        return any(flight.lost for flight in flights)

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
