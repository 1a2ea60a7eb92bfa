"""GGUF files against the `gguf` package and the reference logits: blocks, containers, architectures, memory."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import gguf_writer as writer
import mlx.core as mx
import numpy as np
import pytest
from cuts import any_cut, equal, read_so_far, some
from gguf import GGMLQuantizationType as Type
from gguf_bytes import file_bytes, vocabulary
from gguf_cases import (
    ADJUSTED,
    FIXTURES,
    MIXES,
    UNRENAMED,
    config_of,
    config_of_llama,
    mixed_model,
    unpacked,
    write,
    written_otherwise,
)
from gguf_families import changed
from places import TESTS
from references import QUANTISED, TOLERANCE, error, expected

from runner.checkpoint.directory import Checkpoint
from runner.checkpoint.gguf import GGUF, container, settings
from runner.checkpoint.gguf.blocks import FORMATS
from runner.checkpoint.gguf.container import open_container
from runner.checkpoint.model_files import open_files
from runner.config.base import Quantized
from runner.convert.convert import convert
from runner.engine.loaded import assemble, open_loaded
from runner.errors import CheckpointError
from runner.families import FAMILIES
from runner.weights.cuts import cut_out
from runner.weights.tags import Header


@pytest.mark.parametrize("kind", [Type.F32, Type.F16, Type.BF16], ids=lambda kind: kind.name)
def test_plain_types_come_as_they_are(tmp_path: Path, kind: Type) -> None:
    numbers = np.random.default_rng(0).normal(size=(3, 8)).astype(np.float32)
    raw = gguf.quantize(numbers, kind)
    weights = {"token_embd.weight": (raw, kind)}
    config = config_of_llama(hidden=8)
    found = GGUF.open(write(tmp_path / "m.gguf", weights, **writer.metadata_of(config), **vocabulary(3)))
    array = found.read("model.embed_tokens.weight")
    assert array.dtype == {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}[kind.name]
    assert np.array_equal(np.array(array.astype(mx.float32)), gguf.dequantize(raw, kind).reshape(3, -1))


@pytest.mark.parametrize("block", [16, 40, 700])
def test_headers_are_the_same_in_blocks_of_any_size(
    block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Strings that lie across the end of a block included; a bad one is named by its place."""
    mixed_model(tmp_path / "m.gguf", next(iter(MIXES)))
    wanted = open_container(tmp_path / "m.gguf")
    monkeypatch.setattr(container, "_BLOCK", block)
    found = open_container(tmp_path / "m.gguf")
    assert str(found.metadata) == str(wanted.metadata) and found.tensors == wanted.tensors
    data = (tmp_path / "m.gguf").read_bytes()
    text = wanted.metadata["tokenizer.ggml.tokens"][5].encode()
    place = data.index(len(text).to_bytes(8, "little") + text) + 8
    (tmp_path / "bad.gguf").write_bytes(data[:place] + b"\xff" + data[place + 1 :])
    with pytest.raises(CheckpointError, match=f"not UTF-8 at byte {place}"):
        open_container(tmp_path / "bad.gguf")


@pytest.mark.parametrize("name", MIXES)
def test_parts_are_the_same_in_any_order(name: str, tmp_path: Path) -> None:
    """A weight's scales and biases are made with it, and kept until they are asked for: once."""
    mixed_model(tmp_path / "m.gguf", name)
    found, again = GGUF.open(tmp_path / "m.gguf"), GGUF.open(tmp_path / "m.gguf")
    wanted = {each: np.array(again.read(each).view(mx.uint8)) for each in sorted(again.headers)}  # biases come first
    for each in [*found.headers, *sorted(found.headers, reverse=True)]:
        assert np.array_equal(np.array(found.read(each).view(mx.uint8)), wanted[each]), each
    assert not found.beside and not again.beside


