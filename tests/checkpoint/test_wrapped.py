"""Wrappers give the logits of the text model inside them, whatever way they spell its config and its tensors.

Made from the text fixtures: what transformers 5.23 computes for a wrapper without images is its text model's result
(`scripts/compare/compare_wrappers` holds that against transformers itself, with the names that its conversions write).
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from cuts import any_cut, equal
from places import TESTS
from references import error, expected, tolerance

import runner
from runner.checkpoint.model_files import open_files
from runner.checkpoint.wrapped import PREFIXES, WRAPPERS, is_wrapper, unwrap
from runner.engine.loaded import open_loaded
from runner.errors import CheckpointError, ConfigError, WeightsError
from runner.families import FAMILIES
from runner.inspect_model import inspect
from runner.weights.cuts import PartSource, cut_out

FAMILY, LLAMA = TESTS / "fixtures" / "families", TESTS / "fixtures" / "llama"
OTHERS = {
    "vision_tower.blocks.0.attn.weight": mx.ones((4, 4)),
    "visual.patch_embed.proj.weight": mx.ones((2, 2)),
    "multi_modal_projector.linear.weight": mx.ones((3, 2)),
    "model.embed_vision.norm.weight": mx.ones((3,)),
    "mtp.layers.0.norm.weight": mx.ones((3,)),
}
HUB, V5, FLAT = "language_model.model.", "model.language_model.", "model."
CASES = [
    ("gemma3", FAMILY / "gemma3_text-base", HUB),
    ("gemma3", FAMILY / "gemma3_text-base", V5),
    ("gemma3n", FAMILY / "gemma3n_text-base", V5),
    ("gemma4", FAMILY / "gemma4_text-moe", V5),
    ("gemma4", FAMILY / "gemma4_text-base", HUB),
    ("gemma4_unified", FAMILY / "gemma4_text-large", V5),
    ("muse_glimmer", FAMILY / "muse_glimmer_text-base", V5),
    ("mistral3", LLAMA / "mistral-no-window", HUB),
    ("mistral3", LLAMA / "mistral-no-window", V5),
    ("glm4v", FAMILY / "glm4-base", V5),
    ("glm4v_moe", FAMILY / "glm4_moe-base", V5),
    ("llama4", FAMILY / "llama4_text-base", HUB),
    ("llava", LLAMA / "llama-gqa", HUB),
    ("smolvlm", LLAMA / "llama-gqa", "model.text_model."),
    ("idefics3", LLAMA / "llama-tied", "model.text_model."),
    ("internvl", FAMILY / "qwen2-base", HUB),
    ("aya_vision", FAMILY / "cohere2-base", HUB),
    ("exaone4_5", FAMILY / "exaone4-base", V5),
    ("kimi_k25", FAMILY / "deepseek_v3-base", HUB),
    ("qwen2_vl", FAMILY / "qwen2-base", V5),
    ("qwen2_5_vl", FAMILY / "qwen2-base", FLAT),
    ("qwen3_5", FAMILY / "qwen3_5_text-base", V5),
    ("qwen3_5_moe", FAMILY / "qwen3_5_moe_text-base", V5),
    ("qwen3_vl", FAMILY / "qwen3-base", V5),
    ("qwen3_vl_moe", FAMILY / "qwen3_moe-base", V5),
]
TEXT_TYPES = {name: wrapped for name, (wrapped, _) in WRAPPERS.items()}


def wrapped(kind: str, fixture: Path, prefix: str, out: Path, *, flat: bool = False) -> Path:
    """A wrapper's directory around a text fixture."""
    out.mkdir()
    text = json.loads((fixture / "config.json").read_text())
    tensors = dict(mx.load(str(fixture / "model.safetensors")))
    if kind == "qwen3_vl_moe":
        tensors = turned(tensors)
    head = {HUB: "language_model.lm_head.", V5: "lm_head."}.get(prefix, "lm_head.")
    names = {name: named(name, prefix, head) for name in tensors}
    mx.save_safetensors(str(out / "model.safetensors"), {names[n]: a for n, a in tensors.items()} | OTHERS)
    (out / "config.json").write_text(json.dumps(config_of(kind, text, flat)))
    return out


def named(name: str, prefix: str, head: str) -> str:
    if name.startswith("lm_head."):
        return head + name.removeprefix("lm_head.")
    return prefix + name.removeprefix("model.")


