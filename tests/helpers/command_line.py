"""`runner` as a program, and what it says on stderr whether or not the CPU kernels are built."""

from __future__ import annotations

import os
import subprocess
import sys


def run(*arguments: str, stdin: str | bytes | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `python -m runner ...` with text as input and output; stdin None is /dev/null."""
    data = stdin.encode() if isinstance(stdin, str) else stdin
    done = subprocess.run(
        [sys.executable, "-m", "runner", *arguments],
        input=data,
        stdin=subprocess.DEVNULL if data is None else None,
        capture_output=True,
        timeout=120,
        check=False,
        env={**os.environ, **environment},
    )
    return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())


def own(stderr: str) -> str:
    """Remove from `stderr` the line, at most one, in which a command says that the CPU kernels are missing."""
    lines = stderr.splitlines(keepends=True)
    others = [line for line in lines if "'runner doctor' says more" not in line]
    assert len(lines) - len(others) <= 1, stderr
    return "".join(others)
