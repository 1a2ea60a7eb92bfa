"""`python -m runner` is the console script."""

from __future__ import annotations

from runner.cli import program

if __name__ == "__main__":
    program()
