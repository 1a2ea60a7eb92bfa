"""`runner serve` as a process."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def served(
    *words: str, launched: tuple[str, ...] = (), **environment: str
) -> Iterator[tuple[subprocess.Popen[str], str, list[str]]]:
    """A server on a free port, by itself or as `launched` says; its process, address and lines on stderr."""
    command = [sys.executable, "-m", "runner", *launched, "serve", *words]
    env = {**os.environ, **environment}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env) as process:
        lines: list[str] = []
        ready = threading.Event()

        def read() -> None:
            assert process.stderr is not None
            for line in process.stderr:
                lines.append(line)
                if "curl" in line or line.startswith(("error", "Traceback")):
                    ready.set()
            ready.set()

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        try:
            assert ready.wait(60)
            found = re.search(r"at (\S+)", "".join(lines))
            assert found is not None, lines
            yield process, found[1], lines
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
            try:
                process.wait(30)
            finally:
                process.kill()  # one that does not end is a failure, and not waited for without end
            reader.join(5)
