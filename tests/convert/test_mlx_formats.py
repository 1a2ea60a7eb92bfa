"""Checkpoints in every quantized form of MLX compute what the dequantized model computes, on all CPU paths."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_formats import FORMATS, LLAMA, MOE, Format, floats, packed, stacked, unpacked
from places import TESTS
from sources import Arrays

from runner.engine import loaded
from runner.errors import ConfigError, WeightsError
from runner.families import find
from runner.nn.linear import Embedding, Linear
from runner.ops.device import CPU_WITHOUT_KERNELS, Device, current
from runner.ops.table import PORTABLE
from runner.weights import loading
from runner.weights.plan import plan
from runner.weights.tags import weight

DEVICES = [current(), Device("unpacking", CPU_WITHOUT_KERNELS)]
if mx.default_device() == mx.Device(
    mx.cpu
):  # on an NVIDIA GPU some of MLX's own products are wrong: see runner.ops.device
    DEVICES.append(Device("mlx", PORTABLE))
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]

by_format = pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
by_device = pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.name)


def logits(raw: dict[str, Any], tensors: dict[str, mx.array]) -> mx.array:
    return loaded.assemble(raw, Arrays(tensors), dtype="float32").logits(PROMPT)


@dataclass
class Holder:
    """A quantized tensor, once as a linear layer and once as an embedding table."""

    layer: Linear = weight("layer", 48, 256)
    rows: Embedding = weight("layer", 48, 256)


def distance(found: mx.array, wanted: mx.array) -> float:
    return float(mx.max(mx.abs(found - wanted)) / mx.std(wanted))


@by_format
def test_matrices_are_the_references(form: Format) -> None:
    """`Linear.matrix`, and a product with a unit row for each input, against NumPy."""
    matrix = mx.random.normal((48, 256), key=mx.random.key(1))
    parts = form.pack("layer", matrix)
    wanted = unpacked(parts, "layer", form)
    assert np.corrcoef(wanted.flatten(), np.array(matrix).flatten())[0, 1] > 0.9  # it is this matrix
    raw = {**LLAMA, "quantization": form.entry}
    tree = plan(Holder, find(raw)[0].from_dict(raw), Arrays(parts).headers, {"ops": current().ops})
    holder = loading.build(tree, Arrays(parts))
    largest = np.abs(wanted).max()
    assert np.abs(np.array(holder.layer.matrix().astype(mx.float32)) - wanted).max() <= 2e-7 * largest
    assert np.abs(np.array(holder.rows(mx.arange(48)).astype(mx.float32)) - wanted).max() <= 2e-7 * largest
    assert np.abs(np.array(holder.layer(mx.eye(256))).T - wanted).max() <= 1e-3 * largest


@by_device
@by_format
def test_models_compute_what_the_matrices_say(form: Format, device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loaded, "current", lambda: device)
    for raw in (LLAMA, MOE):
        stored, meant = packed(floats(raw), form)
        found = logits({**raw, "quantization": form.entry}, stored)
        # The kernels round activations to 16 bits; MLX keeps sums of float8 products less exactly.
        assert distance(found, logits(raw, meant)) < (2e-3 if device is DEVICES[0] else 2e-4), raw["model_type"]


@by_device
def test_layers_of_their_own(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The parts of a joined matrix have different forms, one is plain, and the embeddings have a third form."""
    monkeypatch.setattr(loaded, "current", lambda: device)
    attention, mlp = "model.layers.0.self_attn", "model.layers.1.mlp"
    others = {
        f"{attention}.q_proj": Format(8, 32), f"{attention}.k_proj": Format(3, 128), f"{attention}.v_proj": None,
        f"{attention}.o_proj": Format(4, 32, "mxfp4"), f"{mlp}.gate_proj": Format(6, 64),
        "model.embed_tokens": Format(5, 64),
        f"{mlp}.down_proj": None, "model.layers.1.self_attn.o_proj": Format(8, 32, "mxfp8"),
        "model.layers.1.self_attn.v_proj": Format(4, 16, "nvfp4"),
    }  # fmt: skip
    stored, meant = packed(floats(LLAMA), Format(4, 64), others)
    entries = {name: False if form is None else form.entry for name, form in others.items()}
    quantization = {**Format(4, 64).entry, **entries}
    found = logits({**LLAMA, "quantization": quantization}, stored)
    assert distance(found, logits(LLAMA, meant)) < (2e-3 if device is DEVICES[0] else 2e-4)
    # mlx-lm also writes it under transformers' key for its own quantization methods
    both = {**LLAMA, "quantization": quantization, "quantization_config": quantization}
    assert mx.array_equal(logits(both, stored), found)


