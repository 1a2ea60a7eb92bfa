"""Work that waits for a disk, on a thread of its own: whoever hands it over goes on computing."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable


class Background:
    """Does jobs one after another, in the order in which they were handed over.

    What they hold is bounded: `put` waits where more than `most` bytes are waiting already. The thread ends when there
    is nothing more to do, and with the process, in the middle of a job too.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._jobs: deque[tuple[int, Callable[[], object]]] = deque()
        self._held = 0  # bytes of those that are not done
        self._changed = threading.Condition()
        self._running = False
        self._pid = os.getpid()

    def put(self, nbytes: int, job: Callable[[], object]) -> None:
        """Have `job` done, which holds so many bytes and raises nothing; in a forked child it is not done."""
        with self._changed:
            if os.getpid() != self._pid:
                return
            self._changed.wait_for(lambda: not self._held or self._held + nbytes <= self._most)
            self._jobs.append((nbytes, job))
            self._held += nbytes
            if not self._running:
                self._running = True
                threading.Thread(target=self._work, name="runner-disk", daemon=True).start()

    def wait(self) -> None:
        """Wait until all that was handed over is done."""
        if os.getpid() == self._pid:
            with self._changed:
                self._changed.wait_for(lambda: not self._running)

    def _work(self) -> None:
        while True:
            with self._changed:
                if not self._jobs:
                    self._running = False
                    self._changed.notify_all()
                    return
                nbytes, job = self._jobs.popleft()
            try:
                job()
            finally:
                del job
                with self._changed:
                    self._held -= nbytes
                    self._changed.notify_all()
