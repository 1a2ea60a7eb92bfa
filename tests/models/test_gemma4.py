"""Gemma 3n and 4: layers of two sizes, shared keys, what files say of layers; the logits are test_reference's.

Weights are random, so that a chat can have a tokenizer; what is compared is the same model read in another way.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from places import TESTS
from references import error
from sources import Arrays

import runner
from runner.bench.models import random_weights
from runner.config.memory import Rows, Shared
from runner.engine.loaded import assemble, open_loaded
from runner.engine.prefill import new_caches, prefill
from runner.errors import ConfigError, WeightsError
from runner.families import find

FAMILIES = TESTS / "fixtures" / "families"
TOKENIZER = TESTS / "fixtures" / "llama" / "llama-gqa"
SHARING = ["gemma4_text-base", "gemma4_text-moe-v5", "gemma3n_text-base"]
by_sharing = pytest.mark.parametrize("name", SHARING)


def raw_config(name: str, **changes: Any) -> dict[str, Any]:
    raw: dict[str, Any] = json.loads((FAMILIES / name / "config.json").read_text())
    return raw | changes


def read(name: str, **changes: Any) -> Any:
    raw = raw_config(name, **changes)
    return find(raw)[0].from_dict(raw)


def refused(name: str, **changes: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        config = read(name, **changes)
        for index in range(config.num_hidden_layers):
            config.for_layer(index)
            config.memory(index)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- what layers are --------------------------------------------------------------------------------------------------


def test_both_spellings_say_the_same_of_layers() -> None:
    """`global_head_dim` and its sister are what transformers 5 writes as `per_layer_config`."""
    hub = read("gemma4_text-large", num_global_key_value_heads=1, global_head_dim=32)
    sizes = {str(index): {"head_dim": 32, "num_key_value_heads": 1} for index in (1, 3, 5)}
    raw = raw_config("gemma4_text-large", per_layer_config=sizes)
    del raw["global_head_dim"], raw["num_global_key_value_heads"]
    v5 = find(raw)[0].from_dict(raw)
    assert [hub.memory(index) for index in range(6)] == [v5.memory(index) for index in range(6)]
    assert hub.memory(0) == (Rows(2, 8, 8, window=8),) and hub.memory(1) == (Rows(1, 32, 32),)


def test_rope_is_of_the_layers_type() -> None:
    config = read("gemma4_text-base")
    full, windowed = config.for_layer(1), config.for_layer(0)
    assert full.rope_theta == 100.0 and full.rope_scaling.kind == "proportional" and full.rotary_dim == 16
    assert windowed.rope_theta == 1000.0 and windowed.rope_scaling is None and windowed.rotary_dim == 8
    rope = {
        "full_attention": {"rope_type": "default", "rope_theta": 100.0},
        "sliding_attention": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1000.0, "partial_rotary_factor": 0.5},
    }
    windowed = read("gemma4_text-base", rope_parameters=rope).for_layer(0)
    assert windowed.rope_scaling.kind == "yarn" and windowed.rotary_dim == 4


def test_sharers_look_at_the_last_layer_of_their_type() -> None:
    config = read("gemma4_text-base")
    assert [config.owner(index) for index in range(6)] == [None] * 4 + [2, 3]
    assert config.memory(4) == (Shared(2),) and config.memory(5) == (Shared(3),)
    assert [config.for_layer(index).intermediate_size for index in (3, 4)] == [32, 64]


def test_no_inputs_for_layers_are_written_as_zero_or_null() -> None:
    sizes = [read("gemma4_text-large", hidden_size_per_layer_input=size) for size in (0, None)]
    assert [config.hidden_size_per_layer_input for config in sizes] == [0, 0]


def test_the_last_layer_sees_everything() -> None:
    """As transformers has it, with a warning, whatever `layer_types` says."""
    kinds = ["full_attention", "sliding_attention"] * 3
    assert read("gemma4_text-base", layer_types=kinds, num_kv_shared_layers=0).memory(5) == (Rows(2, 16, 16),)


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("gemma4_text-base", {"num_kv_shared_layers": 5}, "num_kv_shared_layers = 5, but none of the layers before"),
        ("gemma4_text-base", {"num_kv_shared_layers": 9}, "num_kv_shared_layers = 9"),
        ("gemma4_text-base", {"use_bidirectional_attention": "all"}, "use_bidirectional_attention = 'all'"),
        ("gemma4_text-base", {"vocab_size_per_layer_input": 40}, "vocab_size_per_layer_input = 40"),
        ("gemma4_text-base", {"enable_moe_block": True}, "enable_moe_block needs num_experts"),
        ("gemma4_text-moe", {"top_k_experts": 5}, "cannot choose 5 of 4 experts"),
        ("gemma4_text-large", {"num_global_key_value_heads": 3}, "multiple of num_key_value_heads (3)"),
        ("gemma4_text-base", {"per_layer_config": {"1": {"hidden_size": 8}}}, "per_layer_config sets"),
        ("gemma4_text-base", {"per_layer_config": {"6": {"head_dim": 8}}}, "of layer 6; this model has 6 layers"),
        ("gemma4_text-base", {"per_layer_config": {"1": {"head_dim": 0}}}, "no size"),
        ("gemma4_text-base", {"per_layer_config": {"one": {"head_dim": 8}}}, "is no layer"),
        ("gemma4_text-base", {"per_layer_config": {"1": {"head_dim": 7}}}, "head_dim = 7"),
        ("gemma4_text-base", {"per_layer_config": [1]}, "per_layer_config must be an object"),
        (
            "gemma4_text-base",
            {"rope_parameters": {"full_attention": {}, "sliding_attention": {"rope_type": "dynamic", "factor": 2.0}}},
            "'dynamic' is not supported for one type of layer alone",
        ),
        (
            "gemma4_text-base",
            {"rope_parameters": {"full_attention": {}, "sliding_attention": {"rope_theta": 0.5}}},
            "rope_theta in rope_parameters of sliding_attention must be above 1",
        ),
        ("gemma4_text-base", {"rope_parameters": {"rope_theta": 5.0}}, "an object for each type of layer"),
        ("gemma3n_text-base", {"intermediate_size": [32] * 4}, "intermediate_size has 4 entries"),
        ("gemma3n_text-base", {"activation_sparsity_pattern": [1.0] * 5}, "activation_sparsity_pattern"),
        ("gemma3n_text-base", {"altup_active_idx": 3}, "altup_active_idx = 3"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_named(name: str, changes: dict[str, Any], words: str) -> None:
    assert words in refused(name, **changes)


# --- files ------------------------------------------------------------------------------------------------------------


@by_sharing
def test_keys_of_layers_that_share_are_left_unread_by_name(name: str) -> None:
    """Published files hold them all the same; one of another layer, or misspelt, is still reported."""
    raw, tensors = raw_config(name), dict(mx.load(str(FAMILIES / name / "model.safetensors")))
    last = raw["num_hidden_layers"] - 1
    unused = {f"model.layers.{last}.self_attn.{part}.weight": mx.ones((4, 4)) for part in ("k_proj", "v_norm")}
    plain = assemble(raw, Arrays(tensors), dtype="float32").logits([1, 9, 10])
    assert mx.array_equal(assemble(raw, Arrays(tensors | unused), dtype="float32").logits([1, 9, 10]), plain)
    for wrong in (f"model.layers.{last}.self_attn.k_prj.weight", "model.layers.0.self_attn.v_norm.weight"):
        with pytest.raises(WeightsError, match=r"k_prj|layers\.0\.self_attn\.v_norm"):
            assemble(raw, Arrays(tensors | {wrong: mx.ones((4,))}))


def test_experts_as_mlx_lm_stores_them() -> None:
    raw = raw_config("gemma4_text-moe")
    tensors = dict(mx.load(str(FAMILIES / "gemma4_text-moe" / "model.safetensors")))
    plain = assemble(raw, Arrays(tensors), dtype="float32").logits([1, 9, 10])
    for name in [name for name in tensors if ".experts." in name]:
        stem, _, part = name.rpartition(".")
        array = tensors.pop(name)
        gate, up = mx.split(array, 2, axis=1)
        apart = {"gate_proj": gate, "up_proj": up} if part == "gate_up_proj" else {part: array}
        tensors |= {f"{stem}.switch_glu.{piece}.weight": value for piece, value in apart.items()}
    assert mx.array_equal(assemble(raw, Arrays(tensors), dtype="float32").logits([1, 9, 10]), plain)


# --- windows and shared keys, in passes of any length -----------------------------------------------------------------


@by_sharing
def test_a_prompt_in_chunks_is_the_prompt(name: str) -> None:
    """A layer that shares sees all of the pass through its owner's window, wherever the prompt is cut."""
    engine = open_loaded(FAMILIES / name, dtype="float32")
    prompt = [1 + (7 * index) % 39 for index in range(100)]
    whole = prefill(engine.model, prompt, new_caches(engine.config))
    for chunk in (1, 7, 64):
        assert error(prefill(engine.model, prompt, new_caches(engine.config), chunk=chunk), whole) < 2e-4


