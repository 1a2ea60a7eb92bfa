"""How many tokens a config says prompt and answer can have: what the types of RoPE scaling make of the two lengths."""

from __future__ import annotations

import json
from typing import Any

import pytest
from places import TESTS

from runner.families import find

LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
LONG = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 16}


def context(fixture: str, **changes: Any) -> int:
    (path,) = TESTS.glob(f"fixtures/*/{fixture}/config.json")
    raw = {**json.loads(path.read_text(encoding="utf-8")), "max_position_embeddings": 64, **changes}
    length: int = find(raw)[0].from_dict(raw).context_length
    return length


@pytest.mark.parametrize(
    ("scaling", "wanted"),
    [
        (None, 64),
        ({"rope_type": "linear", "factor": 4.0}, 256),
        ({"rope_type": "dynamic", "factor": 2.5}, 160),
        ({"rope_type": "yarn", "factor": 4.0}, 256),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}, 128),
        # Some files state the stretched length (DeepSeek), and it is never cut.
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}, 64),
        ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 16}, 64),
        ({"rope_type": "linear", "factor": 0.5}, 64),
        ({"rope_type": "linear", "factor": 1e12}, 1 << 24),
        ({"rope_type": "llama3", "factor": 8.0, **LLAMA3}, 64),
        ({"rope_type": "longrope", "factor": 8.0, **LONG}, 64),
    ],
)
def test_linear_dynamic_and_yarn_stretch_the_original_length(scaling: Any, wanted: int) -> None:
    assert context("llama-gqa-hub", rope_scaling=scaling) == wanted


def test_families_that_differ() -> None:
    linear = {"rope_type": "linear", "factor": 8.0}
    assert context("gemma3_text-base", rope_scaling=linear) == 64  # 131072 in the published files is the stretched one
    assert context("qwen2-base", rope_scaling={"type": "yarn", "factor": 4.0}) == 256
    assert context("deepseek_v3-base", rope_scaling={"type": "yarn", "factor": 4.0}) == 256
    assert context("gpt2-base", n_positions=64, max_position_embeddings=64) == 64
