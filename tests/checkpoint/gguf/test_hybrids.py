"""GGUF files of families whose layers differ, against the reference logits or, for cut models, their safetensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf_hybrids as hybrids
import gguf_writer as writer
import mlx.core as mx
import pytest
from places import TESTS
from references import TOLERANCE, error, expected

from runner.checkpoint.directory import Checkpoint
from runner.checkpoint.gguf import GGUF
from runner.checkpoint.model_files import open_files
from runner.convert.convert import convert
from runner.engine.loaded import open_loaded
from runner.errors import CheckpointError

FAMILIES = TESTS / "fixtures" / "families"
IDS = [1, 5, 17, 9, 33, 2, 40, 8, 8, 25, 31, 12, 3, 44, 20, 6, 19, 28, 11, 37]
WHOLE = (
    "granitemoehybrid-base", "mamba-base", "mamba-v5", "falcon_mamba-base", "mamba2-base", "jamba-base",
    "qwen3_next-base", "gemma4_text-base", "gemma4_text-large", "gemma4_text-moe", "gpt2-base", "gpt_bigcode-base",
    "gpt_neox-base", "gpt_neox-sequential", "bloom-base", "gemma3n_text-base",
    "jais2-base", "glm_moe_dsa-base", "mellum-base", "deepseek_v32-base",
)  # fmt: skip
CUT: dict[str, tuple[str, list[int], dict[str, Any]]] = {
    "nemotron_h": ("nemotron_h-base", [0, 2, 3, 4], {"hybrid_override_pattern": "M*M-"}),
    "nemotron_h_moe": ("nemotron_h-base", [0, 1, 2, 3], {"hybrid_override_pattern": "ME*M"}),
    "falcon-h1": ("falcon_h1-base", [1, 0], {"tie_word_embeddings": False}),
    "granitehybrid, dense": (
        "granitemoehybrid-dense-v5", [0, 1, 2],
        {"layer_types": ["mamba", "attention", "mamba"], "position_embedding_type": "nope", "rope_parameters": None},
    ),
    "exaone-moe": ("exaone_moe-base", [0, 1, 2], {"num_nextn_predict_layers": 0}),
    "afmoe": ("afmoe-base", [0, 1, 1, 2], {"layer_types": None, "global_attn_every_n_layers": 4}),
    "hunyuan-moe": ("hunyuan_v1_moe-base", [0, 1], {"moe_topk": [2, 2], "rope_scaling": None}),
    "minicpm3": ("minicpm3-base", [0, 1], {"scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 256}),
    "llama4": (
        "llama4_text-base", [1, 0, 1, 2],
        {"moe_layers": None, "no_rope_layers": None, "interleave_moe_layer_step": 2, "attention_chunk_size": 8192,
         "floor_scale": 8192, "attn_scale": 0.1},
    ),
}  # fmt: skip
"""Models made of a fixture's layers, of which its own set has no GGUF."""


@pytest.mark.parametrize("name", WHOLE)
def test_logits_are_the_references(name: str, tmp_path: Path) -> None:
    config = Checkpoint.open(FAMILIES / name).config
    path = hybrids.write(tmp_path / "m.gguf", config, writer.weights_of(FAMILIES / name))
    engine, wanted = open_loaded(path, dtype="float32"), mx.load(str(FAMILIES / name / "expected.safetensors"))
    for prompt, ids in expected(FAMILIES / name)["prompts"].items():
        assert error(engine.logits(ids), wanted[f"logits.{prompt}"]) < TOLERANCE


@pytest.mark.parametrize("name", CUT)
def test_logits_are_those_from_safetensors(name: str, tmp_path: Path) -> None:
    fixture, layers, changes = CUT[name]
    config = hybrids.cut(FAMILIES / fixture, tmp_path / "cut", layers, **changes)
    path = hybrids.write(tmp_path / "m.gguf", config, writer.weights_of(tmp_path / "cut"))
    wanted = open_loaded(tmp_path / "cut", dtype="float32").logits(IDS)
    assert error(open_loaded(path, dtype="float32").logits(IDS), wanted) < TOLERANCE
    convert(open_files(path), tmp_path / "out")
    assert error(open_loaded(tmp_path / "out", dtype="float32").logits(IDS), wanted) < TOLERANCE


TYPES = "glm-dsa.attention.indexer.types"


@pytest.mark.parametrize(
    ("name", "key", "value", "message"),
    [
        ("granitemoehybrid-base", "granitehybrid.rope.scaling.finetuned", True, "as in a Bamba"),
        ("granitemoehybrid-base", "granitehybrid.ssm.inner_size", 65, "65 numbers in 8 heads"),
        ("granitemoehybrid-base", "granitehybrid.ssm.inner_size", 72, "Mamba layers of 72 numbers in a model of 32"),
        ("mamba2-base", "mamba2.ssm.time_step_rank", None, "time_step_rank is missing"),
        ("jamba-base", "jamba.attention.head_count_kv", [0, -1, 0], "expected one number of heads and 0"),
        ("falcon_h1-base", "falcon-h1.block_count", 2, "without output.weight"),
        ("gemma4_text-base", "gemma4.attention.value_length_swa", 16, "keys of 8 numbers, values and RoPE of"),
        ("gemma4_text-base", "gemma4.attention.shared_kv_layers", 6, "expected an integer below 6"),
        ("gemma4_text-base", "gemma4.feed_forward_length", [32, 32, 32, 64, 64, 64], "expected one number for all"),
        ("gemma4_text-base", "gemma4.feed_forward_length", [32, 32, 32, 32, 48, 48], "the same or twice as much"),
        ("gemma4_text-base", "gemma4.attention.sliding_window_pattern", None, "is missing"),
        ("gemma3n_text-base", "gemma3n.altup.active_idx", 3, "stream 3 of 3"),
        ("gemma3n_text-base", "gemma3n.activation_sparsity_scale", [1.0], "expected a number for each of 5 layers"),
        ("glm_moe_dsa-base", "glm-dsa.context_length", 1 << 20, "indexer.types is missing"),
        ("gpt_bigcode-base", "starcoder.attention.head_count_kv", 2, "2 keys for 4 heads"),
        ("gpt_neox-base", "gptneox.attention.head_count", 5, "96 rows do not divide into 5 heads"),
    ],
)
def test_settings_that_make_no_sense_are_refused(name: str, key: str, value: Any, message: str, tmp_path: Path) -> None:
    config, weights = Checkpoint.open(FAMILIES / name).config, writer.weights_of(FAMILIES / name)
    with pytest.raises(CheckpointError, match=message):
        GGUF.open(hybrids.write(tmp_path / "m.gguf", config, weights, **{key: value, TYPES: None}))


def test_the_kinds_of_a_nemotrons_layers(tmp_path: Path) -> None:
    fixture, layers, changes = CUT["nemotron_h_moe"]
    config = hybrids.cut(FAMILIES / fixture, tmp_path / "cut", layers, **changes)
    weights, path = writer.weights_of(tmp_path / "cut"), tmp_path / "m.gguf"
    assert GGUF.open(hybrids.write(path, config, weights)).config["hybrid_override_pattern"] == "ME*M"
    for key, value, words in (
        ("expert_group_count", 2, "experts in 2 groups"),
        ("feed_forward_length", [0, 32], "expected a number for each of 4 layers"),
        ("attention.head_count_kv", 0, "no layer attends"),
    ):
        with pytest.raises(CheckpointError, match=words):
            GGUF.open(hybrids.write(path, config, weights, **{f"nemotron_h_moe.{key}": value}))
