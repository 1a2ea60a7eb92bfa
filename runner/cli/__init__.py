"""The command line; `main` is the console script. Nothing heavier than typer is imported before a command runs."""

from __future__ import annotations

from collections.abc import Sequence


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
