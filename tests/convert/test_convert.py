"""`runner.convert`: right numbers, mlx-lm's names, little memory, and a directory that is complete or absent."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from gguf_cases import mixed_model
from places import ROOT, TESTS
from references import FIXTURES, QUANTISED, error, routed
from sources import Arrays

import runner
from runner.adapters import AdapterFiles
from runner.bench.models import random_weights
from runner.checkpoint.directory import Checkpoint
from runner.checkpoint.model_files import ModelFiles, open_files
from runner.checkpoint.shard_writer import WIDTHS
from runner.checkpoint.side_files import NAMES
from runner.checkpoint.writer import new_directory
from runner.convert.checks import Packing
from runner.convert.convert import convert, merged, pieces
from runner.convert.plan import plan_conversion
from runner.convert.quantize import QUANTIZATIONS, RECIPES, Quantizer, dequantize, quantize, quantizer
from runner.engine.loaded import Loaded, assemble, open_loaded
from runner.errors import CheckpointError, UsageError
from runner.nn.linear import Quantization, QuantizedEmbedding
from runner.perplexity import perplexity, read_ids
from runner.weights.tags import Source

LLAMA = TESTS / "fixtures" / "llama" / "llama-gqa"
CASES = sorted({json.loads((path / "config.json").read_text())["model_type"]: path for path in FIXTURES}.values())
CASES += [path for path in FIXTURES if path.name == "gemma4_text-moe"]  # its family's other sizes have no experts
by_family = pytest.mark.parametrize("path", CASES, ids=lambda path: path.name)
IDS = [1, 9, 4, 40, 7, 3, 22, 5, 5, 31]

# Widths that divide into the groups of every form; some fixtures' own are smaller.
WIDE = {
    "intermediate_size": 64, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 64, "ffn_dim": 64,
    "kv_lora_rank": 32, "q_lora_rank": 32, "v_head_dim": 16, "qk_nope_head_dim": 16, "n_inner": 64,
    "word_embed_proj_dim": 32, "intermediate_size_mlp": 64, "hidden_size_per_layer_input": 32, "laurel_rank": 32,
    "altup_num_inputs": 32, "prefix_dense_intermediate_size": 64,
}  # fmt: skip


def raw_config(path: Path) -> dict[str, Any]:
    raw: dict[str, Any] = json.loads((path / "config.json").read_text())
    raw |= {key: value for key, value in WIDE.items() if raw.get(key)}
    if raw["model_type"] == "bloom":
        raw |= {"hidden_size": 32, "n_head": 4}
    if raw["model_type"] == "mpt":
        raw |= {"d_model": 32, "n_heads": 4}
    return {key: value for key, value in raw.items() if key not in ("quantization", "quantization_config")}


def exact_weights(raw: Mapping[str, Any], dtype: mx.Dtype = mx.float32) -> Arrays:
    """A checkpoint whose matrices MXFP4 represents exactly, along whichever axis its groups lie.

    Each number is one of the format's, and the largest occurs in every 16 neighbours along both axes.
    """
    layout = random_weights(raw, dtype="float32", seed=3)
    rng = np.random.default_rng(7)
    arrays: dict[str, mx.array] = {}
    for name, header in layout.headers.items():
        if len(header.shape) < 2:
            arrays[name] = layout.read(name)
            continue
        numbers = rng.choice([0.5, 1, 1.5, 2, 3, 4, 6], header.shape) * rng.choice([-1, 1], header.shape)
        rows, columns = np.indices(header.shape[-2:])
        largest = np.broadcast_to((rows + columns) % 16 == 0, header.shape)
        arrays[name] = mx.array(np.where(largest, 6 * np.sign(numbers), numbers).astype(np.float32) / 64)
    return Arrays({name: array.astype(dtype) for name, array in arrays.items()})


def files_of(raw: Mapping[str, Any], source: Source) -> ModelFiles:
    return dataclasses.replace(open_files(LLAMA), config=raw, source=source)


def written(directory: Path) -> dict[str, mx.array]:
    found = Checkpoint.open(directory)
    return {name: found.read(name) for name in found.headers}


def logits(engine: Loaded) -> mx.array:
    return engine.logits([token % engine.config.vocab_size for token in IDS])


@by_family
def test_each_family_comes_back_in_its_own_order(path: Path, tmp_path: Path) -> None:
    """Quantizing without loss changes no logit, whatever the stored order: fused, transposed, in groups, stacked."""
    raw = raw_config(path)
    source = exact_weights(raw)
    report = convert(files_of(raw, source), tmp_path / "packed", quantizer=quantizer("mxfp4"))
    packed = open_loaded(tmp_path / "packed", dtype="float32")
    plain = assemble(raw, source, dtype="float32")
    # Another order would be off by a deviation; Gemma 4's tiny model makes 1e-2 of activations of 16 bits.
    assert error(logits(packed), logits(plain)) < 2e-2
    assert not report.unpackable and report.forms["4-bit mxfp4 g32"] > 5
    assert set(report.forms) <= {"4-bit mxfp4 g32", "plain"}
    assert (report.forms.get("plain", 0) > 0) == routed(raw)  # routers stay as they are
    unpacked = convert(open_files(tmp_path / "packed"), tmp_path / "plain", dtype="float32")
    assert unpacked.bits_after == 32 and set(unpacked.forms) == {"plain"}
    assert "quantization" not in open_files(tmp_path / "plain").config
    assert error(logits(open_loaded(tmp_path / "plain", dtype="float32")), logits(plain)) < 1e-5


@pytest.mark.parametrize("form", QUANTIZATIONS)
def test_numbers_are_those_of_mx_quantize(form: str, tmp_path: Path) -> None:
    """Against a naive twin that reads and quantizes whole matrices; all other tensors are unchanged, byte for byte."""
    source = Checkpoint.open(LLAMA)
    wanted = quantizer(form, 32 if form.isdigit() else None)
    convert(open_files(LLAMA), tmp_path / "out", quantizer=wanted)
    found = written(tmp_path / "out")
    count = 0
    for name in source.headers:
        before = source.read(name)
        if before.ndim == 1:
            assert found.pop(name).dtype == before.dtype and mx.array_equal(before, source.read(name))
            continue
        count += 1
        form = wanted.form
        device = None if form.mode == "affine" else mx.cpu  # `quantize` itself asks MLX for affine numbers
        twin = mx.quantize(before, group_size=form.group_size, bits=form.bits, mode=form.mode, stream=device)
        for field, array in zip(("weight", "scales", "biases"), twin, strict=False):
            stored = found.pop(f"{name.removesuffix('weight')}{field}")
            assert stored.dtype == array.dtype and mx.array_equal(stored, array), (name, field)
    assert not found and count == 16


def test_pieces_of_any_size_are_the_same_tensors(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    raw = raw_config(TESTS / "fixtures" / "families" / "gpt_oss-base")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    convert(files_of(raw, exact_weights(raw)), whole, quantizer=quantizer("4", 32))
    monkeypatch.setattr("runner.convert.convert.PIECE_BYTES", 200)
    convert(files_of(raw, exact_weights(raw)), cut, quantizer=quantizer("4", 32), max_shard_bytes=4000)
    assert len(list(cut.glob("model-*-of-*.safetensors"))) > 4
    a, b = written(whole), written(cut)
    assert a.keys() == b.keys() and all(mx.array_equal(a[name], b[name]) for name in a)
    index = json.loads((cut / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in a.values())


def test_a_family_whose_tags_do_not_read_mlx_lms_names_keeps_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    raw = raw_config(TESTS / "fixtures" / "families" / "mixtral-base")
    monkeypatch.setattr("runner.convert.mlx_names._STACKED", {"w1": "front_proj"})
    source = exact_weights(raw)
    convert(files_of(raw, source), tmp_path / "out", quantizer=quantizer("mxfp4"))
    assert "model.layers.0.block_sparse_moe.experts.3.w1.scales" in Checkpoint.open(tmp_path / "out").headers
    found = open_loaded(tmp_path / "out", dtype="float32")
    assert error(logits(found), logits(assemble(raw, source, dtype="float32"))) < QUANTISED


# What mlx-lm 0.32.2 writes for these families (mlx_lm.convert of the same fixtures; scripts/compare/compare_mlx_lm).
MLX_NAMES = {
    "mixtral-base": "layers.0.block_sparse_moe.switch_mlp.gate_proj.scales layers.0.block_sparse_moe.gate.weight",
    "qwen2_moe-base": "layers.1.mlp.switch_mlp.down_proj.weight layers.0.mlp.shared_expert.up_proj.biases",
    "qwen3_moe-base": "layers.0.mlp.switch_mlp.up_proj.biases layers.0.mlp.gate.weight",
    "deepseek_v2-lite": "layers.1.mlp.switch_mlp.up_proj.weight layers.1.mlp.shared_experts.up_proj.scales",
    "granitemoe-base": "layers.0.block_sparse_moe.switch_mlp.up_proj.scales",
    "granitemoehybrid-base": "layers.1.block_sparse_moe.switch_mlp.gate_proj.weight "
    "layers.0.block_sparse_moe.switch_mlp.down_proj.weight layers.0.shared_mlp.input_linear.scales",
    "granitemoehybrid-dense-v5": "layers.1.mlp.gate_proj.scales layers.0.mlp.down_proj.scales",
    "lfm2_moe-base": "layers.0.feed_forward.gate_proj.scales layers.0.feed_forward.down_proj.scales "
    "layers.1.feed_forward.switch_mlp.up_proj.scales",
    "gpt_oss-base": "layers.0.mlp.experts.gate_proj.weight layers.0.mlp.experts.up_proj.bias",
    "gpt_oss-mxfp4": "layers.0.mlp.experts.gate_proj.scales layers.0.mlp.experts.down_proj.weight",
    "gpt2-base": "h.0.attn.c_attn.scales wte.weight ln_f.bias",
    "gpt_neox-base": "h.0.attention.query_key_value.scales embed_in.weight embed_out.scales final_layer_norm.bias",
}
"""Names that mlx-lm writes, without their `model.`."""


@pytest.mark.parametrize("name", ["nemotron_h-base", "nemotron_h-latent-v5"])
def test_nemotrons_packed_experts_have_mlx_lms_names(name: str, tmp_path: Path) -> None:
    convert(open_files(TESTS / "fixtures" / "families" / name), tmp_path / "out", quantizer=quantizer("8", 32))
    layer = 1 if name.endswith("base") else 3
    stem = f"backbone.layers.{layer}.mixer"
    names = {f"{stem}.switch_mlp.fc1.scales", f"{stem}.switch_mlp.fc2.weight", f"{stem}.shared_experts.up_proj.scales"}
    assert names <= set(Checkpoint.open(tmp_path / "out").headers)


@pytest.mark.parametrize("name", MLX_NAMES)
def test_packed_checkpoints_have_the_names_that_mlx_lm_loads(name: str, tmp_path: Path) -> None:
    path = TESTS / "fixtures" / "families" / name
    convert(open_files(path), tmp_path / "out", quantizer=quantizer("8", 32))
    assert {f"model.{tensor}" for tensor in MLX_NAMES[name].split()} <= set(Checkpoint.open(tmp_path / "out").headers)
    config = Checkpoint.open(tmp_path / "out").config
    assert config["quantization"] == config["quantization_config"]
    assert {key: config["quantization"][key] for key in ("bits", "group_size", "mode")} == {
        "bits": 8, "group_size": 32, "mode": "affine",
    }  # fmt: skip
    if name == "gpt_oss-mxfp4":  # published quantized: the config says that its experts stay so
        form = {"bits": 4, "group_size": 32, "mode": "mxfp4"}
        assert config["quantization"]["model.layers.0.mlp.experts.down_proj"] == form


@pytest.mark.parametrize(("form", "packed"), [("4", True), ("mxfp4", False)])
def test_what_mlx_lm_unpacks_itself_has_biases_or_is_plain(form: str, packed: bool, tmp_path: Path) -> None:
    raw = raw_config(TESTS / "fixtures" / "families" / "deepseek_v3-yarn")
    wanted = quantizer(form, 32)
    convert(files_of(raw, exact_weights(raw)), tmp_path / "out", quantizer=wanted)
    names = Checkpoint.open(tmp_path / "out").headers
    assert "model.layers.0.self_attn.o_proj.scales" in names
    assert ("model.layers.0.self_attn.kv_b_proj.biases" in names) == packed
    assert packed or "model.layers.0.self_attn.kv_b_proj.scales" not in names


def test_both_spellings_of_rope_are_written_with_packed_weights(tmp_path: Path) -> None:
    """mlx-lm reads `rope_theta` for most families, while transformers 5 writes `rope_parameters`."""
    convert(open_files(LLAMA), tmp_path / "out", quantizer=quantizer("4", 32))
    before, after = open_files(LLAMA).config, open_files(tmp_path / "out").config
    assert "rope_parameters" in before and "rope_theta" not in before
    assert after["rope_theta"] == before["rope_parameters"]["rope_theta"]
    assert error(logits(open_loaded(tmp_path / "out")), logits(open_loaded(LLAMA))) < 2


def test_copies_and_dtypes(tmp_path: Path) -> None:
    report = convert(open_files(LLAMA), tmp_path / "copy")
    source, copy = written(LLAMA), written(tmp_path / "copy")
    assert copy.keys() == source.keys() and all(mx.array_equal(copy[name], source[name]) for name in source)
    assert (
        report.bits_after == report.bits_before == 16
        and open_files(tmp_path / "copy").config == open_files(LLAMA).config
    )
    convert(open_files(LLAMA), tmp_path / "half", dtype="float16")
    assert {array.dtype for array in written(tmp_path / "half").values()} == {mx.float16}
    assert open_files(tmp_path / "half").config["dtype"] == "float16"
    convert(open_files(LLAMA), tmp_path / "both", quantizer=quantizer("4", 32), dtype="float32")
    assert {array.dtype for array in written(tmp_path / "both").values()} == {mx.float32, mx.uint32}


def test_corrections_of_routers_keep_their_dtype(tmp_path: Path) -> None:
    """Rounding them would send tokens to other experts (transformers and mlx-lm keep them in float32)."""
    raw = raw_config(TESTS / "fixtures" / "families" / "deepseek_v3-yarn")
    convert(files_of(raw, exact_weights(raw)), tmp_path / "out", dtype="bfloat16")
    dtypes = {name: array.dtype for name, array in written(tmp_path / "out").items()}
    kept = {name for name, dtype in dtypes.items() if dtype == mx.float32}
    assert kept and all(name.endswith("e_score_correction_bias") for name in kept)


def test_what_is_packed_stays_so_and_is_not_packed_again(tmp_path: Path) -> None:
    path = TESTS / "fixtures" / "llama" / "llama-mlx-mixed"
    convert(open_files(path), tmp_path / "copy")
    source, copy = written(path), written(tmp_path / "copy")
    assert copy.keys() == source.keys() and all(mx.array_equal(copy[name], source[name]) for name in source)
    assert mx.array_equal(logits(open_loaded(tmp_path / "copy")), logits(open_loaded(path)))
    with pytest.raises(UsageError, match=r"quantized already.*--dtype"):
        convert(
            open_files(TESTS / "fixtures" / "llama" / "llama-mlx-4bit"),
            tmp_path / "again",
            quantizer=quantizer("4", 32),
        )
    assert not (tmp_path / "again").exists()
    rest = convert(open_files(path), tmp_path / "rest", quantizer=quantizer("8", 32))  # what is plain can be quantized
    assert rest.forms.keys() - {"8-bit g32"} and "plain" not in rest.forms
    report = convert(open_files(path), tmp_path / "again", quantizer=quantizer("8", 32), dtype="float32")
    assert set(report.forms) == {"8-bit g32"}
    plain = convert(open_files(path), tmp_path / "plain", dtype="float32")
    assert set(plain.forms) == {"plain"}
    assert (
        error(logits(open_loaded(tmp_path / "plain", dtype="float32")), logits(open_loaded(path, dtype="float32")))
        < QUANTISED
    )
    assert (
        error(logits(open_loaded(tmp_path / "again", dtype="float32")), logits(open_loaded(path, dtype="float32")))
        < 0.5
    )


@pytest.mark.parametrize("form", [*QUANTIZATIONS.values(), Quantization(4, 128, "affine")], ids=str)
def test_unpacking_is_packings_inverse(form: Quantization) -> None:
    matrix = mx.random.normal((48, 256), key=mx.random.key(1))
    packed = quantize(matrix, form)
    back = np.array(dequantize(packed, form, mx.float32))
    if form.mode == "affine":  # by hand: codes of `bits` bits, lowest first, in little-endian words
        words = np.array(packed["weight"]).view(np.uint8)
        stream = np.unpackbits(words, axis=1, bitorder="little").reshape(48, 256, form.bits)
        codes = stream @ (1 << np.arange(form.bits))
        scales, biases = (np.repeat(np.array(packed[name]), form.group_size, axis=1) for name in ("scales", "biases"))
        assert np.allclose(back, codes * scales + biases, rtol=1e-6, atol=1e-6)
    else:
        how: dict[str, Any] = {"group_size": form.group_size, "bits": form.bits, "mode": form.mode}
        exact = mx.dequantize(packed["weight"], packed["scales"], **how)  # in bfloat16, which holds all of them
        assert np.array_equal(back, np.array(exact.astype(mx.float32)))
    assert np.max(np.abs(back - np.array(matrix))) < {2: 1.5, 3: 0.8, 4: 1.0, 5: 0.3, 6: 0.2, 8: 0.3}[form.bits]


@pytest.mark.parametrize("mode", ["mxfp4", "mxfp8", "nvfp4"])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
def test_float_forms_are_bit_for_bit_those_of_mlx(mode: str, dtype: mx.Dtype) -> None:
    rng = np.random.default_rng(4)
    halfway = rng.choice([0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2, 2.5, 3, 3.5, 4, 5, 6], (64, 256))
    rows = [
        rng.normal(0, 1, (64, 256)),
        rng.normal(0, 1, (64, 256)) * 2.0 ** rng.integers(-20, 20, (64, 256)),  # far apart in one group
        halfway * rng.choice([-1, 1], halfway.shape) / 8,  # ties, and largest numbers that fit without a rest
        2.0 ** rng.integers(-12, 6, (64, 256)) * (7 if mode == "mxfp8" else 6),
        np.zeros((1, 256)),
    ]
    matrix = mx.array(np.concatenate(rows).astype(np.float32)).astype(dtype)
    form = QUANTIZATIONS[mode]
    twin = mx.quantize(matrix, group_size=form.group_size, bits=form.bits, mode=mode, stream=mx.cpu)
    found = quantize(matrix, form)
    for name, array in zip(("weight", "scales"), twin, strict=True):
        assert found[name].dtype == array.dtype and mx.array_equal(found[name], array)
    stacked = quantize(matrix.reshape(1, *matrix.shape), form)
    assert mx.array_equal(stacked["weight"][0], twin[0])


@pytest.mark.parametrize("rows", range(1, 6))
def test_nvfp4_of_any_number_of_groups(rows: int) -> None:
    """MLX's CPU decodes scales four at a time and refuses a remainder, which rows of a table and pieces must avoid."""
    form = QUANTIZATIONS["nvfp4"]
    matrix = mx.random.normal((20, 96), key=mx.random.key(2)) / 8
    whole = mx.quantize(matrix, group_size=16, bits=4, mode="nvfp4", stream=mx.cpu)
    part = quantize(matrix[:rows], form)
    assert mx.array_equal(part["weight"], whole[0][:rows]) and mx.array_equal(part["scales"], whole[1][:rows])
    numbers = mx.dequantize(*whole, group_size=16, bits=4, mode="nvfp4", dtype=mx.float32)
    assert mx.array_equal(dequantize(part, form, mx.float32), numbers[:rows])
    table = QuantizedEmbedding(whole[0], whole[1], None, bits=4, group_size=16, mode="nvfp4", activations=mx.float32)
    ids = mx.array([list(range(rows))])
    assert mx.array_equal(table(ids), numbers[None, :rows])


