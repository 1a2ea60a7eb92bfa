"""Families whose layers differ in heads, RoPE and widths: what their keys say, and tensors as mlx-lm names them."""

from __future__ import annotations

import json
from typing import Any

import mlx.core as mx
import pytest
from places import TESTS
from sources import Arrays

from runner.config.memory import Rows
from runner.engine.loaded import assemble
from runner.errors import ConfigError
from runner.families import find

FAMILIES = TESTS / "fixtures" / "families"


def raw_config(name: str, **changes: Any) -> dict[str, Any]:
    raw: dict[str, Any] = json.loads((FAMILIES / name / "config.json").read_text())
    return raw | changes


def read(name: str, **changes: Any) -> Any:
    raw = raw_config(name, **changes)
    return find(raw)[0].from_dict(raw)


def test_mimos_window_does_not_count_the_query() -> None:
    """The authors' `sliding_window_size` is what a query looks back on, transformers' `sliding_window` one more."""
    config = read("mimo_v2_flash-base")
    assert config.memory(0) == (Rows(2, 24, 8),) and config.memory(1) == (Rows(4, 24, 8, window=9),)
    assert read("mimo_v2_flash-base", sliding_window_size=None, sliding_window=8).memory(1)[0].window == 8
    assert [config.for_layer(index).rope_theta for index in (0, 1)] == [5e6, 1e4]
    assert [config.for_layer(index).sparse for index in (0, 1, 2)] == [False, True, True]


def test_lagunas_heads_are_of_the_layer() -> None:
    config = read("laguna-base")
    assert [config.for_layer(index).num_attention_heads for index in range(3)] == [2, 4, 4]
    assert [config.for_layer(index).rotary_dim for index in range(2)] == [8, 16]
    assert config.for_layer(0).rope_scaling.kind == "yarn" and config.for_layer(1).rope_scaling is None
    assert [read("laguna-v5").for_layer(index).gates for index in range(2)] == [2 * 16, 4 * 16]


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("laguna-base", {"num_attention_heads_per_layer": [2, 4]}, "num_attention_heads_per_layer has 2 entries"),
        ("laguna-base", {"num_attention_heads_per_layer": [2, 3, 4]}, "num_attention_heads (3) must be a multiple"),
        ("laguna-base", {"gating": False}, "gating = False"),
        ("laguna-base", {"gating": "per-token"}, "gating = 'per-token'"),
        ("laguna-base", {"moe_apply_router_weight_on_input": True}, "'moe_apply_router_weight_on_input'"),
        ("laguna-base", {"mlp_layer_types": ["dense"]}, "mlp_layer_types must have dense or sparse for each of 3"),
        ("mellum-base", {"mlp_layer_types": ["thick"] * 3}, "mlp_layer_types"),
        ("mimo_v2_flash-base", {"add_full_attention_sink_bias": True}, "'add_full_attention_sink_bias'"),
        ("mimo_v2_flash-base", {"n_shared_experts": 1}, "n_shared_experts"),
        ("mimo_v2_flash-base", {"swa_rope_theta": 0}, "swa_rope_theta"),
        ("afmoe-base", {"route_norm": False}, "'route_norm'"),
        ("afmoe-base", {"score_func": "softmax"}, "'score_func'"),
        ("cohere2_moe-base", {"expert_selection_fn": "relu"}, "expert_selection_fn 'relu'"),
        ("cohere2_moe-base", {"shared_expert_combination_strategy": "max"}, "strategy 'max'"),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_named(name: str, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config = read(name, **changes)
        for index in range(config.num_hidden_layers):
            config.for_layer(index)
    assert words in str(caught.value)


STACKED = {
    "afmoe-base": "{stem}.experts.{part}.weight",
    "laguna-base": "{stem}.switch_mlp.{part}.weight",
    "mimo_v2_flash-base": "{stem}.switch_mlp.{part}.weight",
    "cohere2_moe-base": "{stem}.switch_mlp.{part}.weight",
    "mellum-base": "{stem}.switch_mlp.{part}.weight",
}
"""Where mlx-lm puts the matrices of all experts."""


@pytest.mark.parametrize("name", STACKED)
def test_experts_as_mlx_lm_stacks_them(name: str) -> None:
    raw, tensors = raw_config(name), dict(mx.load(str(FAMILIES / name / "model.safetensors")))
    prompt = [1, 9, 10, 11]
    plain = assemble(raw, Arrays(tensors), dtype="float32").logits(prompt)
    stems = {tensor.partition(".experts.0.")[0] for tensor in tensors if ".experts.0." in tensor}
    assert stems
    for stem in stems:
        for part in ("gate_proj", "up_proj", "down_proj"):
            names = [f"{stem}.experts.{expert}.{part}.weight" for expert in range(4)]
            tensors[STACKED[name].format(stem=stem, part=part)] = mx.stack([tensors.pop(tensor) for tensor in names])
        if name.startswith("laguna"):
            tensors[f"{stem}.gate.proj.weight"] = tensors.pop(f"{stem}.gate.weight")
            correction = tensors.pop(f"{stem}.experts.e_score_correction_bias")
            tensors[f"{stem}.gate.e_score_correction_bias"] = correction
    assert mx.array_equal(assemble(raw, Arrays(tensors), dtype="float32").logits(prompt), plain)
