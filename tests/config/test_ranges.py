"""Numbers that no model can have: a ConfigError with key and value, not NaN, a foreign error or an endless loop."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from typing import Any

import pytest
from places import TESTS

from runner.checkpoint.directory import Checkpoint
from runner.config.base import Config
from runner.errors import ConfigError, RunnerError
from runner.families import FAMILIES, find
from runner.weights.plan import plan

FIXTURES = {
    json.loads(path.read_text(encoding="utf-8"))["model_type"]: path.parent
    for path in sorted(TESTS.glob("fixtures/*/*/config.json"))
}
"""One fixture of each family."""


def raw_of(model_type: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((FIXTURES[model_type] / "config.json").read_text(encoding="utf-8"))
    return result


def read(raw: dict[str, Any]) -> Any:
    return find(raw)[0].from_dict(raw)


def refusal(raw: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        read(raw)
    return str(caught.value)


def has(model_type: str, field: str) -> bool:
    return any(item.init and item.name == field for item in dataclasses.fields(FAMILIES[model_type].load()[0]))


WITH_ROPE = [name for name in FAMILIES if has(name, "rope_theta")]


@pytest.mark.parametrize("model_type", WITH_ROPE)
@pytest.mark.parametrize("value", [0, 1, -1, 0.5, -1e4, math.nan, math.inf, 1e29, 1e300, 10**400])
def test_a_rope_base_that_turns_nothing_is_named(model_type: str, value: float) -> None:
    raw = {name: item for name, item in raw_of(model_type).items() if name not in ("rope_parameters", "rope_theta")}
    raw.pop("rotary_emb_base", None)
    message = refusal({**raw, "rope_theta": value})
    assert "rope_theta" in message and repr(value)[:20] in message


@pytest.mark.parametrize(
    ("model_type", "key"), [("gemma3_text", "rope_local_base_freq"), ("olmo3", "rope_local_base_freq")]
)
def test_the_base_of_windowed_layers_too(model_type: str, key: str) -> None:
    raw = {name: item for name, item in raw_of(model_type).items() if name != "rope_parameters"}
    assert key in refusal({**raw, key: 1.0})


@pytest.mark.parametrize("value", [-1e-5, 2.0, 1e30, math.nan, math.inf, "1e-5"])
@pytest.mark.parametrize(
    ("model_type", "key"),
    [
        ("llama", "rms_norm_eps"),
        ("gpt2", "layer_norm_epsilon"),
        ("nemotron", "norm_eps"),
        ("phi", "layer_norm_eps"),
        ("falcon_mamba", "mixer_rms_eps"),
        ("muse_glimmer_text", "post_norm_eps"),
    ],
)
def test_an_epsilon_out_of_range_is_named_by_its_key(model_type: str, key: str, value: Any) -> None:
    message = refusal({**raw_of(model_type), key: value})
    assert key in message and repr(value) in message


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("gemma2", {"attn_logit_softcapping": 0.0}),
        ("gemma2", {"final_logit_softcapping": -30.0}),
        ("gemma2", {"query_pre_attn_scalar": 0}),
        ("granite", {"logits_scaling": 0}),
        ("hyperclovax", {"logits_scaling": 0}),
        ("olmo", {"clip_qkv": -8.0}),
        ("gpt_oss", {"swiglu_limit": 0.0}),
        ("glm", {"partial_rotary_factor": 1.5}),
        ("phi", {"partial_rotary_factor": -0.5}),
        ("llama", {"head_dim": 7}),
        ("deepseek_v3", {"qk_rope_head_dim": 7}),
    ],
)
def test_numbers_that_a_forward_pass_divides_by_or_pairs(model_type: str, changes: dict[str, Any]) -> None:
    """Those that transformers 5 also writes into `rope_parameters` are read from there, so that goes."""
    ((key, value),) = changes.items()
    raw = {name: item for name, item in raw_of(model_type).items() if name != "rope_parameters"}
    message = refusal({**raw, **changes})
    assert repr(value) in message and (key in message or "head_dim" in key)


@pytest.mark.parametrize(
    ("scaling", "words"),
    [
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 0.5}, "an integer of at least 2"),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1}, "an integer of at least 2"),
        ({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 2.0,
          "original_max_position_embeddings": 16}, "low_freq_factor = 4.0 must not be above high_freq_factor = 2.0"),
    ],
)  # fmt: skip
def test_rope_scaling_without_a_meaning_is_named(scaling: dict[str, Any], words: str) -> None:
    raw = {name: value for name, value in raw_of("llama").items() if name != "rope_parameters"}
    assert words in refusal({**raw, "rope_scaling": scaling})


def test_alpha_of_hunyuan_is_held_to_the_range_of_the_base() -> None:
    raw = {name: value for name, value in raw_of("hunyuan_v1_dense").items() if name != "rope_parameters"}
    assert "alpha" in refusal({**raw, "rope_scaling": {"type": "dynamic", "alpha": 1e-300}})
    assert "alpha" in refusal({**raw, "rope_scaling": {"type": "dynamic", "alpha": True}})


@pytest.mark.parametrize("model_type", FAMILIES)
def test_no_count_makes_reading_endless(model_type: str) -> None:
    """Each integer of a config, very large: planned or refused at once, and never an error of another kind."""
    config_class: type[Config] = FAMILIES[model_type].load()[0]
    headers = Checkpoint.open(FIXTURES[model_type]).headers
    keys = {
        config_class.key_of(item.name) for item in dataclasses.fields(config_class) if item.init and "int" in item.type
    }
    assert keys
    for key in keys:
        for value in (1 << 24, 10**400):
            raw = {**raw_of(model_type), key: value}
            started = time.thread_time()
            try:
                found, model_class = find(raw)
                plan(model_class, found.from_dict(raw), headers)
            except RunnerError as error:
                assert str(error), key
            # Some 0.5 s; three times as long where two threads share a core and memory is new to the system.
            assert time.thread_time() - started < 8, (key, value)


def test_further_layers_of_deepseek_are_told_by_number() -> None:
    config = read({**raw_of("deepseek_v3"), "num_nextn_predict_layers": 1 << 24})
    last = config.num_hidden_layers
    assert config.ignores(f"model.layers.{last}.embed_tokens.weight")
    assert config.ignores(f"model.layers.{last + 5}.x")
    assert not config.ignores(f"model.layers.{last - 1}.x") and not config.ignores("model.layers.x.y")
    one = read({**raw_of("deepseek_v3"), "num_nextn_predict_layers": 1})
    assert one.ignores(f"model.layers.{last}.x") and not one.ignores(f"model.layers.{last + 1}.x")


@pytest.mark.parametrize(
    "form", [{"bits": True}, {"bits": 0}, {"bits": 4.0}, {"group_size": -64}, {"group_size": True}, {"bits": 10**30}]
)
def test_a_quantization_that_is_none_is_refused(form: dict[str, Any]) -> None:
    whole = {"bits": 4, "group_size": 64, **form}
    for quantization in (whole, {"bits": 4, "group_size": 64, "lm_head": whole}):
        assert "positive integers bits and group_size" in refusal({**raw_of("llama"), "quantization": quantization})


def test_the_message_names_the_file_once() -> None:
    message = refusal({**raw_of("llama"), "num_hidden_layers": 0, "rms_norm_eps": -1})
    assert message.count("config.json") == 1
    assert "num_hidden_layers must be at least 1, not 0" in message and "rms_norm_eps must be from 0 to 1" in message


@pytest.mark.parametrize("value", [None, 0])
def test_a_window_of_nothing_is_not_taken_for_no_window(value: int | None) -> None:
    """Layers said to have a window, and no width for it: full attention would be another model."""
    raw = {**raw_of("qwen2_moe"), "use_sliding_window": True, "max_window_layers": 0, "sliding_window": value}
    if value is None:  # null turns the windows off in Qwen's own code, unless the layers are listed
        raw["layer_types"] = ["sliding_attention"] * raw["num_hidden_layers"]
    else:
        raw.pop("layer_types", None)
    with pytest.raises(ConfigError, match=f"sliding_window is {value}"):
        read(raw).cache_window(0)
    assert read({**raw, "use_sliding_window": False, "layer_types": None}).cache_window(0) is None
