"""GGUF files against the `gguf` package and the reference logits: blocks, containers, architectures, memory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import gguf_writer as writer
import mlx.core as mx
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from gguf_bytes import vocabulary
from gguf_cases import HALVES, ONE_SCALE, UNRENAMED, blocks, config_of, config_of_llama, write
from places import TESTS
from references import QUANTISED, TOLERANCE, error, expected

from runner.checkpoint.directory import Checkpoint
from runner.checkpoint.gguf import GGUF
from runner.checkpoint.gguf.blocks import FORMATS, Packed, _nibbles, _packed_nibbles, pack
from runner.checkpoint.model_files import open_files
from runner.config.base import Quantized
from runner.convert.convert import convert
from runner.engine.engine import assemble, open_engine
from runner.errors import CheckpointError
from runner.families import FAMILIES
from runner.weights.tags import Header

KINDS = [Type(number) for number in FORMATS]
BLOCK_KINDS = [kind for kind in KINDS if FORMATS[kind].count > 1]


def unpacked(found: GGUF, name: str) -> np.ndarray:
    """A tensor in float32, computed as a kernel would."""
    stem = name.removesuffix(".weight")
    if f"{stem}.scales" not in found.headers:
        return np.array(found.read(name).astype(mx.float32))
    scales, biases = (found.read(f"{stem}.{part}").astype(mx.float32) for part in ("scales", "biases"))
    packed = found.read(name)
    bits = packed.shape[-1] * 32 // (scales.shape[-1] * 32)
    return np.array(mx.dequantize(packed, scales, biases, group_size=32, bits=bits))


# --- blocks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BLOCK_KINDS, ids=lambda kind: kind.name)
def test_blocks_equal_the_gguf_packages(kind: Type) -> None:
    """Bit for bit: what is packed, in float32; what is not, rounded once to float16."""
    raw = blocks(kind, 6, 1024)
    wanted = gguf.dequantize(raw, kind).astype(np.float32)
    form = FORMATS[kind]
    parts = {suffix: mx.array(form.part(suffix, raw)) for suffix in form.parts((6, 1024))}
    if isinstance(form, Packed):
        scales, biases = parts[".scales"].astype(mx.float32), parts[".biases"].astype(mx.float32)
        found = mx.dequantize(parts[".weight"], scales, biases, group_size=32, bits=form.bits)
        assert np.array_equal(np.array(found), wanted)
    else:
        assert np.array_equal(np.array(parts[""]), wanted.astype(np.float16))
    assert wanted.std() > 0.01


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_packing_is_mlxs(bits: int) -> None:
    codes = np.random.default_rng(bits).integers(0, 1 << bits, (3, 64), dtype=np.uint8)
    ones, zeros = mx.ones((3, 2)), mx.zeros((3, 2))
    packed = mx.array(pack(codes, bits).view(np.uint32))
    assert np.array_equal(np.array(mx.dequantize(packed, ones, zeros, group_size=32, bits=bits)), codes)


@pytest.mark.parametrize("run", [16, 32])
def test_the_fast_packing_of_nibbles_is_the_plain_one(run: int) -> None:
    raw = np.random.default_rng(run).integers(0, 256, (5, 128), dtype=np.uint8)
    assert np.array_equal(_packed_nibbles(raw, run), pack(_nibbles(raw, run), 4))


@pytest.mark.parametrize("kind", BLOCK_KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("scale", [np.inf, np.nan, 65504.0])
def test_scales_that_do_not_fit_are_refused(kind: Type, scale: float) -> None:
    form = FORMATS[kind]
    raw = np.full((1, form.size), 0x77, np.uint8)
    for place in HALVES.get(form.name, (0,) if form.name in ONE_SCALE else (0, 2)):
        raw[:, place : place + 2] = np.float16([scale]).view(np.uint8)
    suffixes = [suffix for suffix in form.parts((form.count,)) if suffix != ".weight"]
    if scale == 65504.0 and form.name not in (*ONE_SCALE, *HALVES):
        assert all(np.isfinite(form.part(suffix, raw)).all() for suffix in suffixes)
        return
    with pytest.raises(CheckpointError, match=form.name):
        for suffix in suffixes:
            form.part(suffix, raw)


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


# --- architectures ----------------------------------------------------------------------------------------------------

NOT_IN_GGUF = {
    "llama-gelu", "llama-gelu-tanh", "llama-rope-dynamic", "llama-rope-longrope",
    "llama-rope-longrope-attention-factor", "llama-rope-yarn-mscale", "llama-rope-yarn-untruncated",
    "llama-sharded", "llama-mlx-4bit", "llama-mlx-mixed", "llama-mlx-tied", "qwen2-window", "qwen3-window",
    "gemma2-gelu",
}  # fmt: skip
"""Fixtures whose config has no word in GGUF, and those that are about safetensors."""

FIXTURES = [
    path.parent
    for path in sorted([*TESTS.glob("fixtures/llama/*/config.json"), *TESTS.glob("fixtures/families/*/config.json")])
    if json.loads(path.read_text())["model_type"] in writer.ARCHITECTURES and path.parent.name not in NOT_IN_GGUF
]
by_fixture = pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.name)


@by_fixture
def test_names_order_and_config_come_back(path: Path, tmp_path: Path) -> None:
    """transformers' checkpoint -> what llama.cpp's converter makes of it -> the same tensors and settings."""
    config, weights = config_of(path), writer.weights_of(path)
    found = GGUF.open(writer.write_model(tmp_path / "m.gguf", config, weights))
    left = {name for name in weights if "inv_freq" not in name}
    assert set(found.headers) == left
    for name in left:
        header = found.headers[name]
        assert (header.dtype, header.shape) == ("F32", weights[name].shape)
        # A norm's 1 + w in float32 rounds by half a unit of its last place, once here and once in the model.
        rounding = 2e-7 if "norm" in name and config["model_type"].startswith("gemma") else 0
        assert np.max(np.abs(np.array(found.read(name)) - weights[name])) <= rounding, name
    named = {key: config[key] for key in UNRENAMED if config.get(key)}
    if config.get("use_sliding_window") is False:
        named.pop("sliding_window", None)
    assert {key: found.config.get(key) for key in named} == named
    windows = config["model_type"] == "mistral" and config["sliding_window"]
    assert found.config["model_type"] == (
        "llama" if config["model_type"] == "mistral" and not windows else config["model_type"]
    )


@by_fixture
def test_logits_are_the_references(path: Path, tmp_path: Path) -> None:
    config = config_of(path)
    if config["model_type"] not in FAMILIES:
        pytest.skip(f"no family {config['model_type']} yet")
    engine = open_engine(writer.write_model(tmp_path / "m.gguf", config, writer.weights_of(path)), dtype="float32")
    wanted = mx.load(str(path / "expected.safetensors"))
    for name, prompt in expected(path)["prompts"].items():
        assert error(engine.logits(prompt), wanted[f"logits.{name}"]) < TOLERANCE


class Dense:
    """A `Source` of plain arrays."""

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


MIXES = {
    "Q4_0": {}, "Q4_1": {}, "Q5_0": {}, "Q5_1": {}, "Q8_0": {}, "Q2_K": {}, "Q3_K": {}, "Q6_K": {},
    "Q4_K": {"attn_v": "Q6_K", "ffn_down": "Q6_K", "output": "Q6_K"},  # as llama.cpp's Q4_K_M mixes
    "Q5_K": {"attn_v": "Q8_0", "attn_k": "Q4_K", "token_embd": "Q6_K", "ffn_up": "F16"},
}  # fmt: skip


def mixed_model(path: Path, name: str) -> writer.Tensors:
    """A Llama of one layer in the types of `MIXES[name]`, written to `path`."""
    config = config_of_llama()
    rng = np.random.default_rng(5)
    shapes = {
        "token_embd": (300, 256), "output": (300, 256), "blk.0.attn_q": (256, 256), "blk.0.attn_k": (128, 256),
        "blk.0.attn_v": (128, 256), "blk.0.attn_output": (256, 256), "blk.0.ffn_gate": (512, 256),
        "blk.0.ffn_up": (512, 256), "blk.0.ffn_down": (256, 512),
    }  # fmt: skip
    norms = ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm")
    tensors: dict[str, Any] = {f"{n}.weight": (rng.normal(1, 0.2, 256).astype(np.float32), Type.F32) for n in norms}
    for seed, (tensor, shape) in enumerate(shapes.items()):
        kind = Type[MIXES[name].get(tensor.split(".")[-1], name)]
        # Scales such that the numbers are of the size that weights are.
        spread = 0.05 * 2.0 ** -{"Q4": 4, "Q5": 5, "Q8": 7, "Q2": 4, "Q3": 8, "Q6": 10}.get(kind.name[:2], 0)
        spread /= 32 if kind.name in ("Q4_K", "Q5_K") else 1
        plain = rng.normal(0, 0.05, shape).astype(np.float16)
        tensors[f"{tensor}.weight"] = (plain if kind == Type.F16 else blocks(kind, *shape, seed, spread), kind)
    write(path, tensors, **writer.metadata_of(config), **vocabulary(300))
    return tensors


@pytest.mark.parametrize("name", MIXES)
def test_packed_models_compute_what_their_blocks_say(name: str, tmp_path: Path) -> None:
    """Logits of a packed file = logits of its dequantised numbers in float32."""
    path = tmp_path / "m.gguf"
    raw_head, kind = mixed_model(path, name)["output.weight"]
    found = GGUF.open(path)
    dense = {key: mx.array(unpacked(found, key)) for key in found.headers if key.endswith(".weight")}
    wanted = gguf.dequantize(raw_head, kind)
    wanted = wanted if isinstance(FORMATS[kind], Packed) else wanted.astype(np.float16)
    assert np.array_equal(np.array(dense["lm_head.weight"]), wanted)
    raw = {key: value for key, value in found.config.items() if key != "quantization"}
    ids = [1, 17, 250, 299, 3, 3, 42]
    plain_logits = assemble(raw, Dense(dense), dtype="float32").logits(ids)
    assert error(open_engine(path, dtype="float32").logits(ids), plain_logits) < QUANTISED
    convert(open_files(path), tmp_path / "out")
    assert mx.array_equal(open_engine(tmp_path / "out").logits(ids), open_engine(path).logits(ids))
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
    """4608 / 32 and 5376 / 32 in the 27B models of Gemma 2 and 3, the head size in all others (their config.json)."""
    config = {
        **config_of_llama(layers=layers), "model_type": arch, "hidden_size": 4608 if arch == "gemma2" else 5376,
        "num_attention_heads": 32, "head_dim": 256, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
        "sliding_window_pattern": 6, "sliding_window": 1024, "query_pre_attn_scalar": 1,
    }  # fmt: skip
    metadata = {k: v for k, v in writer.metadata_of(config).items() if "attention.scale" not in k}
    table = {"token_embd.weight": (np.zeros((300, config["hidden_size"]), np.float16), Type.F16)}
    found = GGUF.open(write(tmp_path / "m.gguf", table, **metadata, **vocabulary(300)))
    assert found.config["query_pre_attn_scalar"] == scalar
