"""Falcon-H1 as mlx-lm writes it: most factors of the config are in the weights already."""

from __future__ import annotations

import mlx.core as mx
import pytest
from places import TESTS
from references import error, expected
from sources import Arrays

from runner.checkpoint.directory import Checkpoint
from runner.engine.loaded import assemble
from runner.errors import ConfigError

BASE = TESTS / "fixtures" / "families" / "falcon_h1-base"


def folded(checkpoint: Checkpoint) -> dict[str, mx.array]:
    """What `sanitize` of mlx-lm 0.32.2 makes of the tensors, in float32; its factor for `key_proj` finds no tensor."""
    raw = checkpoint.config
    inner, state = raw["mamba_d_ssm"], raw["mamba_n_groups"] * raw["mamba_d_state"]
    sizes = (inner, inner, state, state, raw["mamba_n_heads"])
    parts = [mx.full((size, 1), factor) for size, factor in zip(sizes, raw["ssm_multipliers"], strict=True)]
    factors = {
        "embed_tokens": raw["embedding_multiplier"],
        "q_proj": raw["attention_in_multiplier"],
        "k_proj": raw["attention_in_multiplier"],
        "o_proj": raw["attention_out_multiplier"],
        "out_proj": raw["ssm_out_multiplier"],
        "gate_proj": raw["mlp_multipliers"][0],
        "down_proj": raw["mlp_multipliers"][1],
        "in_proj": raw["ssm_in_multiplier"] * mx.concatenate(parts),
    }
    found = {}
    for name in checkpoint.headers:
        array = checkpoint.read(name).astype(mx.float32)
        layer = name.split(".")[-2]
        found[name] = array * factors.get(layer, 1.0) if name.endswith(".weight") else array
        if name.endswith("conv1d.weight"):
            found[name] = array.swapaxes(1, 2)
    return found


def test_folded_factors_are_not_applied_again() -> None:
    checkpoint = Checkpoint.open(BASE)
    engine = assemble(dict(checkpoint.config), Arrays(folded(checkpoint)), dtype="float32")
    wanted = mx.load(str(BASE / "expected.safetensors"))
    for name, prompt in expected(BASE)["prompts"].items():
        assert error(engine.logits(prompt), wanted[f"logits.{name}"]) < 1e-4


def test_biases_beside_folded_factors_are_refused() -> None:
    checkpoint = Checkpoint.open(BASE)
    with pytest.raises(ConfigError, match="with biases that mlx-lm wrote"):
        assemble({**checkpoint.config, "mlp_bias": True}, Arrays(folded(checkpoint)), dtype="float32")
