"""The thread that owns the device: everything that computes for the library runs on it, one job after another.

MLX gives each thread streams of its own: a thread that computes leaves an operating system thread and its buffers
behind, and what one thread has built but not computed no other can use. With one thread for all of it, requests may
come from any thread, and a request that is interrupted (Ctrl-C, a timeout raised by a signal) leaves no half-done work:
the interrupted thread stops waiting, the job itself runs to its end. Python delivers signals to the main thread alone.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, TypeVar

import mlx.core as mx

from runner.errors import BackendError
from runner.ops.metal import Wired

T = TypeVar("T")


class Abandoned(Exception):
    """Raised within a job by `check_wanted`, when nobody waits for its result any more."""


class _Job:
    """Work for the owner, and what became of it. `done` is locked until then; `told` is called after that."""

    __slots__ = ("device", "done", "error", "result", "told", "wanted", "work")

    def __init__(
        self, work: Callable[[], Any], device: mx.Device | None, told: Callable[[], None] | None = None
    ) -> None:
        self.work = work
        self.device = device
        self.told = told
        self.result: Any = None
        self.error: BaseException | None = None
        self.wanted = True
        self.done = threading.Lock()
        self.done.acquire()

    def perform(self) -> None:
        """Do the work, on the owner's thread."""
        try:
            if self.device is not None and mx.default_device() != self.device:
                mx.set_default_device(self.device)
            self.result = self.work()
        except BaseException as error:
            self.error = error
        finally:
            self.done.release()
            if self.told is not None:
                self.told()

    def outcome(self) -> Any:
        """The result of the work, or its exception raised; once it is done."""
        error, self.error = self.error, None  # its traceback holds this frame, and thus the job
        if error is not None:
            try:
                raise error
            finally:
                del error
        return self.result


class Owner:
    """One worker thread, started by its first job and stopped with the interpreter, whatever it is doing then.

    `wired` is the process's wired limit, on Macs.

    Queue and locks are those that are written in C: an exception that a signal raises in a waiting thread can come
    between any two lines of Python, and would leave a `Condition` (and thus a `Future`) of the library broken.
    """

    def __init__(self) -> None:
        self._queue: SimpleQueue[_Job | None] = SimpleQueue()
        self._starting = threading.Lock()
        self._pid: int | None = None  # of the process whose thread it is
        self._thread: threading.Thread | None = None
        self._current: _Job | None = None
        self._ended = False
        self.wired = Wired()

    @property
    def here(self) -> bool:
        """Whether this is its thread."""
        return threading.current_thread() is self._thread

    def run(self, work: Callable[[], T], device: mx.Device | None = None) -> T:
        """Run `work` on the owning thread and return its result, or raise its exception.

        Jobs of all threads run in the order of these calls. Called from within a job, it runs at once. Where the
        waiting thread is interrupted, a job that has not begun never runs, and one that has runs to its end.

        Args:
            device: what MLX computes on during the job; None: what it computes on by default.

        Raises:
            BackendError: this process was forked from one that computed already, or the interpreter is ending.
        """
        if self._thread is None:
            self._start()
        if self.here:
            return work()
        self._check_alive()
        job = _Job(work, device)
        try:
            self._queue.put(job)
            job.done.acquire()
        except BaseException:
            job.wanted = False
            raise
        result: T = job.outcome()
        return result

    async def wait(self, work: Callable[[], T], device: mx.Device | None = None) -> T:
        """`run` for coroutines: the event loop goes on while the job waits and runs.

        Where the waiting task is cancelled, a job that has not begun never runs, and one that has runs to its end.
        """
        import asyncio  # who waits has it loaded; a short answer should not

        if self._thread is None:
            self._start()
        self._check_alive()
        loop = asyncio.get_running_loop()
        done = asyncio.Event()

        def told() -> None:
            with contextlib.suppress(RuntimeError):  # the loop was closed: nobody waits any more
                loop.call_soon_threadsafe(done.set)

        job = _Job(work, device, told)
        self._queue.put(job)
        try:
            await done.wait()
        except BaseException:
            job.wanted = False
            raise
        result: T = job.outcome()
        return result

    def start(self) -> None:
        """Start the thread, where it does not run yet, so that `post` can be used.

        Raises:
            BackendError: as `run`.
        """
        if self._thread is None:
            self._start()
        self._check_alive()

    def post(self, work: Callable[[], object], device: mx.Device | None = None) -> None:
        """Have `work` done after the jobs that are waiting, without waiting for it; what it raises is lost.

        Nothing is done where nothing runs any more: in a forked child, or while the interpreter ends.
        """
        if os.getpid() == self._pid and not self._ended:
            self._queue.put(_Job(work, device))

    def finish(self, work: Callable[[], object]) -> None:
        """Do `work` after the jobs that are waiting, and wait for it; at once where no job runs any more."""
        if os.getpid() == self._pid and not self._ended:
            self.run(work)
        else:
            work()

    def _start(self) -> None:
        with self._starting:
            if self._thread is None:
                self._pid = os.getpid()
                thread = threading.Thread(target=self._work, name="runner-device", daemon=True)
                thread.start()
                atexit.register(self._end)
                self._thread = thread

    def _check_alive(self) -> None:
        if os.getpid() != self._pid:
            raise BackendError(
                "this process was forked from one that had loaded a model, and MLX's threads do not survive a fork: "
                "load models in the child alone, or start it by multiprocessing's 'spawn' method"
            )
        if self._ended:
            # Daemon threads go on for a moment while the interpreter ends; they end quietly here.
            if threading.current_thread() is not threading.main_thread():
                raise SystemExit
            raise BackendError("the interpreter is ending: nothing can be computed any more")

    def _work(self) -> None:
        while (job := self._queue.get()) is not None:
            self._current = job
            if job.wanted:
                job.perform()
            self._current = job = None  # nothing of the last job is kept until the next one comes
        # MLX's threads belong to this thread's streams; on a GPU the process aborts if they are left to its end.
        mx.synchronize()
        mx.clear_streams()

    def _end(self) -> None:
        """Let the job that is under way end, before the interpreter takes down what it stands on."""
        if os.getpid() == self._pid and self._thread is not None:
            self._ended = True
            self._queue.put(None)
            self._thread.join()

    def check_wanted(self) -> None:
        """Within a long job, between two of its steps: raise `Abandoned` if its caller was interrupted."""
        if self._current is not None and not self._current.wanted:
            raise Abandoned


OWNER = Owner()
"""The only one: there is one device, and so this package has one global."""
