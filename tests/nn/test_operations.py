"""The number of operations that a layer adds to a decode step on a Mac, family by family, must not creep up."""

from __future__ import annotations

import json

import mlx.core as mx
import pytest
from operations import one_kernel_each, operations
from places import TESTS
from steps import decode_step, per_layer

from runner.ops.device import METAL
from runner.ops.table import PORTABLE

MOST = {
    "qwen2-base": 13,
    "qwen3-base": 16,
    "phi3-longrope": 14,
    "starcoder2-base": 13,
    "cohere2-base": 11.5,
    "gemma-base": 13,
    "gemma2-base": 20,
    "gemma3_text-base": 18,
    "olmo3-base": 16,
    "apertus-base": 16,
    "granite-base": 15,
    "gpt_oss-base": 29,
    "mixtral-window": 24,
    "qwen3_moe-base": 27,
    "qwen2_moe-base": 27,
    "deepseek_v2-lite-yarn": 35,
    "deepseek_v3-base": 44,
}
"""Operations a layer in bfloat16, views not counted. Who lowers one writes the lower number here."""


@pytest.mark.parametrize("name", MOST)
def test_operations_of_a_layer(name: str) -> None:
    raw = json.loads((TESTS / "fixtures" / "families" / name / "config.json").read_text())
    raw.pop("layer_types", None)  # lists the fixture's own layers; the config's pattern serves any number
    assert per_layer(raw, METAL) <= MOST[name]


def test_what_a_layer_of_a_llama_consists_of() -> None:
    """Counted by hand: 4 products, 2 norms, 2 adds, RoPE, attention, 2 rows into the cache, the gate of the MLP."""
    raw = json.loads((TESTS / "fixtures" / "families" / "helium-base" / "config.json").read_text())
    raw["model_type"] = "llama"
    raw["num_hidden_layers"] = 4
    four = decode_step(raw, METAL)
    raw["num_hidden_layers"] = 2
    layers = four - decode_step(raw, METAL)
    assert layers["Matmul"] == 2 * 4 and layers["SliceUpdate"] == 2 * 2 and layers["Compiled"] == 2
    assert layers.total() == 2 * (4 + 2 + 2 + 1 + 1 + 2 + 1)
    # Without fusion the gate is three operations: sigmoid and two products.
    assert per_layer(raw, PORTABLE) == 15


def test_counting() -> None:
    x, w = mx.ones((2, 8)), mx.ones(8)
    mx.eval(x, w)
    assert operations(x).total() == 0
    assert operations(x.reshape(4, 4)[1:].T + 1) == {"Add": 1}  # views do not count
    with one_kernel_each():
        normed = mx.fast.rms_norm(x, w.astype(mx.float16), 1e-5)
        assert operations(normed) == {"AsType": 1, "Compiled": 1}
    if mx.default_device() == mx.Device(mx.cpu):
        assert operations(mx.fast.rms_norm(x, w, 1e-5)).total() > 1  # put back, and many operations on a CPU
