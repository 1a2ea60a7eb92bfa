"""Many requests at once over one or more loaded models: ids in, ids out, from any thread or asyncio task.

Each model has a scheduler. Their steps are jobs of the thread that owns the device, one after another, as everything
that computes is; between two of them it does what others ask of it.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Self

from runner.engine.budget import Budget, Footprint
from runner.engine.loaded import CLOSED, Loaded
from runner.engine.prefixes import PrefixStats
from runner.engine.sampling import SamplingParams
from runner.engine.scheduler import MOST, Scheduler
from runner.engine.sharing import Disk, Sharing
from runner.engine.speculation import Guide, Proposer
from runner.engine.ticket import Ended, Mailbox, Order, Ticket
from runner.errors import BackendError, UsageError
from runner.ops.owner import OWNER

DISK = 8 << 30
"""Bytes of kept prefixes on disk, where a directory for them is given and nothing else is said."""


@dataclass(frozen=True)
class Status:
    """How one model of an engine fares.

    Attributes:
        error: why it is dead; None: it is not.
        running: requests that are computed.
        waiting: requests that wait for their turn.
        quiet: seconds since its last step ended, while there are requests; 0 without any.
        nbytes: bytes of the caches of those that are computed.
        prefixes: what the reuse of earlier prompts has done.
    """

    error: BaseException | None
    running: int
    waiting: int
    quiet: float
    nbytes: int
    prefixes: PrefixStats

    @property
    def alive(self) -> bool:
        """Whether it answers."""
        return self.error is None


class Worker:
    """One model's scheduler, and what makes it move."""

    def __init__(
        self, loaded: Loaded, budget: Budget, rows: int, prefixes: int, disk: Disk | None, *, loose: bool = False
    ) -> None:
        if loaded.part is not None and disk is not None:
            raise UsageError(
                "a model that is shared out over processes keeps no prefixes on disk: it has parts of them"
            )
        self.loaded = loaded
        self.budget = budget
        self.weights = loaded.nbytes
        self.loose = self.weights if loose else 0
        self.error: BaseException | None = None
        self._inbox: SimpleQueue[tuple[Order, Mailbox]] = SimpleQueue()
        self._turning = False  # whether a step is among the owner's jobs
        self._moved = time.monotonic()

        def job() -> Sharing:
            assert loaded.footprint  # made here, for any thread
            sharing = Sharing(loaded, prefixes, disk)
            self._scheduler = Scheduler(loaded, sharing, rows=rows, budget=budget)
            self._holders = (self._scheduler, sharing.prefixes)
            budget.holders += self._holders
            return sharing

        self._sharing = loaded.run(job)

    def submit(self, order: Order) -> Ticket:
        """Begin to answer.

        Raises:
            UsageError: the model was closed, or prompt and answer can never fit into memory.
            BackendError: an earlier step failed, and this model answers no more; or this process was forked.
        """
        self._check()
        OWNER.start()
        tokens = len(order.ids) + order.budget
        beside = 0 if order.beside is None else order.beside.of(tokens)
        self.budget.check(self.loaded.footprint.of(tokens) + beside, tokens, self.loose)
        mailbox = Mailbox()
        self._inbox.put((order, mailbox))
        self._poke()
        return Ticket(mailbox, self._poke)

    def _check(self) -> None:
        if self.error is not None:
            if isinstance(self.error, UsageError):
                raise UsageError(str(self.error))
            raise BackendError(f"this engine has failed, and answers no more: {self.error}") from self.error
        self.loaded.check_open()

    def status(self) -> Status:
        """How it fares, as of the last step: answered without the thread that computes."""
        scheduler = self._scheduler
        running, waiting = len(scheduler.live), len(scheduler.waiting) + self._inbox.qsize()
        quiet = time.monotonic() - self._moved if running or waiting else 0.0
        return Status(
            self.error, running, waiting, quiet, scheduler.held if running else 0, self._sharing.prefixes.stats
        )

    def close(self, error: BaseException) -> None:
        """End every request with `error`, once the step under way has ended."""

        try:
            # Not by `finish`: where no job runs any more, in a forked child too, nothing can be computed.
            OWNER.run(lambda: self._keep(error), self.loaded.device.mlx)
        except BackendError:
            pass
        finally:
            OWNER.finish(functools.partial(self._fail, error))

    def leave(self) -> None:
        """Give back what the budget has lent, once closed; a job of the owner's thread."""
        self.budget.weights -= self.weights
        self.budget.loose -= self.loose
        self.budget.holders = [one for one in self.budget.holders if one not in self._holders]

    def _keep(self, error: BaseException) -> None:
        if self.error is None:
            self._scheduler.keep()
            self._sharing.prefixes.flush()
            self._fail(error)  # in the same job: rows have no caches any more

    def _poke(self) -> None:
        """Have the scheduler look at its requests, from any thread."""
        OWNER.post(self._wake, self.loaded.device.mlx)

    def _wake(self) -> None:
        if not self._turning:
            self._turning = True
            self._moved = time.monotonic()
            self._turn()

    def _turn(self) -> None:
        """One step, and the next one behind the jobs that wait."""
        try:
            self._collect()
            busy = self.error is None and self._scheduler.step()
        except BaseException as error:
            self._fail(error)
            busy = False
        self._moved = time.monotonic()
        self._turning = busy
        if busy:
            OWNER.post(self._turn, self.loaded.device.mlx)

    def _collect(self) -> None:
        """Let the scheduler have what came in."""
        while True:
            try:
                order, mailbox = self._inbox.get_nowait()
            except Empty:
                return
            if self.error is not None:
                mailbox.put(Ended("error", self.error))
            elif self.loaded.closed:
                mailbox.put(Ended("error", UsageError(CLOSED)))
            else:
                try:
                    self._scheduler.add(order, mailbox)
                except BaseException as error:  # nobody else knows of it yet: it would be waited for without end
                    mailbox.put(Ended("error", error))
                    raise

    def _fail(self, error: BaseException) -> None:
        """The end for all: those that wait as well as those that come."""
        if self.error is None:
            self.error = error
            self._collect()
            self._scheduler.fail(error)


