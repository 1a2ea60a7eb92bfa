"""Qwen 3.5 and Qwen 3 Next beyond the fixtures: mlx-lm's files, what is refused, and the order of fused rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from places import TESTS
from references import error, expected, tolerance
from sources import Arrays
from twins import rand

from runner.adapters import open_adapters
from runner.bench.models import random_weights
from runner.checkpoint.directory import Checkpoint
from runner.checkpoint.wrapped import unwrap
from runner.convert.convert import pieces
from runner.convert.plan import plan_conversion
from runner.convert.quantize import QUANTIZATIONS, Quantizer
from runner.engine.loaded import assemble, open_loaded
from runner.errors import ConfigError, WeightsError
from runner.nn.delta_rule import by_part

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
    engine = open_loaded(as_mlx_lm(name, tmp_path / "model"), dtype="float32")
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
        open_loaded(path)
    assert "A_logs" in str(caught.value) and "mtp" not in str(caught.value)


TARGETS = {
    "qwen3_5_text-base": ("linear_attn.in_proj_qkv", "linear_attn.in_proj_a", "linear_attn.out_proj"),
    "qwen3_next-base": ("linear_attn.in_proj_qkvz", "linear_attn.in_proj_ba", "linear_attn.out_proj"),
}


@pytest.mark.parametrize("name", TARGETS)
def test_adapters_of_the_recurrent_layers(name: str, tmp_path: Path) -> None:
    """A LoRA as PEFT writes it, on matrices that are read joined or with their rows in another order: as if merged."""
    stored = {k: v.astype(mx.float32) for k, v in mx.load(str(FAMILIES / name / "model.safetensors")).items()}
    updates, merged = {}, dict(stored)
    for number, stem in enumerate(s for s in stored if s.removesuffix(".weight").endswith(TARGETS[name])):
        out, width = stored[stem].shape
        a, b = rand(2, width, seed=number), rand(out, 2, seed=100 + number)
        layer = f"base_model.model.{stem.removesuffix('.weight')}"
        updates |= {f"{layer}.lora_A.weight": a, f"{layer}.lora_B.weight": b}
        merged[stem] = stored[stem] + 0.1 * (b @ a)
    (tmp_path / "lora").mkdir()
    mx.save_safetensors(str(tmp_path / "lora" / "adapter_model.safetensors"), updates)
    words = {"peft_type": "LORA", "r": 2, "lora_alpha": 0.2, "target_modules": [t.split(".")[1] for t in TARGETS[name]]}
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(words))
    opened = open_adapters([str(tmp_path / "lora")], lambda spec: Path(spec))
    found = open_loaded(FAMILIES / name, dtype="float32", adapters=opened).logits(range(8, 40))
    raw = json.loads((FAMILIES / name / "config.json").read_text())
    wanted = assemble(raw, Arrays(merged), dtype="float32").logits(range(8, 40))
    assert (
        error(found, wanted) < 1e-3 < error(open_loaded(FAMILIES / name, dtype="float32").logits(range(8, 40)), wanted)
    )


@pytest.mark.parametrize("name", ["qwen3_5_text-base", "qwen3_5_moe_text-base"])
def test_what_is_quantized_has_mlx_lms_names(name: str, tmp_path: Path) -> None:
    """Its type is the wrapper's, whose config mlx-lm reads flat as well; fused experts come apart."""
    raw = json.loads((FAMILIES / name / "config.json").read_text())
    raw |= {"hidden_size": 64, "torch_dtype": "float32", "intermediate_size": 64}
    if "moe" in name:
        del raw["intermediate_size"]
        raw |= {"moe_intermediate_size": 64, "shared_expert_intermediate_size": 64}
    source = random_weights(raw)
    tensors = fused({stem: source.read(stem) for stem in source.headers})
    work = plan_conversion(raw, Arrays(tensors), quantizer=Quantizer(QUANTIZATIONS["8"]), dtype=None)
    assert work.config["model_type"] == raw["model_type"].removesuffix("_text")
    assert work.headers["model.layers.0.linear_attn.conv1d.weight"].shape == (96, 1, 4)
    written: dict[str, Any] = {}
    for piece in pieces(work, Arrays(tensors)):
        written.setdefault(piece.name, []).append(piece.array)
    whole = Arrays({name: mx.concatenate(parts) if len(parts) > 1 else parts[0] for name, parts in written.items()})
    assert ("model.layers.0.mlp.switch_mlp.up_proj.scales" in whole.headers) == ("moe" in name)
    text, plain, _ = unwrap(work.config, whole)
    found = assemble(text, plain, dtype="float32").logits(range(8, 40))
    assert typical(found, assemble(raw, Arrays(tensors), dtype="float32").logits(range(8, 40))) < 0.1


def fused(tensors: dict[str, mx.array]) -> dict[str, mx.array]:
    """Experts as published: one tensor for all, gate and up side by side."""
    found = {name: array for name, array in tensors.items() if ".experts." not in name}
    for stem in {name.partition(".experts.")[0] for name in tensors if ".experts." in name}:

        def stack(part: str, stem: str = stem) -> mx.array:
            return mx.stack([tensors[f"{stem}.experts.{e}.{part}.weight"] for e in range(4)])

        found[f"{stem}.experts.gate_up_proj"] = mx.concatenate([stack("gate_proj"), stack("up_proj")], axis=1)
        found[f"{stem}.experts.down_proj"] = stack("down_proj")
    return found


def typical(found: mx.array, wanted: mx.array) -> float:
    return float(mx.sqrt(mx.mean(mx.square(found - wanted))) / mx.std(wanted))