@pytest.mark.parametrize("mode", ["mxfp4", "mxfp8", "nvfp4"])
def test_groups_of_vanishing_numbers_become_zeros_and_no_nan(mode: str) -> None:
    """Rows of an embedding that were never trained hold such numbers: for 1e-38, MLX 0.32's own scale is NaN."""
    packed = quantize(mx.full((2, 64), 1e-38), QUANTIZATIONS[mode])
    assert float(mx.max(mx.abs(dequantize(packed, QUANTIZATIONS[mode], mx.float32)))) < 1e-36


def test_a_tied_head_that_is_in_the_file_is_left_out_where_it_is_the_same(tmp_path: Path) -> None:
    path = TESTS / "fixtures" / "llama" / "llama-tied-redundant-head"
    assert "lm_head.weight" in Checkpoint.open(path).headers and open_files(path).config["tie_word_embeddings"]
    convert(open_files(path), tmp_path / "same", quantizer=quantizer("8", 32))
    assert not any(name.startswith("lm_head") for name in written(tmp_path / "same"))
    arrays = written(path)
    arrays["lm_head.weight"] = arrays["lm_head.weight"][::-1]
    source = Arrays(arrays)
    convert(files_of(open_files(path).config, source), tmp_path / "other", dtype="float32")
    assert open_files(tmp_path / "other").config["tie_word_embeddings"] is False
    before = assemble(open_files(path).config, source, dtype="float32")
    assert mx.array_equal(logits(open_loaded(tmp_path / "other", dtype="float32")), logits(before))