def test_experts_stacked_by_mlx_lm() -> None:
    raw, form = {**MOE, "mlp_only_layers": []}, Format(4, 64)
    stored, meant = packed(floats(raw), form)
    # A mixture's router often stays in 8 bits.
    router = "model.layers.0.mlp.gate"
    parts = Format(8, 64).pack(router, floats(raw)[f"{router}.weight"])
    meant[f"{router}.weight"] = mx.array(unpacked(parts, router, Format(8, 64)).astype(np.float32))
    quantization = {**form.entry, router: Format(8, 64).entry}
    assert distance(logits({**raw, "quantization": quantization}, stacked(stored) | parts), logits(raw, meant)) < 2e-3


@pytest.mark.parametrize(
    ("entry", "error", "words"),
    [
        ({"bits": 4, "group_size": 32}, WeightsError, "config.json says (4, 32, 'affine')"),
        ({"bits": 8, "group_size": 64}, WeightsError, "config.json says (8, 64, 'affine')"),
        ({"bits": 4, "group_size": 64, "mode": "int4"}, ConfigError, "a mode of MLX"),
        ({"bits": "4", "group_size": 64}, ConfigError, "integers bits and group_size"),
        (
            {"bits": 4, "group_size": 64, "model.layers.0.mlp.up_proj": {"bits": 2}},
            ConfigError,
            "integers bits and group_size",
        ),
        ([4, 64], ConfigError, "must be an object"),
    ],
)
def test_what_config_and_tensors_say_must_agree(entry: Any, error: type[Exception], words: str) -> None:
    stored, _ = packed(floats(LLAMA), Format(4, 64))
    with pytest.raises(error) as caught:
        logits({**LLAMA, "quantization": entry}, stored)
    assert words in str(caught.value)


def test_names_and_shapes_that_only_mlx_lm_writes() -> None:
    """DeepSeek V3's key and value projections split by head, and Apertus' activation parameters as plain numbers."""
    for name in ("deepseek_v3-yarn", "apertus-base"):
        path = TESTS / "fixtures" / "families" / name
        raw, tensors = json.loads((path / "config.json").read_text()), mx.load(str(path / "model.safetensors"))
        assert isinstance(tensors, dict)
        written: dict[str, mx.array] = {}
        for key, tensor in tensors.items():
            if key.endswith(("alpha_p", "alpha_n")):
                written[key] = tensor.squeeze()
            elif key.endswith("kv_b_proj.weight"):
                heads = tensor.reshape(raw["num_attention_heads"], -1, raw["kv_lora_rank"])
                keys, values = heads[:, : raw["qk_nope_head_dim"]], heads[:, raw["qk_nope_head_dim"] :]
                written[key.replace("kv_b_proj", "embed_q")] = mx.contiguous(keys.swapaxes(1, 2))
                written[key.replace("kv_b_proj", "unembed_out")] = mx.contiguous(values)
            else:
                written[key] = tensor
        assert {key: tensor.shape for key, tensor in written.items()} != {k: t.shape for k, t in tensors.items()}
        assert distance(logits(raw, written), logits(raw, tensors)) < 1e-5, name