class Engine:
    """Answers many requests at once over one or more loaded models.

    Use it in a `with` statement, or call `close`: it ends what is under way. The models stay loaded.
    """

    def __init__(
        self,
        models: Loaded | Mapping[str, Loaded],
        *,
        memory: int | None = None,
        rows: int = MOST,
        prefixes: int | None = None,
        cache_dir: Path | None = None,
        cache_size: int = DISK,
    ) -> None:
        """Make one that has no requests yet.

        Args:
            models: a model, or several by the names to ask for them by; none where all come by `add`.
            memory: bytes that weights, live sequences and kept prefixes may take together; None: what this machine,
                or the control group that it runs in, allows.
            rows: how many sequences of a model are computed at once at most.
            prefixes: bytes of it, for each model, that what was computed for earlier requests may take beside those
                under way, for later ones that begin alike; 0: none; None: half of what the weights leave. They go
                first where requests need the memory.
            cache_dir: a directory, of your own alone, for kept prefixes that memory has no room for, and for all there
                are at the end; another engine over the same models finds them there. None: they are let go.
            cache_size: bytes of all files in it at most; those that were used longest ago go first.

        Raises:
            UsageError: there is no model and no `memory`, a number is out of range, the weights alone need more memory,
                or others may write into `cache_dir`.
        """
        named = {"": models} if isinstance(models, Loaded) else dict(models)
        if not named and memory is None:
            raise UsageError("an engine needs a model, or to be told how much memory those of `add` may take")
        if type(rows) is not int or rows < 1:
            raise UsageError(f"rows must be an integer of at least 1, not {rows!r}")
        if memory is not None and (type(memory) is not int or memory < 1):
            raise UsageError(f"memory must be a number of bytes, or None, not {memory!r}")
        if prefixes is not None and (type(prefixes) is not int or prefixes < 0):
            raise UsageError(f"prefixes must be a number of bytes, or None, not {prefixes!r}")
        if type(cache_size) is not int or cache_size < 1:
            raise UsageError(f"cache_size must be a number of bytes, not {cache_size!r}")
        self._disk = None if cache_dir is None else Disk(Path(cache_dir), cache_size)
        self._rows, self._prefixes = rows, prefixes
        if memory is None:
            self.budget = Budget.of_machine(next(iter(named.values())).device.mlx)
        else:
            self.budget = Budget(memory)
        self.budget.weights = sum(loaded.nbytes for loaded in named.values())
        for loaded in named.values():
            self._room(loaded, self.budget.room)
        if self.budget.room <= 0:
            raise UsageError(
                f"the weights take {self.budget.weights / 1e6:.1f} MB, and {self.budget.limit / 1e6:.1f} MB are allowed"
            )
        self._workers = {name: self._worker_of(loaded, self.budget.room) for name, loaded in named.items()}

    def __repr__(self) -> str:
        states = [self.status(name) for name in self._workers]
        running, waiting = sum(one.running for one in states), sum(one.waiting for one in states)
        return f"Engine({len(states)} models, {running} requests running, {waiting} waiting)"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def submit(
        self,
        ids: Sequence[int],
        params: SamplingParams | None = None,
        *,
        max_tokens: int,
        ends: Collection[int] = (),
        choice: int = 0,
        priority: int = 0,
        timeout: float | None = None,
        turns: Collection[int] = (),
        guide: Guide | None = None,
        proposer: Callable[[], Proposer] | None = None,
        beside: Footprint | None = None,
        scores: int | None = None,
        adapters: Mapping[str, float] | None = None,
        model: str = "",
    ) -> Ticket:
        """Begin to answer a prompt; returns at once, with what its tokens are iterated over.

        Args:
            ids: the prompt.
            params: how tokens are picked; None: the most likely one each time.
            max_tokens: the most tokens to make; 0 with `scores`: none.
            ends: ids that end the answer; the one that did is its last token.
            choice: which of several answers to the same prompt this is: with one seed, each draws other numbers.
            priority: requests with a higher one go first; equals in the order in which they came.
            timeout: seconds after which the answer ends, wherever it is.
            turns: positions in the prompt where the next one of a conversation may part from it.
            guide: says which tokens may come next; None: all may.
            proposer: makes what guesses tokens ahead, on the engine's thread; None: nothing does. No token is another
                for it.
            beside: bytes that the proposer's own caches take; None: it has none.
            scores: None, or that the prompt's own log-probabilities are wanted (`Ticket.scores`), with those of so many
                of the likeliest tokens beside each.
            adapters: adapters that the model was loaded with, and their weights for this request; others are off. None:
                as `set_adapters` has left them.
            model: which model answers, by its name.

        Raises:
            UsageError: an argument is out of range, prompt and answer can never fit into memory, or it was closed.
            BackendError: the model has failed in an earlier step, and answers no more.
        """
        worker = self._worker(model)
        least = 0 if scores is not None else 1
        if type(max_tokens) is not int or max_tokens < least:
            raise UsageError(f"max_tokens must be an integer of at least {least}, not {max_tokens!r}")
        if timeout is not None and not (isinstance(timeout, int | float) and timeout >= 0):
            raise UsageError(f"timeout must be a number of seconds, or None, not {timeout!r}")
        if type(choice) is not int or not 0 <= choice < 1 << 64:
            raise UsageError(f"choice must be an integer from 0 to 2^64 - 1, not {choice!r}")
        if type(priority) is not int:
            raise UsageError(f"priority must be an integer, not {priority!r}")
        if scores is not None and (type(scores) is not int or scores < 0):
            raise UsageError(f"scores must be a number of tokens, or None, not {scores!r}")
        loaded = worker.loaded
        weights = loaded.adapter_weights if adapters is None else loaded.weights_of(adapters)
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        order = Order(
            ids=loaded.checked(ids), params=params or SamplingParams(temperature=0.0), budget=max_tokens,
            ends=frozenset(ends), choice=choice, priority=priority, weights=weights, turns=turns,
            scores=scores, deadline=deadline, guide=guide, proposer=proposer, beside=beside,
        )  # fmt: skip
        return worker.submit(order)

    def add(self, name: str, loaded: Loaded, *, loose: bool = False) -> None:
        """Answer with one more model; kept prefixes of others make way for its weights.

        Args:
            loose: whether it may be removed where another model needs the memory (`budget.unload`).

        Raises:
            UsageError: a model has the name, or its weights need more memory than there is beside those of the others.
        """
        if name in self._workers:
            raise UsageError(f"a model is called {name!r} already")

        def job() -> Worker:
            budget, weights = self.budget, loaded.nbytes
            if weights >= budget.room:
                raise UsageError(
                    f"the weights of {name!r} take {weights / 1e6:.1f} MB, and {max(budget.room, 0) / 1e6:.1f} MB of "
                    f"{budget.limit / 1e6:.1f} MB are free"
                )
            worker = self._worker_of(loaded, self._room(loaded, budget.room - weights), loose=loose)
            budget.weights += weights
            budget.loose += worker.loose
            for holder in budget.holders:
                if (over := budget.used - budget.room) > 0:
                    holder.evict(over)
            return worker

        self._workers = {**self._workers, name: loaded.run(job)}

    def remove(self, name: str) -> None:
        """End a model's requests with a UsageError, and forget it; the model stays loaded."""
        worker = self._worker(name)
        worker.close(UsageError(f"the model {name!r} was removed"))
        OWNER.finish(worker.leave)
        self._workers = {other: one for other, one in self._workers.items() if other != name}

    def _room(self, loaded: Loaded, room: int) -> int:
        """Of `room` bytes beside the weights, those that may be used: as many as other processes' parts leave."""
        if loaded.part is None:
            return room
        found = loaded.part.room(self.budget.limit, room, loaded.footprint)
        self.budget.limit -= room - found
        return found

    def _worker_of(self, loaded: Loaded, room: int, *, loose: bool = False) -> Worker:
        """What computes with a model beside whose weights there are `room` bytes."""
        kept = room // 2 if self._prefixes is None else self._prefixes
        return Worker(loaded, self.budget, self._rows, kept, self._disk, loose=loose)

    def status(self, model: str = "") -> Status:
        """How a model fares, as of its last step: answered at once, whatever the engine does."""
        return self._worker(model).status()

    def close(self) -> None:
        """End every request with a UsageError, once the step under way has ended. Closing twice is fine."""
        for worker in self._workers.values():
            worker.close(UsageError("this engine was closed"))

    def _worker(self, model: str) -> Worker:
        if model not in self._workers:
            raise UsageError(f"no model is called {model!r}: there are {', '.join(map(repr, self._workers))}")
        return self._workers[model]