def config_of(kind: str, text: Mapping[str, Any], flat: bool) -> dict[str, Any]:
    own: dict[str, Any] = {"model_type": kind, "vision_config": {"hidden_size": 8}, "image_token_id": 5}
    inner = {k: v for k, v in text.items() if k not in ("architectures", "transformers_version")}
    if flat:
        return {**inner, **own, "rope_scaling": {"type": "mrope", "mrope_section": [2, 1, 1]}}
    inner["model_type"] = TEXT_TYPES[kind]
    if kind.startswith("qwen3_vl"):
        inner["rope_scaling"] = {"rope_type": "default", "mrope_section": [2, 1, 1], "mrope_interleaved": True}
    tie = {"tie_word_embeddings": inner.pop("tie_word_embeddings")} if "tie_word_embeddings" in inner else {}
    return {**own, "text_config": inner, **tie}


def turned(tensors: dict[str, mx.array]) -> dict[str, mx.array]:
    """Experts as Qwen3-VL-MoE stores them: stacked, `[E, in, out]`, gate and up side by side."""
    found = {name: array for name, array in tensors.items() if ".experts." not in name}
    stems = {name.partition(".experts.")[0] for name in tensors if ".experts." in name}
    for stem in stems:
        count = 1 + max(
            int(name.split(".experts.")[1].split(".")[0]) for name in tensors if name.startswith(stem + ".experts.")
        )

        def stack(part: str, stem: str = stem, count: int = count) -> mx.array:
            return mx.stack([tensors[f"{stem}.experts.{e}.{part}.weight"].T for e in range(count)])

        found[f"{stem}.experts.gate_up_proj"] = mx.concatenate([stack("gate_proj"), stack("up_proj")], axis=-1)
        found[f"{stem}.experts.down_proj"] = stack("down_proj")
    return found


@pytest.mark.parametrize(("kind", "fixture", "prefix"), CASES, ids=lambda value: getattr(value, "name", value))
def test_a_wrapper_is_its_text_model(kind: str, fixture: Path, prefix: str, tmp_path: Path) -> None:
    path = wrapped(kind, fixture, prefix, tmp_path / "model", flat=prefix == FLAT)
    engine = open_loaded(path, dtype="float32")
    wanted = mx.load(str(fixture / "expected.safetensors"))
    for name, prompt in expected(fixture)["prompts"].items():
        assert error(engine.logits(prompt), wanted[f"logits.{name}"]) < tolerance(fixture)


@pytest.mark.parametrize("swapped", [False, True])
def test_parts_of_fused_experts_are_those_of_the_whole(swapped: bool, tmp_path: Path) -> None:
    path = wrapped("qwen3_vl_moe", FAMILY / "qwen3_moe-base", V5, tmp_path / "model")
    if swapped:  # as transformers 5 saves them
        file = path / "model.safetensors"
        tensors = {n: a.swapaxes(1, 2) if ".experts." in n else a for n, a in dict(mx.load(str(file))).items()}
        mx.save_safetensors(str(file), tensors)
    source, draw = open_files(path).source, random.Random(0)
    assert isinstance(source, PartSource)
    for name, header in source.headers.items():
        for _ in range(3):
            cut = any_cut(header.shape, draw)
            assert equal(source.read_part(name, cut), cut_out(source.read(name), cut)), (name, cut)


def test_every_wrapper_is_tried_and_its_text_model_has_a_family() -> None:
    tried = {kind for kind, _, _ in CASES}
    assert tried >= set(WRAPPERS) - {
        "llava_next",
        "llava_onevision",
        "cohere2_vision",
        "voxtral",
        "glm46v",
    }  # as their siblings
    assert not set(WRAPPERS) & set(FAMILIES)
    assert {prefix for _, _, prefix in CASES} - {FLAT} == {p for p in PREFIXES if "lm_head" not in p}


def test_a_misspelt_tensor_is_reported_and_an_encoders_is_not(tmp_path: Path) -> None:
    path = wrapped("gemma3", FAMILY / "gemma3_text-base", HUB, tmp_path / "model")
    tensors = dict(mx.load(str(path / "model.safetensors")))
    mx.save_safetensors(str(path / "model.safetensors"), {**tensors, "vison_tower.weight": mx.ones((2,))})
    with pytest.raises(WeightsError, match="vison_tower"):
        open_loaded(path)
    tensors[HUB + "layers.0.self_attn.q_prj.weight"] = tensors.pop(HUB + "layers.0.self_attn.q_proj.weight")
    mx.save_safetensors(str(path / "model.safetensors"), tensors)
    with pytest.raises(WeightsError, match="q_prj"):
        open_loaded(path)


