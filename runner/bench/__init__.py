"""Speed of a model on this machine, with llama-bench's names: `pp512` prefills 512 tokens, `tg128` generates 128."""

from __future__ import annotations

from runner.bench.measure import Case, Result, cases, run
from runner.bench.models import Subject, open_subject, published

__all__ = ["Case", "Result", "Subject", "cases", "open_subject", "published", "run"]
