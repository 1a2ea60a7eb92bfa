"""A command's own lines on stderr, the same whether or not the CPU kernels are built."""

from __future__ import annotations


def own(stderr: str) -> str:
    """Remove from `stderr` the line, at most one, in which a command says that the CPU kernels are missing."""
    lines = stderr.splitlines(keepends=True)
    others = [line for line in lines if "'runner doctor' says more" not in line]
    assert len(lines) - len(others) <= 1, stderr
    return "".join(others)