@pytest.mark.parametrize("name", ["Q4_0", "Q4_K", "Q5_K", "IQ2_XXS", "MXFP4"])
def test_parts_of_blocks_are_those_of_the_whole(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows, and columns of whole blocks, a few rows of the file at a time; scales and biases come with their weight."""
    monkeypatch.setattr(container, "_CHUNK", 3000)
    mixed_model(tmp_path / "m.gguf", name)
    found, again, draw = GGUF.open(tmp_path / "m.gguf"), GGUF.open(tmp_path / "m.gguf"), random.Random(0)
    for each, part in found.headers.items():
        if not each.endswith(".weight") or len(part.shape) < 2:
            continue
        suffixes = [suffix or ".weight" for suffix in part.entry.format.parts(part.entry.shape)]
        blocks = part.entry.shape[-1] // max(part.entry.format.count, 1)
        for axis in (0, 1):
            kept = some(part.shape[0] if axis == 0 else blocks, 1, draw)
            for suffix in suffixes:
                stem = each.removesuffix(".weight") + suffix
                scale = 1 if axis == 0 else found.headers[stem].shape[1] // blocks
                here = tuple((start * scale, stop * scale) for start, stop in kept)
                cut = (here, None) if axis == 0 else (None, here)
                assert equal(found.read_part(stem, cut), cut_out(again.read(stem), cut)), (stem, cut)
    assert not found.beside


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="what was read, /proc tells")
def test_rows_that_are_left_out_stay_unread(tmp_path: Path) -> None:
    mixed_model(tmp_path / "m.gguf", "Q4_K")
    found = GGUF.open(tmp_path / "m.gguf")
    for name in ("model.layers.0.mlp.up_proj", "model.layers.0.self_attn.q_proj"):  # whole heads of the latter
        entry = found.headers[f"{name}.weight"].entry
        rows = ((0, entry.rows // 4), (entry.rows // 2, entry.rows))
        before = read_so_far()
        for suffix in (".weight", ".scales", ".biases"):
            found.read_part(name + suffix, (rows, None))
        wanted = entry.rows * 3 // 4 * entry.row_bytes
        assert wanted <= read_so_far() - before < wanted + 8192  # what Python reads ahead


FAMILY_FIXTURES = TESTS / "fixtures" / "families"

# --- architectures ----------------------------------------------------------------------------------------------------

by_fixture = pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.name)


@by_fixture
def test_parts_of_reordered_rows_are_those_of_the_whole(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(container, "_CHUNK", 500)
    file = writer.write_model(tmp_path / "m.gguf", config_of(path), writer.weights_of(path))
    found, draw = GGUF.open(file), random.Random(0)
    for name, part in found.headers.items():
        cut = any_cut(part.shape, draw)
        assert equal(found.read_part(name, cut), cut_out(found.read(name), cut)), (name, cut)


@by_fixture
def test_names_order_and_config_come_back(path: Path, tmp_path: Path) -> None:
    """transformers' checkpoint -> what llama.cpp's converter makes of it -> the same tensors and settings."""
    config, weights = config_of(path), writer.weights_of(path)
    found = GGUF.open(writer.write_model(tmp_path / "m.gguf", config, weights))
    weights = {name: array.squeeze(1) if "conv1d" in name else array for name, array in weights.items()}
    before = changed(config, weights)
    weights = {
        name.replace("correction.bias", "correction_bias")
        if name in before
        else name.replace(".mlp.experts.", ".mlp.switch_mlp.").replace("correction.bias", "correction_bias"): array
        for name, array in writer.stacked(before).items()
    }
    # A layer for multi-token prediction is left out.
    predicting = f"model.layers.{config['num_hidden_layers']}."
    left = {name for name in weights if "inv_freq" not in name and not name.startswith(predicting)}
    assert set(found.headers) == left
    for name in left:
        header = found.headers[name]
        assert (header.dtype, header.shape) == ("F32", weights[name].shape)
        # A norm's 1 + w in float32 rounds by half a unit of its last place, once here and once in the model.
        added = "norm" in name and config["model_type"].startswith(writer.ONE_ADDED)
        rounding = 2e-7 if added else 4e-7 if name.endswith("A_log") else 0
        assert np.max(np.abs(np.array(found.read(name)) - weights[name])) <= rounding, name
    named = {key: config[key] for key in UNRENAMED if config.get(key)}
    for key in written_otherwise(config):
        named.pop(key, None)
    if config.get("use_sliding_window") is False:
        named.pop("sliding_window", None)
    assert {key: found.config.get(key) for key in named} == named
    same = {"mistral": "mistral" if config.get("sliding_window") else "llama"}
    same |= {"kimi_k2": "deepseek_v3", "glm4_moe_lite": "deepseek_v3", "solar_open": "glm4_moe", "internlm3": "llama"}
    same["iquestcoder"] = "llama"
    assert found.config["model_type"] == same.get(config["model_type"], config["model_type"])


@by_fixture
def test_logits_are_the_references(path: Path, tmp_path: Path) -> None:
    config = config_of(path)
    if config["model_type"] not in FAMILIES:
        pytest.skip(f"no family {config['model_type']} yet")
    engine = open_loaded(writer.write_model(tmp_path / "m.gguf", config, writer.weights_of(path)), dtype="float32")
    prompts, wanted = expected(path)["prompts"], mx.load(str(path / "expected.safetensors"))
    if path.name in ADJUSTED:
        copy = tmp_path / "adjusted"
        shutil.copytree(path, copy)
        (copy / "config.json").write_text(json.dumps(config))
        same = open_loaded(copy, dtype="float32")
        wanted = {f"logits.{name}": same.logits(prompt) for name, prompt in prompts.items()}
    for name, prompt in prompts.items():
        assert error(engine.logits(prompt), wanted[f"logits.{name}"]) < TOLERANCE


@pytest.mark.parametrize(
    ("fixture", "key", "value", "message"),
    [
        ("granite-base", "granite.attention.scale", None, "attention.scale is missing"),
        ("granite-base", "granite.rope.scaling.finetuned", False, "finetuned' = False"),
        ("gpt_oss-base", "gpt-oss.attention.sliding_window", None, "sliding_window is missing"),
        ("lfm2-base", "lfm2.attention.head_count_kv", 2, "expected a number for each of 3 layers"),
        ("lfm2-base", "lfm2.attention.head_count_kv", [0, 2], "expected a number for each of 3 layers"),
        ("lfm2-base", "lfm2.attention.head_count_kv", [1, 2, 0], "expected one number of heads and 0"),
        ("lfm2-base", "lfm2.attention.head_count_kv", [0, 0, 0], "expected one number of heads and 0"),
        ("deepseek_v3-base", "deepseek2.expert_group_count", None, "expert_group_count is missing"),
        ("deepseek_v3-base", "deepseek2.expert_gating_func", 3, "expert_gating_func is 3"),
        ("deepseek_v3-base", "deepseek2.rope.dimension_count", 16, "keys of 16 numbers, 16 of them rotated"),
    ],
)
def test_a_familys_own_keys_are_checked(fixture: str, key: str, value: Any, message: str, tmp_path: Path) -> None:
    path = FAMILY_FIXTURES / fixture
    config = config_of(path)
    metadata = {**writer.metadata_of(config), **vocabulary(config["vocab_size"]), key: value}
    kept = {name: found for name, found in metadata.items() if found is not None}
    (tmp_path / "m.gguf").write_bytes(file_bytes(kept, writer.tensors_of(config, writer.weights_of(path))))
    with pytest.raises(CheckpointError, match=message):
        GGUF.open(tmp_path / "m.gguf")


def test_latents_of_an_old_file_are_read(tmp_path: Path) -> None:
    """Files from before 2025-04 have kv_b_proj as one tensor, and a head's sizes under the usual names."""
    path = FAMILY_FIXTURES / "deepseek_v3-base"
    config, weights = config_of(path), writer.weights_of(path)
    metadata = {**writer.metadata_of(config), **vocabulary(config["vocab_size"])}
    for part in ("key", "value"):
        metadata[f"deepseek2.attention.{part}_length"] = metadata.pop(f"deepseek2.attention.{part}_length_mla")
    tensors = {
        name: found
        for name, found in writer.tensors_of(config, weights).items()
        if not name.endswith(("_k_b.weight", "_v_b.weight"))
    }
    for layer in range(config["num_hidden_layers"]):
        stored = weights[f"model.layers.{layer}.self_attn.kv_b_proj.weight"]
        tensors[f"blk.{layer}.attn_kv_b.weight"] = (stored, Type.F32)
    (tmp_path / "m.gguf").write_bytes(file_bytes(metadata, tensors))
    engine, wanted = open_loaded(tmp_path / "m.gguf", dtype="float32"), mx.load(str(path / "expected.safetensors"))
    for name, prompt in expected(path)["prompts"].items():
        assert error(engine.logits(prompt), wanted[f"logits.{name}"]) < TOLERANCE


@pytest.mark.parametrize(("fixture", "kind"), [("qwen3_moe-base", Type.Q8_0), ("gpt_oss-base", Type.MXFP4)])
def test_packed_experts_are_read_from_their_stack(fixture: str, kind: Type, tmp_path: Path) -> None:
    config, weights = config_of(FAMILY_FIXTURES / fixture), writer.weights_of(FAMILY_FIXTURES / fixture)

    def chosen(name: str) -> Type:
        """All but the matrices of 16 inputs, which is half a block."""
        whole = config["model_type"] != "qwen3_moe" or "down" not in name
        return kind if "_exps" in name and name.endswith("weight") and whole else Type.F32

    packed = writer.write_model(tmp_path / "packed.gguf", config, weights, chosen)
    rounded = {
        name: (gguf.dequantize(raw, stored), Type.F32)
        for name, (raw, stored) in writer.tensors_of(config, weights, chosen).items()
    }
    metadata = {**writer.metadata_of(config), **vocabulary(config["vocab_size"])}
    plain = tmp_path / "plain.gguf"
    plain.write_bytes(file_bytes(metadata, rounded))
    found, wanted = (open_loaded(file, dtype="float32").logits([1, 9, 30, 12, 40]) for file in (packed, plain))
    assert error(found, wanted) < QUANTISED


class Dense:
    """An in-memory `Source` of plain arrays."""

    def __init__(self, arrays: Mapping[str, mx.array]) -> None:
        self.arrays = arrays
        self.headers: Mapping[str, Header] = {
            name: Checkpoint.open(TESTS / "fixtures/llama/llama-mha")
            .headers["model.norm.weight"]
            .__class__(name, "F32", tuple(array.shape), array.nbytes, Path("x"), 0)
            for name, array in arrays.items()
        }

    def read(self, name: str) -> mx.array:
        return self.arrays[name]


@pytest.mark.parametrize("name", MIXES)
def test_arrays_hold_their_own_numbers_alone(name: str, tmp_path: Path) -> None:
    """A view of a file's blocks would keep all of them, and MLX's kernels on NVIDIA GPUs take none."""
    mixed_model(tmp_path / "m.gguf", name)
    found = GGUF.open(tmp_path / "m.gguf")
    for each in found.headers:
        array = found.read(each)
        assert memoryview(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array).c_contiguous, each


@pytest.mark.parametrize("name", MIXES)
def test_packed_models_compute_what_their_blocks_say(name: str, tmp_path: Path) -> None:
    """The logits of a quantized file equal those of its dequantized numbers in float32."""
    path = tmp_path / "m.gguf"
    raw_head, kind = mixed_model(path, name)["output.weight"]
    found = GGUF.open(path)
    dense = {key: mx.array(unpacked(found, key)) for key in found.headers if key.endswith(".weight")}
    wanted = gguf.dequantize(raw_head, kind)
    wanted = wanted if FORMATS[kind].quantized else wanted.astype(np.float16)
    assert np.array_equal(np.array(dense["lm_head.weight"]), wanted)
    raw = {key: value for key, value in found.config.items() if key != "quantization"}
    ids = [1, 17, 250, 299, 3, 3, 42]
    plain_logits = assemble(raw, Dense(dense), dtype="float32").logits(ids)
    assert error(open_loaded(path, dtype="float32").logits(ids), plain_logits) < QUANTISED
    convert(open_files(path), tmp_path / "out")
    assert mx.array_equal(open_loaded(tmp_path / "out").logits(ids), open_loaded(path).logits(ids))
    written, forms = Checkpoint.open(tmp_path / "out").config, ("quantization", "quantization_config")
    assert {key: value for key, value in written.items() if key not in forms} == raw
    if "quantization" in found.config:
        assert Quantized.from_dict(written["quantization"]) == Quantized.from_dict(found.config["quantization"])


def test_published_llama3_scaling_gets_its_name(tmp_path: Path) -> None:
    scaling = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 8192}  # fmt: skip
    config = {**config_of_llama(), "head_dim": 64, "rope_theta": 500000.0, "max_position_embeddings": 131072,
              "rope_scaling": scaling}  # fmt: skip
    weights = {"model.embed_tokens.weight": np.zeros((300, 256), np.float32)}
    assert GGUF.open(writer.write_model(tmp_path / "m.gguf", config, weights)).config["rope_scaling"] == scaling
    other = GGUF.open(
        writer.write_model(tmp_path / "n.gguf", {**config, "rope_scaling": {**scaling, "factor": 5.0}}, weights)
    )
    assert other.config["rope_scaling"]["rope_type"] == "longrope"  # the numbers themselves, where none is known