def chatty(name: str, out: Path) -> Path:
    """A directory with a tokenizer: the fixture's shape with a larger vocabulary and random weights."""
    shutil.copytree(TOKENIZER, out)
    raw = raw_config(name, vocab_size=json.loads((TOKENIZER / "config.json").read_text())["vocab_size"])
    raw["vocab_size_per_layer_input"] = raw["vocab_size"]
    source = random_weights(raw, dtype="float32", seed=5)
    # Loud enough that greedy tokens differ from place to place.
    tensors = {tensor: source.read(tensor) for tensor in source.headers}
    loud = {tensor: array * 8 if array.ndim > 1 else array for tensor, array in tensors.items()}
    mx.save_safetensors(str(out / "model.safetensors"), loud)
    (out / "config.json").write_text(json.dumps(raw))
    return out


@by_sharing
def test_a_chat_of_many_turns_is_a_fresh_start(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six turns, two of them edits in the middle; windows move on at every turn."""
    monkeypatch.setattr("runner.cache.kv.STEP", 4)
    lm = runner.load(chatty(name, tmp_path / "model"), dtype="float32")
    kept, bias = lm.prompt_cache(), dict.fromkeys(lm.eos_token_ids, -1e9)
    prompt, prompts, said = [1, 30, 31, 32, 33, 34, 35, 36], [], set()
    for turn in range(6):
        if turn in (2, 4):
            prompt = [*prompts[turn - 1], 60, 61 + turn]
        prompts.append(prompt)
        found, fresh = (
            list(lm.stream(prompt, max_tokens=9, temperature=0, logit_bias=bias, prompt_cache=cache))
            for cache in (kept, None)
        )
        assert [chunk.token for chunk in found] == [chunk.token for chunk in fresh], turn
        timings = found[-1].timings
        assert timings is not None
        if turn:
            assert len(prompt) - timings.cached_tokens <= 9 + 3 + 1, turn  # the last answer and what is new at most
        said |= {chunk.token for chunk in found}
        prompt = [*prompt, *(chunk.token for chunk in found), 50 + turn, 51, 52]
    assert len(said) > 4 and max(map(len, prompts)) > 40


@pytest.mark.parametrize(("name", "alone"), [("gemma4_text-base", True), ("gemma4_text-large", False)])
def test_a_long_prompts_last_token_passes_sharing_layers_alone(name: str, alone: bool, tmp_path: Path) -> None:
    """The others leave nothing there for later tokens: what a pass does not need is never computed."""
    lm = runner.load(chatty(name, tmp_path / "model"), dtype="float32")
    prompt, done = [1 + index % 90 for index in range(60)], []
    chunks = list(lm.stream(prompt, max_tokens=3, temperature=0, on_prefill=lambda made, _: done.append(made)))
    assert done == ([59, 60] if alone else [60])
    assert chunks[0].token == int(mx.argmax(lm.logits(prompt)[-1]))
    done.clear()
    list(lm.stream(prompt[:20], max_tokens=2, temperature=0, on_prefill=lambda made, _: done.append(made)))
    assert done == [20]
