"""Qwen 3.5 and Qwen 3 Next beyond the fixtures: mlx-lm's files, what is refused, and the order of fused rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from places import TESTS
from references import error, expected, tolerance

from runner.checkpoint.directory import Checkpoint
from runner.engine.engine import assemble, open_engine
from runner.errors import ConfigError, WeightsError
from runner.models.qwen3_next import by_part

FAMILIES = TESTS / "fixtures" / "families"
ADDED = (
    "input_layernorm.weight",
    "post_attention_layernorm.weight",
    "model.norm.weight",
    "q_norm.weight",
    "k_norm.weight",
)
"""What mlx-lm 0.32.2 adds one to, by the ends of the names."""


def as_mlx_lm(name: str, out: Path, **changes: Any) -> Path:
    """A fixture as mlx-lm writes it: convolutions turned around, norms with the one added; Qwen 3.5's in a wrapper."""
    out.mkdir()
    raw = json.loads((FAMILIES / name / "config.json").read_text()) | changes
    tensors = {}
    for stored, array in mx.load(str(FAMILIES / name / "model.safetensors")).items():
        if stored.startswith("mtp."):
            continue
        new = array.swapaxes(1, 2) if stored.endswith("conv1d.weight") else array
        new = new.astype(mx.float32) + 1 if stored.endswith(ADDED) else new
        tensors[stored if name.startswith("qwen3_next") else f"language_model.{stored}"] = new
    if not name.startswith("qwen3_next"):
        kind = raw["model_type"].removesuffix("_text")
        raw = {"model_type": kind, "text_config": raw, "tie_word_embeddings": raw["tie_word_embeddings"]}
    mx.save_safetensors(str(out / "model.safetensors"), tensors)
    (out / "config.json").write_text(json.dumps(raw))
    return out


@pytest.mark.parametrize("name", ["qwen3_5_text-base", "qwen3_5_moe_text-base", "qwen3_next-base"])
def test_files_of_mlx_lm(name: str, tmp_path: Path) -> None:
    """`scripts/compare/compare_families` holds the like against mlx-lm itself."""
    engine = open_engine(as_mlx_lm(name, tmp_path / "model"), dtype="float32")
    wanted = mx.load(str(FAMILIES / name / "expected.safetensors"))
    for prompt, ids in expected(FAMILIES / name)["prompts"].items():
        assert error(engine.logits(ids), wanted[f"logits.{prompt}"]) < tolerance(FAMILIES / name)


def test_rows_sorted_by_key_head() -> None:
    """Two key heads, parts of 2, 2, 4 and 4 rows: each head stores 1, 1, 2 and 2 of them."""
    stored = ["q0", "k0", "v0", "v1", "z0", "z1", "q1", "k1", "v2", "v3", "z2", "z3"]
    assert [stored[row] for row in by_part((2, 2, 4, 4), 2)] == [
        "q0", "q1", "k0", "k1", "v0", "v1", "v2", "v3", "z0", "z1", "z2", "z3",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"linear_num_value_heads": 3}, "linear_num_value_heads (3) must be a multiple of linear_num_key_heads (2)"),
        ({"layer_types": ["linear_attention", "sliding_attention", "full_attention"]}, "'sliding_attention'"),
        ({"layer_types": ["linear_attention"]}, "layer_types has 1 entries, but there are 3 layers"),
        ({"attn_output_gate": False}, "'attn_output_gate' = False is not supported, only True is"),
        ({"mamba_ssm_dtype": "bfloat16"}, "'mamba_ssm_dtype' = 'bfloat16' is not supported"),
        ({"head_dim": 20}, "RoPE turn 5 numbers"),
    ],
)
def test_configs_that_are_refused(changes: dict[str, Any], words: str) -> None:
    raw = json.loads((FAMILIES / "qwen3_5_text-base" / "config.json").read_text()) | changes
    with pytest.raises(ConfigError) as caught:
        assemble(raw, Checkpoint.open(FAMILIES / "qwen3_5_text-base"))
    assert words in str(caught.value)


def test_a_misspelt_tensor_is_reported_beside_those_for_multi_token_prediction(tmp_path: Path) -> None:
    path = as_mlx_lm("qwen3_next-base", tmp_path / "model")
    tensors = dict(mx.load(str(path / "model.safetensors")))
    tensors["model.layers.0.linear_attn.A_logs"] = tensors.pop("model.layers.0.linear_attn.A_log")
    tensors["mtp.layers.0.input_layernorm.weight"] = mx.ones((32,))
    mx.save_safetensors(str(path / "model.safetensors"), tensors)
    with pytest.raises(WeightsError) as caught:
        open_engine(path)
    assert "A_logs" in str(caught.value) and "mtp" not in str(caught.value)