@pytest.mark.parametrize(
    ("arch", "layers", "scalar"),
    [("gemma2", 46, 144), ("gemma2", 26, 256), ("gemma3_text", 62, 168), ("gemma3_text", 34, 256)],
)
def test_the_query_scale_that_files_leave_out(arch: str, layers: int, scalar: int, tmp_path: Path) -> None:
    """It is 4608 / 32 and 5376 / 32 in Gemma 2 27B and 3 27B, and the head size in all others (their config.json)."""
    config = {
        **config_of_llama(layers=layers), "model_type": arch, "hidden_size": 4608 if arch == "gemma2" else 5376,
        "num_attention_heads": 32, "head_dim": 256, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
        "sliding_window_pattern": 6, "sliding_window": 1024, "query_pre_attn_scalar": 1,
    }  # fmt: skip
    metadata = {k: v for k, v in writer.metadata_of(config).items() if "attention.scale" not in k}
    table = {"token_embd.weight": (np.zeros((300, config["hidden_size"]), np.float16), Type.F16)}
    found = GGUF.open(write(tmp_path / "m.gguf", table, **metadata, **vocabulary(300)))
    assert found.config["query_pre_attn_scalar"] == scalar


@pytest.mark.parametrize(
    ("fixture", "key", "value"),
    [
        ("glm4_moe_lite-base", "deepseek2.expert_gating_func", None),  # as files of GLM-4.7-Flash
        ("nemotron-base", "nemotron.attention.layer_norm_rms_epsilon", 1e-5),
        ("olmo3-yarn", "olmo2.rope.freq_base_swa", 500000.0),
    ],
)
def test_what_newer_converters_write_or_leave_out(fixture: str, key: str, value: Any, tmp_path: Path) -> None:
    path = FAMILY_FIXTURES / fixture
    config, weights = config_of(path), writer.weights_of(path)
    metadata = {**writer.metadata_of(config), **vocabulary(config["vocab_size"]), key: value}
    kept = {name: found for name, found in metadata.items() if found is not None}
    tensors = writer.tensors_of(config, weights)
    found = GGUF.open(write(tmp_path / "m.gguf", tensors, **kept)).config
    assert found == GGUF.open(writer.write_model(tmp_path / "n.gguf", config, weights)).config
    if "freq_base" in key:
        with pytest.raises(CheckpointError, match=r"freq_base_swa is 7\.0"):
            GGUF.open(write(tmp_path / "w.gguf", tensors, **{**kept, key: 7.0}))