def test_mixed_gives_more_bits_where_llama_cpp_does(tmp_path: Path) -> None:
    layers = 16
    raw = {**raw_config(LLAMA), "num_hidden_layers": layers, "tie_word_embeddings": True}
    convert(files_of(raw, exact_weights(raw)), tmp_path / "out", quantizer=quantizer("4", 32, "mixed"))
    config = open_files(tmp_path / "out").config["quantization"]
    more = {name for name, form in config.items() if isinstance(form, dict) and form["bits"] == 6}
    # use_more_bits for 16 layers, by hand: 0, 1, every third from 4 on, 14, 15.
    favoured = {0, 1, 4, 7, 10, 13, 14, 15}
    assert more == {"model.embed_tokens"} | {
        f"model.layers.{i}.{name}" for i in favoured for name in ("self_attn.v_proj", "mlp.down_proj")
    }
    assert (config["bits"], config["group_size"]) == (4, 32)
    assert (
        error(logits(open_loaded(tmp_path / "out", dtype="float32")), logits(assemble(raw, exact_weights(raw)))) < 1.5
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("7",), "must be one of 2, 3, 4, 5, 6, 8, mxfp4, mxfp8, nvfp4, not '7'"),
        (("4", 16), "--group-size must be 32 or 64 or 128 with --quantize 4, not 16"),
        (("mxfp4", 64), "--group-size must be 32 with --quantize mxfp4, not 64"),
        (("nvfp4", 32), "--group-size must be 16 with --quantize nvfp4"),
        (("8", None, "mixed"), "6 bits to some.*not 8"),
        (("mxfp4", None, "mixed"), "not mxfp4"),
        (("4", None, "best"), "--recipe must be one of mixed"),
    ],
)
def test_what_does_not_go_together_is_refused_by_name(options: tuple[Any, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        quantizer(*options)


def test_defaults_and_choices_of_packing() -> None:
    assert quantizer("4").form == Quantization(4, 64, "affine") and quantizer("nvfp4").form.group_size == 16
    assert quantizer("3", 128).form.group_size == 128
    mixed = Quantizer(QUANTIZATIONS["4"], RECIPES["mixed"])
    assert mixed.of("layers.0.self_attn.qkv_proj", "model.layers.0.self_attn.v_proj", 8).bits == 6
    assert mixed.of("layers.0.self_attn.qkv_proj", "model.layers.0.self_attn.k_proj", 8).bits == 4
    assert mixed.of("layers.1.mlp.down_proj", "h.1.mlp.dense_4h_to_h", 8).bits == 4
    assert mixed.of("layers.3.mlp.down_proj", "h.3.mlp.dense_4h_to_h", 8).bits == 6
    assert mixed.of("lm_head", "embed_out", 8).bits == 6


def test_matrices_that_do_not_divide_into_groups_are_named(tmp_path: Path) -> None:
    path = TESTS / "fixtures" / "families" / "mixtral-base"  # 32 wide, experts of 24
    report = convert(open_files(path), tmp_path / "out", quantizer=quantizer("8", 32))
    assert "model.layers.0.block_sparse_moe.experts.0.w2" in report.unpackable
    with pytest.raises(UsageError, match="groups of 64; try a smaller --group-size"):
        convert(open_files(path), tmp_path / "none", quantizer=quantizer("8", 64))
    with pytest.raises(UsageError, match="dtype must be one of"):
        convert(open_files(path), tmp_path / "none", dtype="int8")


def test_only_files_that_are_read_are_copied(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "additional_chat_templates").mkdir(parents=True)
    for file in LLAMA.iterdir():
        if not file.name.startswith("expected"):
            (source / file.name).write_bytes(file.read_bytes())
    for name in ("modeling_evil.py", "pytorch_model.bin", "training_args.bin", "README.md", "weights.pkl"):
        (source / name).write_text("no")
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "additional_chat_templates" / "rag.jinja").write_text("{{ documents }}")
    convert(open_files(source), tmp_path / "out", quantizer=quantizer("4", 32))
    there = {file.name for file in LLAMA.iterdir()} & set(NAMES)
    names = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    own = {"config.json", "model.safetensors", "chat_template.jinja", "additional_chat_templates/rag.jinja"}
    assert "tokenizer.json" in there and names == there | own
    assert open_files(tmp_path / "out").tokenizer().chat_templates == ("default", "rag")
    (tmp_path / "secret").write_text("key")
    (source / "additional_chat_templates" / "x.jinja").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match="outside the model's directory"):
        convert(open_files(source), tmp_path / "leak")
    assert not (tmp_path / "leak").exists()


