"""Speed of a model on this machine, in llama-bench's words: `pp512` reads a prompt, `tg128` generates."""

from __future__ import annotations

from runner.bench.measure import Case, Result, cases, run
from runner.bench.models import Subject, open_subject

__all__ = ["Case", "Result", "Subject", "cases", "open_subject", "run"]
