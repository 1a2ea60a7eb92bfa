"""The command line. `main` is the console script; nothing heavier than typer is imported before a command runs."""

from __future__ import annotations

from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    0: done; 1: failed; 2: wrong usage; 130: Ctrl-C; 141: the reader of stdout left.
    `argv` is the arguments without the program's name; None takes the process's own.
    """
    try:
        from runner.cli.app import run

        return run(argv)
    except KeyboardInterrupt:  # a Ctrl-C outside the boundary: while importing, or while an error was being printed
        return 130