def test_an_encoder_in_the_same_file_stays_unread(tmp_path: Path) -> None:
    """As Ollama writes a Gemma 3: with its encoder, and with names of its own for RoPE's bases."""
    path = FAMILY_FIXTURES / "gemma3_text-base"
    config, weights = config_of(path), writer.weights_of(path)
    metadata = {**writer.metadata_of(config), **vocabulary(config["vocab_size"]), "gemma3.vision.block_count": 27}
    metadata["gemma3.mm.tokens_per_image"] = 256
    for new, old in (("global.freq_base", "freq_base"), ("local.freq_base", "freq_base_swa")):
        metadata[f"gemma3.rope.{new}"] = metadata.pop(f"gemma3.rope.{old}")
    more = {"v.blk.0.attn_q.weight": (np.zeros((4, 4), np.float32), Type.F32)}
    more["mm.mm_input_projection.weight"] = more["v.blk.0.attn_q.weight"]
    tensors = writer.tensors_of(config, weights)
    found = GGUF.open(write(tmp_path / "m.gguf", {**tensors, **more}, **metadata))
    wanted = GGUF.open(writer.write_model(tmp_path / "n.gguf", config, weights))
    assert set(found.headers) == set(wanted.headers) and found.config == wanted.config
    with pytest.raises(CheckpointError, match=r"'vv\.blk\.0\.attn_q\.weight' is not part of"):
        GGUF.open(
            write(tmp_path / "w.gguf", {**tensors, "vv.blk.0.attn_q.weight": more["v.blk.0.attn_q.weight"]}, **metadata)
        )


