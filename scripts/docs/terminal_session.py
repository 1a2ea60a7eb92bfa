"""Runs the commands of the usage pages in a shell, or on a pseudo-terminal with typed input."""

from __future__ import annotations

import codecs
import fcntl
import os
import pty
import select
import struct
import subprocess
import termios
import time
from collections.abc import Sequence
from pathlib import Path

PATIENCE = 600.0  # seconds for one command
PROMPTS = ("> ", "… ")
ROWS = 50


def shell(command: str, directory: Path, environment: dict[str, str]) -> tuple[int, str]:
    """Run a line in a shell; returns exit code and output (stdout and stderr as they come)."""
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=directory,
        env={**environment, "TERM": "dumb"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=PATIENCE,
        check=False,
    )
    return done.returncode, done.stdout.decode()


class Session:
    """A command on a terminal of its own. TERM is the environment's or else dumb: no colours, no cursor movements."""

    def __init__(self, command: str, directory: Path, environment: dict[str, str]) -> None:
        self.command = command
        self.directory = directory
        self.environment = {"TERM": "dumb", "INPUTRC": "/dev/null", **environment}
        self.events: list[tuple[float, str]] = []  # what was shown and when, in seconds since the start

    def run(self, typed: Sequence[str]) -> tuple[int, str]:
        """Type each line when the program asks for one; returns the exit code and all that the terminal showed."""
        master, slave = pty.openpty()
        columns = int(self.environment["COLUMNS"])
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, columns, 0, 0))
        process = subprocess.Popen(
            ["bash", "-c", self.command],
            cwd=self.directory,
            env=self.environment,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
        )
        os.close(slave)
        try:
            text = self._converse(master, list(typed))
            return process.wait(timeout=PATIENCE), text
        finally:
            process.kill()
            process.wait()
            os.close(master)

    def _converse(self, master: int, waiting: list[str]) -> str:
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        seen, answered, started = "", 0, time.monotonic()
        deadline = started + PATIENCE
        while time.monotonic() < deadline:
            if select.select([master], [], [], 0.2)[0]:
                try:
                    data = os.read(master, 65536)
                except OSError:  # the other side has closed
                    data = b""
                if not data:
                    return seen.replace("\r\n", "\n").replace("\r", "")
                text = decoder.decode(data)
                self.events.append((time.monotonic() - started, text.replace("\r", "")))
                seen += text
            elif waiting and len(seen) > answered and seen.rsplit("\n", 1)[-1] in PROMPTS:
                os.write(master, waiting.pop(0).encode() + b"\r")
                answered = len(seen)
        raise subprocess.TimeoutExpired(self.command, PATIENCE)
