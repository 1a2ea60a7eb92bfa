"""A program on a terminal of its own (a pseudo-terminal)."""

from __future__ import annotations

import codecs
import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time

PATIENCE = 60.0  # seconds; only reached when the test fails


class Terminal:
    """Runs a program with a terminal on stdin, stdout and stderr."""

    def __init__(self, *arguments: str, columns: int = 0, **environment: str) -> None:
        """Start `python -m runner` with the arguments; a terminal of 0 columns does not know its width."""
        master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 50 if columns else 0, columns, 0, 0))
        self.master = master
        self.seen = ""
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a read may end within a character
        self.process = subprocess.Popen(
            [sys.executable, "-m", "runner", *arguments],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            env={**os.environ, "TERM": "xterm", "INPUTRC": "/dev/null", **environment},
        )
        os.close(slave)

    def expect(self, pattern: str) -> str:
        """Wait until the output since the last match contains `pattern`; return the text up to the end of the match."""
        deadline = time.monotonic() + PATIENCE
        while (found := re.search(pattern, self.seen)) is None:
            if time.monotonic() > deadline:
                raise AssertionError(f"no {pattern!r} in {self.seen!r}")
            if select.select([self.master], [], [], 0.1)[0]:
                try:
                    data = os.read(self.master, 65536)
                except OSError:  # the other side is closed
                    data = b""
                if not data:
                    raise AssertionError(f"ended without {pattern!r}: {self.seen!r}")
                self.seen += self.decoder.decode(data)
        text, self.seen = self.seen[: found.end()], self.seen[found.end() :]
        return text

    def send(self, text: str) -> None:
        os.write(self.master, text.encode())

    def interrupt(self) -> None:
        time.sleep(0.5)  # a signal between drawing the prompt and waiting for a key is seen at the next key only
        os.kill(self.process.pid, signal.SIGINT)

    def close(self) -> int:
        """Wait for the program to end; return its exit code."""
        deadline = time.monotonic() + PATIENCE
        while self.process.poll() is None and time.monotonic() < deadline:
            if select.select([self.master], [], [], 0.05)[0]:
                try:
                    self.seen += self.decoder.decode(os.read(self.master, 65536))
                except OSError:
                    break
        return self.process.wait(timeout=10)