# --- Qwen 3.5 ---------------------------------------------------------------------------------------------------------

DELTA = TESTS / "fixtures" / "families" / "qwen3_5_text-base"


def delta_tensors() -> tuple[dict[str, Any], dict[str, tuple[Any, Type]]]:
    """Metadata and tensors of a Qwen 3.5 in which two key heads serve two value heads each."""
    config = config_of(DELTA)
    metadata = {**writer.metadata_of(config), **vocabulary(config["vocab_size"])}
    return metadata, writer.tensors_of(config, writer.weights_of(DELTA))


def test_layers_for_multi_token_prediction_stay_unread(tmp_path: Path) -> None:
    metadata, tensors = delta_tensors()
    metadata |= {"qwen35.block_count": 4, "qwen35.nextn_predict_layers": 1}
    metadata["qwen35.attention.recurrent_layers"] = [*metadata["qwen35.attention.recurrent_layers"], False]
    more = {name.replace("blk.2.", "blk.3."): entry for name, entry in tensors.items() if name.startswith("blk.2.")}
    more["blk.3.nextn.eh_proj.weight"] = (np.zeros((32, 64), np.float32), Type.F32)
    found = GGUF.open(write(tmp_path / "m.gguf", {**tensors, **more}, **metadata))
    assert set(found.headers) == set(writer.weights_of(DELTA)) and found.config["num_hidden_layers"] == 3
    with pytest.raises(CheckpointError, match="nextn_predict_layers is 4, expected an integer from 0 to 3"):
        GGUF.open(write(tmp_path / "m.gguf", tensors, **{**metadata, "qwen35.nextn_predict_layers": 4}))
    with pytest.raises(CheckpointError, match=r"'blk\.1\.nextn\.eh_proj\.weight' is not part of"):
        wrong = {"blk.1.nextn.eh_proj.weight": more["blk.3.nextn.eh_proj.weight"]}
        GGUF.open(write(tmp_path / "m.gguf", {**tensors, **wrong}, **metadata))


