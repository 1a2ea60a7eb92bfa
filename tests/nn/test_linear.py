"""Matrices whose parts are stored in different dtypes compute what the numbers say, or are refused by name."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from places import TESTS

import runner
from runner.checkpoint.directory import Checkpoint, write_checkpoint
from runner.checkpoint.model_files import open_files
from runner.convert.convert import convert
from runner.engine.loaded import open_loaded
from runner.errors import WeightsError
from runner.nn.moe import QuantizedExperts

LLAMA = TESTS / "fixtures" / "llama"
Change = Callable[[str], mx.Dtype | None]


def rewritten(out: Path, fixture: str, dtype_of: Change) -> Path:
    """The fixture with the dtype that `dtype_of` gives each name; None leaves it. Its 16-bit numbers are bfloat16."""
    source = Checkpoint.open(LLAMA / fixture)
    tensors = {name: source.read(name) for name in source.headers}
    for name in tensors:
        dtype = dtype_of(name)
        tensors[name] = tensors[name] if dtype is None else tensors[name].astype(dtype)
    write_checkpoint(out, tensors.items(), source.config)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(LLAMA / fixture / file, out / file)
    return out


def ending(part: str, dtype: mx.Dtype) -> Change:
    return lambda name: dtype if name.endswith(part) else None


MIXED: dict[str, tuple[str, Change]] = {
    "biases": ("llama-mlx-4bit", ending(".biases", mx.float32)),
    "scales": ("llama-mlx-4bit", ending(".scales", mx.float32)),
    "scales of one part of q, k and v": ("llama-mlx-4bit", ending("k_proj.scales", mx.float32)),
    "scales of the embeddings": ("llama-mlx-tied", ending("embed_tokens.scales", mx.float32)),
    "bias of a plain layer": ("llama-both-biases-tied", ending(".bias", mx.float32)),
    "one part of plain q, k and v": ("llama-both-biases-tied", ending("k_proj.weight", mx.float32)),
}


@pytest.mark.parametrize("dtype", [None, "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", MIXED)
def test_a_wider_dtype_of_one_part_changes_nothing(name: str, dtype: str | None, tmp_path: Path) -> None:
    fixture, change = MIXED[name]
    found = runner.load(rewritten(tmp_path / "mixed", fixture, change), dtype=dtype).logits([5, 6, 7])
    wanted = runner.load(LLAMA / fixture, dtype=dtype).logits([5, 6, 7])
    assert np.abs(np.array(found) - np.array(wanted)).max() < 0.02 * np.array(wanted).std()


def test_a_matrix_of_mixed_dtypes_is_converted(tmp_path: Path) -> None:
    mixed = open_files(rewritten(tmp_path / "mixed", "llama-mlx-4bit", ending(".biases", mx.float32)))
    convert(mixed, tmp_path / "out", dtype="float32")
    found, wanted = (runner.load(path, dtype="float32").logits([5, 6]) for path in (tmp_path / "out", mixed.path))
    # Packed matrices are multiplied with rows of 16 bits.
    assert mx.allclose(found, wanted, atol=5e-4)


@pytest.mark.parametrize("part, dtype", [(".scales", mx.uint8), (".biases", mx.int32)])
def test_scales_and_biases_that_are_no_floats_are_refused(part: str, dtype: mx.Dtype, tmp_path: Path) -> None:
    path = rewritten(tmp_path / "m", "llama-mlx-4bit", ending(f"k_proj{part}", dtype))
    with pytest.raises(WeightsError, match=r"k_proj.*(U8|I32)"):
        runner.load(path)


def test_stacked_experts_take_biases_of_another_dtype() -> None:
    words, scales, biases = mx.quantize(mx.random.normal((3, 8, 64), key=mx.random.key(0)), group_size=32, bits=4)
    form = {"group_size": 32, "bits": 4, "mode": "affine"}
    scales = scales.astype(mx.bfloat16)
    experts = QuantizedExperts(words, scales, biases, **form)
    ids = mx.array([[[0, 2]]], mx.uint32)
    found = experts(mx.ones((1, 1, 1, 1, 64)), ids).flatten()
    wanted = mx.dequantize(words, scales.astype(mx.float32), biases, **form).sum(axis=-1)[mx.array([0, 2])].flatten()
    assert mx.allclose(found, wanted, atol=1e-3)


@pytest.mark.parametrize(("group_size", "scales"), [(16, mx.float16), (8, mx.float16), (32, mx.uint8)])
def test_packed_matrices_that_no_kernel_multiplies_are_refused_by_name(
    group_size: int, scales: mx.Dtype, tmp_path: Path
) -> None:
    """Groups of 16 were read, and failed in MLX when the first token was computed."""
    source = Checkpoint.open(LLAMA / "llama-mlx-4bit")
    tensors = {name: source.read(name) for name in source.headers}
    name = "model.layers.0.mlp.down_proj"
    rows, groups = tensors[f"{name}.scales"].shape
    width = groups * source.config["quantization"]["group_size"]
    for part in ("scales", "biases"):
        tensors[f"{name}.{part}"] = mx.ones((rows, width // group_size), dtype=scales)
    write_checkpoint(tmp_path / "model", tensors.items(), source.config)
    with pytest.raises(WeightsError, match=rf"{name}: 4 bits in groups of {group_size} .* groups of 32, 64, 128"):
        open_loaded(tmp_path / "model")