class Failing:
    """A source that fails after `left` reads."""

    def __init__(self, source: Source, left: int) -> None:
        self.source = source
        self.headers = source.headers
        self.left = left

    def read(self, name: str) -> mx.array:
        self.left -= 1
        if self.left < 0:
            raise CheckpointError("the disk broke")
        return self.source.read(name)


@pytest.mark.parametrize("reads", [0, 1, 7])
def test_after_an_error_nothing_is_left(reads: int, tmp_path: Path) -> None:
    files = open_files(LLAMA)
    broken = dataclasses.replace(files, source=Failing(files.source, reads))
    with pytest.raises(CheckpointError, match="the disk broke"):
        convert(broken, tmp_path / "out", quantizer=quantizer("4", 32))
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(CheckpointError, match="already exists and is not an empty directory"):
        convert(files, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_progress_ends_at_the_bytes_that_are_read(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    convert(open_files(LLAMA), tmp_path / "out", progress=lambda done, total: seen.append((done, total)))
    total = sum(header.nbytes for header in Checkpoint.open(LLAMA).headers.values())
    assert seen[-1] == (total, total) and [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_the_plan_is_what_comes(tmp_path: Path) -> None:
    """The planned headers match what is written, and every byte is written once."""
    raw = raw_config(TESTS / "fixtures" / "families" / "qwen3_moe-base")
    source = exact_weights(raw, mx.bfloat16)
    work = plan_conversion(raw, source, quantizer=quantizer("4", 32))
    assert source.reads == []
    sizes = dict.fromkeys(work.headers, 0)
    for piece in pieces(work, source):
        sizes[piece.name] += piece.array.nbytes
    assert sizes == {name: header.nbytes for name, header in work.headers.items()}
    assert {header.dtype for header in work.headers.values()} <= set(WIDTHS)


SHARD = 64 << 20
MEASURE = """
import json, re, sys
from pathlib import Path
from runner.convert.convert import convert
from runner.checkpoint.model_files import open_files
from runner.convert.quantize import quantizer
small, large, out, form, dtype = sys.argv[1:]
def run(source, target):
    wanted = quantizer(form, 32 if form.isdigit() else None) if form != "-" else None
    convert(open_files(Path(source)), Path(target), quantizer=wanted, dtype=None if dtype == "-" else dtype)
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
before = run(small, out + "/small")
print(json.dumps([before, run(large, out + "/large")]))
"""


@pytest.fixture(scope="module")
def three_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 192 MB in three shards, each with one or two large tensors and a layer."""
    raw = {**json.loads((LLAMA / "config.json").read_text()), "hidden_size": 1024, "intermediate_size": 9216,
           "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 128,
           "vocab_size": 31000, "tie_word_embeddings": True}  # fmt: skip
    path = tmp_path_factory.mktemp("large") / "model"
    source = random_weights(raw, dtype="bfloat16")
    files = open_files(LLAMA).side_files()
    from runner.checkpoint.writer import write_checkpoint

    write_checkpoint(path, ((name, source.read(name)) for name in source.headers), raw, files, SHARD + (4 << 20))
    assert len(list(path.glob("model-*"))) == 3
    return path


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc (ru_maxrss would be the parent's)")
@pytest.mark.parametrize(("form", "dtype"), [("4", "-"), ("8", "-"), ("mxfp8", "-"), ("nvfp4", "-"), ("-", "float32")])
def test_memory_stays_within_one_and_a_half_shards(three_shards: Path, form: str, dtype: str, tmp_path: Path) -> None:
    """The embedding fills its shard, so its converted form must not be in memory with it."""
    largest = max(path.stat().st_size for path in three_shards.glob("*.safetensors"))
    command = [sys.executable, "-c", MEASURE, str(LLAMA), str(three_shards), str(tmp_path), form, dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300, cwd=ROOT)
    before, after = json.loads(done.stdout)
    assert after - before < 1.5 * largest, f"{(after - before) / largest:.2f} times the largest shard"
    assert after - before > 0.2 * largest  # it was measured at all


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "runner", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, check=False, stdin=subprocess.DEVNULL)


def test_the_command(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("a small text of a few words, " * 60)
    done = run(
        "convert",
        str(TESTS / "fixtures" / "llama" / "llama-gqa"),
        str(tmp_path / "out"),
        "--quantize",
        "4",
        "--group-size",
        "32",
    )
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'out'}\n")
    assert "5." in done.stderr and "bits per weight, 16.00 before (16 4-bit g32)" in done.stderr
    for arguments, code, message in (
        ([str(LLAMA), str(tmp_path / "new"), "--group-size", "32"], 2, "--group-size needs --quantize"),
        ([str(LLAMA), str(tmp_path / "new"), "--recipe", "mixed"], 2, "--recipe needs --quantize"),
        ([str(LLAMA), str(tmp_path / "new"), "--quantize", "9"], 2, "'9'"),
        ([str(LLAMA), str(tmp_path / "out"), "--quantize", "4", "--group-size", "32"], 1, "already exists"),
        ([str(LLAMA), str(tmp_path / "new"), "--dtype", "int4"], 2, "int4"),
        ([str(LLAMA), str(tmp_path / "new"), "--eval", "/nowhere.txt"], 2, "/nowhere.txt"),
        (["/nowhere", str(tmp_path / "new")], 1, "/nowhere"),
    ):
        done = run("convert", *arguments)
        assert (done.returncode, done.stdout) == (code, "") and done.stderr.count("\n") == 1, done
        assert message in done.stderr
    assert not (tmp_path / "new").exists()
    eval_command = ["convert", str(LLAMA), str(tmp_path / "judged"), "--quantize", "3", "--group-size", "32"]
    done = run(*eval_command, "--eval", str(text))
    assert done.returncode == 0, done.stderr
    found = re.search(r"perplexity (\S+) ± \S+ after, (\S+) ± \S+ before", done.stderr)
    assert found is not None
    for path, value in ((tmp_path / "judged", found[1]), (LLAMA, found[2])):
        lm = runner.load(path)
        ids, bos = read_ids(lm.tokenizer, text.read_text())
        assert float(value) == pytest.approx(perplexity(lm.engine, ids, bos=bos, chunk=128).perplexity.value, abs=1e-3)
    text.write_text("short")
    done = run(*eval_command[:2], str(tmp_path / "short"), "--quantize", "8", "--group-size", "32", "--eval", str(text))
    assert done.returncode == 2 and "fewer than one chunk of 128" in done.stderr and not (tmp_path / "short").exists()


@pytest.mark.parametrize("directories", [True, False])
def test_all_is_on_the_disk_before_it_has_its_name(
    directories: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a power cut could leave whole headers before zeros. Some disks refuse to be asked for directories."""
    done: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def settled(number: int) -> None:
        if stat.S_ISDIR(os.fstat(number).st_mode):
            if not directories:
                raise OSError(errno.EINVAL, "not supported")
        else:
            done.append("file")
        fsync(number)

    monkeypatch.setattr(os, "fsync", settled)
    monkeypatch.setattr(Path, "rename", lambda path, to: (done.append("named"), rename(path, to))[1])
    with new_directory(tmp_path / "model", {"model_type": "x"}, {"notes.txt": "a"}) as place:
        (place / "model.safetensors").write_bytes(b"weights")
    assert done == ["file"] * 3 + ["named"] and (tmp_path / "model" / "model.safetensors").read_bytes() == b"weights"


HURT = "model.layers.1.mlp.down_proj.weight"


def hurt(number: float, dtype: mx.Dtype = mx.float32, *, whole: bool = False) -> ModelFiles:
    """The files of a model with `number` in one place of a matrix, or everywhere in it."""
    files = open_files(LLAMA)
    arrays = {name: files.source.read(name).astype(dtype) for name in files.source.headers}
    arrays[HURT] = mx.full(arrays[HURT].shape, number, dtype)
    if not whole:
        arrays[HURT] = mx.where(mx.arange(arrays[HURT].size).reshape(arrays[HURT].shape) == 40, number, 0.1)
    return files_of(files.config, Arrays({name: array.astype(dtype) for name, array in arrays.items()}))


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("options", [*QUANTIZATIONS, "float16", "bfloat16"])
def test_numbers_that_are_not_finite_are_refused(options: str, number: float, tmp_path: Path) -> None:
    """Packed, a NaN becomes some number: the damaged model would answer."""
    named = f"'{re.escape(HURT)}' has a number that is not finite"
    packing = None if options.endswith("16") else quantizer(options, 32 if options.isdigit() else None)
    with pytest.raises(CheckpointError, match=named):
        convert(hurt(number), tmp_path / "out", quantizer=packing, dtype=None if packing else options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("field", ["scales", "biases"])
def test_scales_that_are_not_finite_are_refused_where_they_are_used(field: str, tmp_path: Path) -> None:
    files = open_files(TESTS / "fixtures" / "llama" / "llama-mlx-4bit")
    arrays = {name: files.source.read(name) for name in files.source.headers}
    name = HURT.replace("weight", field)
    arrays[name] = mx.where(mx.arange(arrays[name].size).reshape(arrays[name].shape) == 3, mx.nan, arrays[name])
    broken = files_of(files.config, Arrays(arrays))
    with pytest.raises(CheckpointError, match=f"'{re.escape(HURT)}' has a number that is not finite"):
        convert(broken, tmp_path / "out", dtype="float32")
    convert(broken, tmp_path / "copy")  # no worse than what it was made from


def test_what_a_dtype_cannot_hold_is_refused(tmp_path: Path) -> None:
    for packing in (None, quantizer("4", 32)):
        with pytest.raises(CheckpointError, match=r"too large for float16; bfloat16 or float32 can hold it"):
            convert(hurt(1e6), tmp_path / "out", quantizer=packing, dtype="float16")
    with pytest.raises(CheckpointError, match=r"too large for bfloat16; float32 can hold it"):
        convert(hurt(3.4e38), tmp_path / "out", dtype="bfloat16")
    convert(hurt(1e6), tmp_path / "out", dtype="bfloat16")
    assert float(mx.max(written(tmp_path / "out")[HURT])) == pytest.approx(1e6, rel=1e-2)


def test_what_scales_cannot_hold_is_refused(tmp_path: Path) -> None:
    """The scales of nvfp4 reach from 2^-9 to 448: what lies beyond them was cut, or became zeros."""
    packing = quantizer("nvfp4")
    with pytest.raises(CheckpointError, match=f"'{re.escape(HURT)}' has numbers above 2688.*mxfp4"):
        convert(hurt(1e4), tmp_path / "out", quantizer=packing)
    with pytest.raises(CheckpointError, match=f"'{re.escape(HURT)}' would become zeros.*mxfp4"):
        convert(hurt(1e-3, whole=True), tmp_path / "out", quantizer=packing)
    far = mx.array([[3.4e38, -3.4e38] * 16])
    with pytest.raises(CheckpointError, match="'far' has numbers too far apart for float32 scales"):
        Packing("far", Quantization(2, 32, "affine")).check(far, quantize(far, Quantization(2, 32, "affine")))
    # What is at the end of the range fits, and zeros and numbers next to zero may be lost, as rows never trained are.
    for place, number in enumerate((2688.0, 0.0, 1e-9)):
        convert(hurt(number, whole=True), tmp_path / str(place), quantizer=packing)


def overwrite(path: Path) -> None:
    """Write zeros over the last bytes of a file, as a program does that has opened it already."""
    with path.open("r+b") as file:
        file.seek(-8, os.SEEK_END)
        file.write(bytes(8))
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))  # however coarse the clock of the disk is


@pytest.mark.parametrize("kind", ["directory", "gguf", "adapter"])
@pytest.mark.parametrize("when", ["first", "last"])
def test_a_source_that_changes_while_it_is_read_is_refused(kind: str, when: str, tmp_path: Path) -> None:
    """The files were compared with what they had been at the first tensor alone; half of the rest was written."""
    weights = tmp_path / "source" / "model.safetensors"
    shutil.copytree(LLAMA, tmp_path / "source")
    files = open_files(tmp_path / "source")
    if kind == "gguf":
        weights = tmp_path / "model.gguf"
        mixed_model(weights, "Q8_0")
        files = open_files(weights)
    elif kind == "adapter":
        case = TESTS / "fixtures" / "adapters" / "llama-qv"
        shutil.copytree(case / "adapter", tmp_path / "adapter")
        weights = tmp_path / "adapter" / "adapter_model.safetensors"
        base = TESTS / json.loads((case / "expected.json").read_text())["base"]
        files = merged(open_files(base), [AdapterFiles.open(tmp_path / "adapter", "a")])
    calls: list[int] = []

    def progress(done: int, total: int) -> None:
        if not calls if when == "first" else done == total:
            overwrite(weights)
        calls.append(done)

    with pytest.raises(CheckpointError, match=f"{weights.name}: changed since"):
        convert(files, tmp_path / "out", progress=progress)
    assert not (tmp_path / "out").exists()