def test_layers_by_their_interval_and_what_is_missing(tmp_path: Path) -> None:
    metadata, tensors = delta_tensors()
    flags = metadata.pop("qwen35.attention.recurrent_layers")
    found = GGUF.open(write(tmp_path / "m.gguf", tensors, **metadata)).config["layer_types"]
    assert [kind == "linear_attention" for kind in found] == flags == [True, True, False]
    for key, value, words in (
        ("ssm.inner_size", None, "ssm.inner_size is missing"),
        ("ssm.inner_size", 63, "63 numbers in 4 heads"),
        ("attention.recurrent_layers", [True], "expected 3 flags"),
    ):
        changed = {k: v for k, v in {**metadata, f"qwen35.{key}": value}.items() if v is not None}
        with pytest.raises(CheckpointError, match=words):
            GGUF.open(write(tmp_path / "m.gguf", tensors, **changed))


def test_a_decay_that_grows_is_refused(tmp_path: Path) -> None:
    metadata, tensors = delta_tensors()
    tensors["blk.0.ssm_a"] = (np.float32([-1, -2, 0, -1]), Type.F32)
    found = GGUF.open(write(tmp_path / "m.gguf", tensors, **metadata))
    with pytest.raises(CheckpointError, match=r"ssm_a.*not below 0"):
        found.read("model.layers.0.linear_attn.A_log")


