"""The command line; `program` is the console script. Nothing heavier than typer is imported before a command runs."""

from __future__ import annotations

import atexit
import contextlib
import gc
import os
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    The codes are 0: done; 1: failed; 2: wrong usage; 130: Ctrl-C; 141: the reader of stdout has gone (`| head`).
    `argv` is the arguments without the program's name; None takes those of the process.
    """
    try:
        from runner.cli.app import run

        return run(argv)
    except KeyboardInterrupt:  # a Ctrl-C that `run` could not catch: during its import, or while it printed an error
        return 130


def program() -> NoReturn:
    """Run the command that the process was started for, and end the process with its exit code.

    What was to be done at the end is done, and output flushed. Python would then take down some hundred thousand
    objects one by one, a tenth of the time of a short answer; the system frees their memory at once.
    """
    # Python looks for cycles each time that 700 objects more have been made, and a vocabulary is many.
    gc.set_threshold(50_000, 20, 100)
    code = main()
    # Who does not wait for what is still under way ends it, without Python's words.
    signal.signal(signal.SIGINT, lambda number, frame: os._exit(130))
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        # None where it was closed; `main` has reported what could not be written.
        with contextlib.suppress(AttributeError, OSError, ValueError):
            stream.flush()
    os._exit(code)
