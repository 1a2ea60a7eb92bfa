"""Tiny checkpoints with the results that transformers computed from them, and how close ours must be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
from places import TESTS

from runner.families import FAMILIES

FIXTURES = sorted(
    path.parent
    for path in [*TESTS.glob("fixtures/llama/*/expected.json"), *TESTS.glob("fixtures/families/*/expected.json")]
    if json.loads((path.parent / "config.json").read_text())["model_type"] in FAMILIES
)

TOLERANCE = 2e-4
"""Allowed error of logits, as a fraction of their standard deviation.

Ten times less than promised, since an error of 2e-3 could not tell gelu from its tanh form.
"""

QUANTISED = 2e-3
"""CPU kernels multiply packed weights with activations of 16 bits: the error that tiny random models make of it."""


def expected(path: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((path / "expected.json").read_text())
    return result


def tolerance(path: Path) -> float:
    return QUANTISED if "-mlx-" in path.name or "mxfp4" in path.name else TOLERANCE


def error(found: mx.array, wanted: mx.array) -> float:
    return float(mx.max(mx.abs(found - wanted)) / mx.std(wanted))


def routed(raw: dict[str, Any]) -> bool:
    """Whether a model with this `config.json` has experts, by the keys that say how many a token passes."""
    chosen = any(raw.get(key) for key in ("num_experts_per_tok", "top_k_experts", "moe_k", "moe_topk"))
    return chosen and raw.get("num_local_experts") != 0