@pytest.mark.parametrize("kind", [Type.Q8_0, Type.Q4_0], ids=lambda kind: kind.name)
def test_sorted_heads_of_packed_matrices(kind: Type, tmp_path: Path) -> None:
    """Rows and columns are put in order as codes and scales: the same numbers as those of transformers' order."""
    config = {**config_of(DELTA), "hidden_size": 64, "linear_value_head_dim": 32}
    names = ("in_proj_z", "in_proj_qkv", "out_proj")
    shapes = {"in_proj_z": (128, 64), "in_proj_qkv": (160, 64), "out_proj": (64, 128)}
    rng = np.random.default_rng(0)
    weights = {f"model.layers.0.linear_attn.{n}.weight": rng.normal(size=shapes[n]).astype(np.float32) for n in names}
    weights["model.embed_tokens.weight"] = rng.normal(size=(128, 64)).astype(np.float32)
    found = GGUF.open(writer.write_model(tmp_path / "m.gguf", config, weights, lambda name: kind))
    for name, wanted in weights.items():
        stem = name.removesuffix(".weight")
        parts = [found.read(f"{stem}.{part}") for part in ("weight", "scales", "biases")]
        form = found.config["quantization"]
        numbers = mx.dequantize(*parts, group_size=form["group_size"], bits=form["bits"])
        same = gguf.dequantize(gguf.quantize(wanted, kind), kind)
        assert np.max(np.abs(np.array(numbers.astype(mx.float32)) - same)) < 1e-2, name


@pytest.mark.parametrize(("layers", "period"), [(200_000, 6), (200_000, 5), (3, 6)])
def test_the_period_of_windows_is_found_in_one_look(layers: int, period: int, tmp_path: Path) -> None:
    """As many layers as a header says: to try every period over all of them would take hours."""
    numbers = {"block_count": layers, "embedding_length": 64, "feed_forward_length": 64, "context_length": 128}
    numbers |= {"attention.head_count": 4, "attention.head_count_kv": 2, "attention.sliding_window": 32}
    numbers |= {"attention.key_length": 16, "attention.value_length": 16, "attention.sliding_window_pattern": period}
    metadata: dict[str, Any] = {"general.architecture": "gemma3", "gemma3.attention.layer_norm_rms_epsilon": 1e-6}
    metadata |= {f"gemma3.{name}": number for name, number in numbers.items()}
    path = tmp_path / "model.gguf"
    path.write_bytes(file_bytes(metadata, {"token_embd.weight": (np.zeros((8, 64), np.float32), Type.F32)}))
    config = settings.config_of(open_container(path))
    assert config["num_hidden_layers"] == layers
    assert (config.get("sliding_window_pattern", 6) == period) or "layer_types" in config