def test_what_is_left_unread_is_said(tmp_path: Path) -> None:
    path = wrapped("mistral3", LLAMA / "mistral-no-window", HUB, tmp_path / "model")
    shutil.copy(LLAMA / "llama-gqa" / "tokenizer.json", path)
    assert set(open_files(path).unread) == set(OTHERS) == set(inspect(path).ignored)


def test_a_head_that_is_stored_wins_where_nobody_speaks_of_tying(tmp_path: Path) -> None:
    """Mistral Small 3.1 says nothing of tying and stores a head; Gemma 3 says nothing and stores none."""
    path = wrapped("mistral3", LLAMA / "mistral-no-window", HUB, tmp_path / "model")
    config = json.loads((path / "config.json").read_text())
    config.pop("tie_word_embeddings", None)
    (path / "config.json").write_text(json.dumps(config))
    engine = open_loaded(path, dtype="float32")
    head = mx.load(str(path / "model.safetensors"))["language_model.lm_head.weight"]
    assert mx.array_equal(engine.model.lm_head.weight, head.astype(mx.float32))


@pytest.mark.parametrize("bad", [3, [], "llama"])
def test_odd_text_configs_are_refused_by_name(bad: object, tmp_path: Path) -> None:
    path = wrapped("llava", LLAMA / "llama-gqa", HUB, tmp_path / "model")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "text_config": bad}))
    with pytest.raises(ConfigError, match="text_config"):
        open_files(path)
    inner = {**config["text_config"], "model_type": bad}
    if not isinstance(bad, str):
        (path / "config.json").write_text(json.dumps({**config, "text_config": inner}))
        with pytest.raises(ConfigError, match=r"text_config.model_type"):
            open_files(path)


@pytest.mark.parametrize("model_type", [["gemma3"], {}, 3, None])
def test_a_model_type_that_is_no_text_is_no_wrappers(model_type: object) -> None:
    assert not is_wrapper({"model_type": model_type, "text_config": {}})


def test_two_names_for_one_tensor_are_refused(tmp_path: Path) -> None:
    path = wrapped("gemma3", FAMILY / "gemma3_text-base", HUB, tmp_path / "model")
    tensors = dict(mx.load(str(path / "model.safetensors")))
    mx.save_safetensors(str(path / "model.safetensors"), {**tensors, "model.norm.weight": mx.ones((2,))})
    with pytest.raises(CheckpointError, match=r"are both model\.norm\.weight"):
        open_files(path)


def test_quantization_blocks_name_layers_as_the_text_model_does() -> None:
    class Nothing:
        headers: Mapping[str, Any] = {}

        def read(self, name: str) -> mx.array:
            raise KeyError(name)

    up, head = "language_model.model.layers.0.mlp.up_proj", "language_model.lm_head"
    raw = {
        "model_type": "llava",
        "text_config": {"model_type": "llama"},
        "quantization": {"group_size": 64, "bits": 4, up: {"bits": 8, "group_size": 64}},
        "quantization_config": {"quant_method": "fp8", "modules_to_not_convert": [head, "vision_tower"]},
    }
    config, _, _ = unwrap(raw, Nothing())
    assert "model.layers.0.mlp.up_proj" in config["quantization"]
    assert config["quantization_config"]["modules_to_not_convert"][0] == "lm_head"


def test_a_wrapper_can_be_asked_and_converted(tmp_path: Path) -> None:
    path = wrapped("llava", LLAMA / "llama-gqa", HUB, tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(LLAMA / "llama-gqa" / name, path)
    lm, plain = runner.load(path, dtype="float32"), runner.load(LLAMA / "llama-gqa", dtype="float32")
    assert is_wrapper(json.loads((path / "config.json").read_text()))
    assert (
        lm.generate("abc", temperature=0, max_tokens=8).tokens
        == plain.generate("abc", temperature=0, max_tokens=8).tokens
    )
    from runner.convert.convert import convert

    convert(open_files(path), tmp_path / "text")
    assert json.loads((tmp_path / "text" / "config.json").read_text())["model_type"] == "llama"
    again = runner.load(tmp_path / "text", dtype="float32")
    assert (
        again.generate("abc", temperature=0, max_tokens=8).tokens
        == plain.generate("abc", temperature=0, max_tokens=8).tokens
    )
