"""Models in one memory: their weights come when they are asked for, and go when others need the memory.

All of it is bookkeeping of the event loop's thread, but for one thing: the thread that owns the device lets go of
weights that nobody uses, where answers need their memory. A lock guards what both look at.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner.engine.budget import Budget
from runner.engine.engine import DISK, Engine, Status
from runner.errors import RunnerError, UsageError
from runner.ops.device import current
from runner.ops.owner import OWNER
from runner.server.errors import ApiError
from runner.server.log import say

if TYPE_CHECKING:
    from runner.language_model import LanguageModel

ROOM_SECONDS = 120.0
"""Seconds for which a model waits for the answers of others to end, where it needs their memory."""


class Slot:
    """A model whose weights are in memory or not.

    Attributes:
        name: what the engine calls it by.
        nbytes: bytes of its weights, there or not.
        lm: the model, while its weights are there.
        users: requests that use it, or wait until it is there: while there are any, it stays.
        keep: seconds for which it stays once nobody uses it; the latest request decides. Endless: until others need
            its memory.
        asked: whether a client asked for an endless stay: it then goes after those that nobody did it for.
        used: the `time.monotonic()` at which its latest use ended.
        expires: the `time.monotonic()` at which it goes.
    """

    def __init__(
        self, name: str, nbytes: int, load: Callable[[], LanguageModel], keep: float, *, pinned: bool = False
    ) -> None:
        """Begin without its weights, which `load` reads; one that is `pinned` never lets go of them."""
        self.name = name
        self.nbytes = nbytes
        self.load = load
        self.keep = keep
        self.pinned = pinned
        self.asked = False
        self.lm: LanguageModel | None = None
        self.users = 0
        self.used = 0.0
        self.expires = math.inf
        self.timer: asyncio.TimerHandle | None = None
        self.loading: asyncio.Task[None] | None = None
        self.leaving: Future[None] | None = None  # done once it is gone, or stays after all

    def __repr__(self) -> str:
        return f"Slot({self.name!r}, {'loaded' if self.lm is not None else 'not loaded'}, {self.users} users)"


class Lease:
    """The use of a model by one request: the model stays until `release`.

    Attributes:
        seconds: for how long the request waited until the model was there.
    """

    def __init__(self, release: Callable[[], None] = lambda: None, seconds: float = 0.0) -> None:
        self._release: Callable[[], None] | None = release
        self.seconds = seconds

    def release(self) -> None:
        """The end of the use. Releasing twice is fine."""
        release, self._release = self._release, None
        if release is not None:
            release()


class Pool:
    """The models of a server, and the engine that computes with those that are loaded."""

    def __init__(
        self,
        limit: int | None = None,
        *,
        keep: float = math.inf,
        cache_dir: Path | None = None,
        cache_size: int | None = None,
    ) -> None:
        """Begin without any.

        Args:
            limit: bytes of memory for weights, answers and kept prompts; None: what this machine allows.
            keep: seconds for which a model stays loaded once nobody uses it; endless: until others need its memory.
            cache_dir: as in `Engine`, like `cache_size`.
        """
        if limit is None:
            limit = Budget.of_machine(current().mlx).limit
        self.engine = Engine({}, memory=limit, cache_dir=cache_dir, cache_size=cache_size or DISK)
        self.engine.budget.unload = self._unload
        self.limit = limit
        self.keep = keep
        self.slots: list[Slot] = []
        self._lock = threading.Lock()
        self._one_by_one = asyncio.Lock()
        self._freed = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tasks: set[asyncio.Future[Any]] = set()

    def add(self, name: str, nbytes: int, load: Callable[[], LanguageModel], *, pinned: bool = False) -> Slot:
        """Make room in the books for a model whose weights take `nbytes`.

        Raises:
            UsageError: it can never be loaded beside what always stays.
        """
        slot = Slot(name, nbytes, load, self.keep, pinned=pinned)
        self._check(slot)
        with self._lock:
            self.slots.append(slot)
        return slot

    def load(self, slot: Slot) -> None:
        """Load a model before there are requests; raises what loading does."""
        self._open(slot)

    def fix(self, nbytes: int) -> None:
        """Count bytes of what is loaded besides the models, and stays."""
        self.engine.budget.weights += nbytes

    # ---- the use of a model

    async def hold(self, slot: Slot, keep: float | None = None) -> Lease:
        """Have a model loaded, and stay so until the lease is released.

        Args:
            keep: seconds for which it stays afterwards; None: as the server does by itself.

        Raises:
            ApiError: there is no memory for it, or it cannot be loaded.
        """
        began = time.perf_counter()
        self._loop = asyncio.get_running_loop()
        while True:
            with self._lock:
                leaving = slot.leaving
                if leaving is None:
                    slot.users += 1
                    break
            await asyncio.shield(asyncio.wrap_future(leaving))
        slot.keep, slot.asked = (self.keep, False) if keep is None else (keep, math.isinf(keep))
        self._stop_timer(slot)
        try:
            if slot.lm is None:
                await self._loaded(slot)
        except BaseException:
            self._released(slot)
            raise
        return Lease(lambda: self._released(slot), time.perf_counter() - began)

    def _released(self, slot: Slot) -> None:
        with self._lock:
            slot.users -= 1
            slot.used = time.monotonic()
        self._freed.set()
        self._rest(slot)

    def _rest(self, slot: Slot) -> None:
        """What becomes of a model that nobody uses."""
        if slot.users or slot.lm is None:
            return
        if slot.leaving is not None:
            self._begin(self._drop, slot)
        elif not slot.pinned and slot.keep == 0:
            self._expire(slot)
        elif not slot.pinned and math.isfinite(slot.keep):
            assert self._loop is not None
            self._stop_timer(slot)
            slot.expires = time.monotonic() + slot.keep
            slot.timer = self._loop.call_later(slot.keep, self._expire, slot)

    def _stop_timer(self, slot: Slot) -> None:
        slot.expires = math.inf
        if slot.timer is not None:
            slot.timer.cancel()
            slot.timer = None

    def _expire(self, slot: Slot) -> None:
        if self._claimed(slot):
            self._begin(self._drop, slot)

    def _begin(self, work: Callable[[Slot], None], slot: Slot) -> None:
        """Do what waits for the device's thread on another one."""
        task = asyncio.ensure_future(asyncio.to_thread(work, slot))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # ---- loading

    async def _loaded(self, slot: Slot) -> None:
        """Wait until a model is loaded, with all who do; those who leave do not stop it."""
        if slot.loading is None:
            slot.loading = asyncio.create_task(self._load(slot))
            slot.loading.add_done_callback(lambda task: task.cancelled() or task.exception())  # told to whoever waits
        await asyncio.shield(slot.loading)

    async def _load(self, slot: Slot) -> None:
        try:
            async with self._one_by_one:
                await self._make_room(slot)
                await asyncio.to_thread(self._open, slot)
        except (ApiError, asyncio.CancelledError):
            raise
        except MemoryError as error:
            raise ApiError(503, f"{slot.name}: out of memory while it was loaded", "server_error") from error
        except Exception as error:
            say(logging.ERROR, event="load failed", model=slot.name, error=str(error))
            cause = str(error) if isinstance(error, RunnerError | OSError) else type(error).__name__
            raise ApiError(
                500, f"{slot.name} cannot be loaded: {cause}", "server_error", code="model_failed_to_load"
            ) from error
        finally:
            slot.loading = None
        self._rest(slot)

    def _open(self, slot: Slot) -> None:
        """Read the weights; on any thread but the event loop's."""
        began = time.perf_counter()
        lm = slot.load()
        try:
            self.engine.add(slot.name, lm.engine, loose=not slot.pinned)
        except BaseException:
            lm.close()
            raise
        slot.nbytes = lm.nbytes
        slot.used = time.monotonic()
        slot.lm = lm
        say(
            logging.INFO,
            event="loaded",
            model=slot.name,
            bytes=lm.nbytes,
            seconds=round(time.perf_counter() - began, 3),
        )

    def _check(self, slot: Slot) -> None:
        """Refuse what can never be loaded."""
        fixed = self.engine.budget.weights - self.engine.budget.loose
        fixed += sum(other.nbytes for other in self.slots if other.pinned and other.lm is None and other is not slot)
        if slot.nbytes >= self.limit - fixed:
            beside = f", {fixed / 1e6:.1f} MB of them for what always stays loaded" if fixed else ""
            raise UsageError(
                f"the weights of {slot.name} take {slot.nbytes / 1e6:.1f} MB, and {self.limit / 1e6:.1f} MB are "
                f"allowed{beside}"
            )

    async def _make_room(self, slot: Slot) -> None:
        """Let models go for another: those that nobody uses at once, else those in use when their answers have ended.

        Raises:
            ApiError: it can never be loaded, or the others' answers take too long.
        """
        try:
            self._check(slot)
        except UsageError as error:
            raise ApiError(400, str(error), code="model_too_large") from error
        end = time.monotonic() + ROOM_SECONDS
        asked: list[Slot] = []
        try:
            while True:
                self._freed.clear()
                short = await asyncio.to_thread(OWNER.run, lambda: self._free(slot.nbytes))
                if short <= 0:
                    return
                asked += self._ask_to_leave(short - sum(other.nbytes for other in asked if other.lm is not None))
                if (left := end - time.monotonic()) <= 0:
                    busy = ", ".join(other.name for other in self.slots if other.lm is not None and other.users)
                    raise ApiError(
                        503,
                        f"{slot.name} needs {slot.nbytes / 1e6:.1f} MB, and the models in use leave no room "
                        f"({busy}): try again later",
                        "server_error",
                        code="no_memory",
                        retry_after=10,
                    )
                try:
                    async with asyncio.timeout(min(left, 1.0)):
                        await self._freed.wait()
                except TimeoutError:
                    pass
        finally:
            for other in asked:
                self._stay(other)

    def _free(self, nbytes: int) -> int:
        """Let idle models go until there is room for weights; bytes that are short still. A job of the owner's."""
        while True:
            short = nbytes + 1 - (self.engine.budget.room - self.engine.budget.live)
            if short <= 0 or not self._unload(short, most=1):
                return short

    def _unload(self, nbytes: int, most: int = 1 << 30) -> int:
        """Let idle models go, the one first that was used longest ago; how many. A job of the owner's thread."""
        count = 0
        while nbytes > 0 and count < most:
            with self._lock:
                idle = [slot for slot in self.slots if self._idle(slot)]
                if not idle:
                    return count
                slot = min(idle, key=lambda each: (each.asked, each.used))
                slot.leaving = Future()
            nbytes -= slot.nbytes
            self._drop(slot)
            count += 1
        return count

    @staticmethod
    def _idle(slot: Slot) -> bool:
        return slot.lm is not None and not slot.users and not slot.pinned and slot.leaving is None

    def _claimed(self, slot: Slot) -> bool:
        """Whether an idle model is the caller's to be dropped."""
        with self._lock:
            if not self._idle(slot):
                return False
            slot.leaving = Future()
            return True

    def _ask_to_leave(self, nbytes: int) -> list[Slot]:
        """Have models in use go once their answers have ended: who asks for them from now on waits."""
        with self._lock:
            found = []
            for slot in sorted(self.slots, key=lambda each: (each.asked, each.used)):
                if nbytes > 0 and slot.lm is not None and slot.users and not slot.pinned and slot.leaving is None:
                    slot.leaving = Future()
                    nbytes -= slot.nbytes
                    found.append(slot)
            return found

    def _stay(self, slot: Slot) -> None:
        """Take back what `_ask_to_leave` has done, where it was not done yet."""
        with self._lock:
            if not slot.users:
                return
            leaving, slot.leaving = slot.leaving, None
        if leaving is not None:
            leaving.set_result(None)

    def _drop(self, slot: Slot) -> None:
        """Let go of the weights of a model that was claimed; on any thread but the event loop's."""
        lm, slot.lm = slot.lm, None
        try:
            if lm is not None:
                self.engine.remove(slot.name)
                lm.close()
                say(logging.INFO, event="unloaded", model=slot.name, bytes=slot.nbytes)
        finally:
            with self._lock:
                leaving, slot.leaving = slot.leaving, None
            if leaving is not None:
                leaving.set_result(None)
            if self._loop is not None and not self._loop.is_closed():
                self._loop.call_soon_threadsafe(self._freed.set)

    # ---- what operators and the end ask

    def status(self, slot: Slot) -> Status | None:
        """How a model fares; None where it is not loaded."""
        if slot.lm is None:
            return None
        try:
            return self.engine.status(slot.name)
        except UsageError:  # it has gone between the two lines
            return None

    def restart(self, slot: Slot) -> None:
        """Begin anew with a model whose engine has failed; with several names it may have begun already."""
        if slot.lm is not None and not self.engine.status(slot.name).alive:
            self.engine.remove(slot.name)
            self.engine.add(slot.name, slot.lm.engine, loose=not slot.pinned)

    def close(self) -> None:
        """End all requests, and give all memory back."""
        self.engine.close()
        for slot in self.slots:
            if slot.lm is not None:
                slot.lm.close()
