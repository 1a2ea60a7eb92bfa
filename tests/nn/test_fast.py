"""Attention, norms and RoPE against naive implementations in float32, and the errors they raise."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import mlx.core as mx
import pytest
from places import TESTS

from runner.config.rope import RopeScaling
from runner.errors import ConfigError, UsageError
from runner.nn.batch import Batch
from runner.nn.fast import NO_MASK, LayerNorm, RMSNorm, RoPE, scaled_dot_product_attention
from runner.ops.device import CUDA, current, wrong_on_cuda
from runner.ops.quantized import QuantizedWeight
from runner.ops.table import PORTABLE, Ops

REFERENCE = json.loads((TESTS / "data" / "rope_reference.json").read_text())

TABLES = list({ops.name: ops for ops in (PORTABLE, current().ops)}.values())
"""The portable table, and this machine's if it is another one."""


def rand(*shape: int, seed: int = 0) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed))


def naive(q: mx.array, k: mx.array, v: mx.array, scale: float, visible: mx.array) -> mx.array:
    repeats = q.shape[1] // k.shape[1]
    k, v = mx.repeat(k, repeats, axis=1), mx.repeat(v, repeats, axis=1)
    scores = mx.where(visible, q @ k.swapaxes(2, 3) * scale, -math.inf)
    return mx.softmax(scores, axis=-1) @ v


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 9), (5, 5), (3, 11)])
@pytest.mark.parametrize("kind", ["causal", "none", "window", "bool", "additive"])
def test_attention(queries: int, keys: int, kind: str) -> None:
    q, k, v = rand(2, 6, queries, 16), rand(2, 3, keys, 16, seed=1), rand(2, 3, keys, 16, seed=2)
    row, column = mx.arange(keys - queries, keys)[:, None], mx.arange(keys)[None]
    visible = column <= row
    if kind == "causal":
        found = scaled_dot_product_attention(q, k, v, scale=0.25)
    elif kind == "none":
        visible = mx.ones_like(visible)
        found = scaled_dot_product_attention(q, k, v, NO_MASK, scale=0.25)
    elif kind == "window":
        visible = visible & (column > row - 3)
        found = scaled_dot_product_attention(q, k, v, scale=0.25, window=3)
    elif kind == "bool":
        visible = visible & ((column + row) % 2 == 0) | (column == row)
        found = scaled_dot_product_attention(q, k, v, visible, scale=0.25)
    else:
        found = scaled_dot_product_attention(q, k, v, mx.where(visible, 0.0, -math.inf), scale=0.25)
    assert mx.allclose(found, naive(q, k, v, 0.25, visible), atol=1e-5)


@pytest.mark.parametrize(
    ("q", "k", "v", "words"),
    [
        ((2, 4, 8), (1, 2, 4, 8), (1, 2, 4, 8), "[B, H, L, D]"),
        ((1, 5, 1, 8), (1, 2, 4, 8), (1, 2, 4, 8), "5 query heads are not a multiple of 2 key-value heads"),
        ((1, 4, 1, 8), (1, 2, 4, 4), (1, 2, 4, 8), "head sizes differ"),
        ((1, 4, 6, 8), (1, 2, 4, 8), (1, 2, 4, 8), "more queries (6) than keys (4)"),
    ],
)
def test_attention_refuses(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...], words: str) -> None:
    with pytest.raises(UsageError) as caught:
        scaled_dot_product_attention(mx.zeros(q), mx.zeros(k), mx.zeros(v), scale=1.0)
    assert words in str(caught.value)
    with pytest.raises(TypeError):
        scaled_dot_product_attention(mx.zeros((1, 1, 1, 8)), mx.zeros((1, 1, 1, 8)), mx.zeros((1, 1, 1, 8)))  # type: ignore[call-arg]


def test_norms() -> None:
    x, w, b = rand(2, 3, 16), rand(16, seed=1), rand(16, seed=2)
    wanted = x / mx.sqrt(mx.mean(x * x, axis=-1, keepdims=True) + 1e-5) * w
    assert mx.allclose(RMSNorm(w)(x, 1e-5), wanted, atol=1e-5)
    centred = x - mx.mean(x, axis=-1, keepdims=True)
    wanted = centred / mx.sqrt(mx.mean(centred * centred, axis=-1, keepdims=True) + 1e-3) * w + b
    assert mx.allclose(LayerNorm(w, b)(x, 1e-3), wanted, atol=1e-5)
    assert mx.allclose(LayerNorm(w)(x, 1e-3), wanted - b, atol=1e-5)
    with pytest.raises(UsageError, match="last axis"):
        RMSNorm(w)(rand(2, 15), 1e-5)


@pytest.mark.parametrize("traditional", [False, True])
@pytest.mark.parametrize("dims", [8, 16])
def test_rope_against_complex_rotation(traditional: bool, dims: int) -> None:
    x = rand(2, 3, 4, 16)
    angle = (mx.arange(4) + 7)[:, None] * mx.array([10000 ** (-2 * i / dims) for i in range(dims // 2)])[None]
    cos, sin = mx.cos(angle), mx.sin(angle)
    part = x[..., :dims]
    a, b = (part[..., ::2], part[..., 1::2]) if traditional else (part[..., : dims // 2], part[..., dims // 2 :])
    turned = [a * cos - b * sin, a * sin + b * cos]
    joined = mx.stack(turned, axis=-1).flatten(-2) if traditional else mx.concatenate(turned, axis=-1)
    wanted = mx.concatenate([joined, x[..., dims:]], axis=-1)
    rope = RoPE(dims=dims, traditional=traditional)
    assert mx.allclose(rope(x, 7), wanted, atol=1e-5)
    assert mx.allclose(rope(x, mx.array([7, 7])), wanted, atol=1e-5)


def test_rope_takes_an_offset_for_each_row() -> None:
    x, rope = rand(2, 3, 4, 16), RoPE(dims=16)
    both = rope(x, mx.array([3, 50]))
    assert mx.allclose(both[:1], rope(x[:1], 3), atol=1e-5)
    assert mx.allclose(both[1:], rope(x[1:], 50), atol=1e-5)
    with pytest.raises(UsageError, match="offset"):
        rope(x, mx.array([1, 2, 3]))


def test_rope_refuses_what_it_does_not_know() -> None:
    with pytest.raises(ConfigError, match="spiral"):
        RopeScaling.from_dict({"rope_type": "spiral", "factor": 2})
    with pytest.raises(ConfigError, match="tilt"):
        RopeScaling.from_dict({"rope_type": "linear", "factor": 2.0, "tilt": 1})
    with pytest.raises(UsageError, match="even"):
        RoPE(dims=7)


KNOWN_KINDS = REFERENCE["entries"]


def scaling_of(config: dict[str, Any]) -> RopeScaling | None:
    raw = config["rope_scaling"]
    original = {name: config[name] for name in ("original_max_position_embeddings",) if name in config}
    return None if raw is None else RopeScaling.from_dict({**original, **raw})


@pytest.mark.parametrize("ops", TABLES, ids=lambda ops: ops.name)
@pytest.mark.parametrize("entry", KNOWN_KINDS, ids=lambda entry: entry["name"])
def test_rope_equals_the_reference(entry: dict[str, Any], ops: Ops) -> None:
    """Every rope type at positions 0, 1k, 8k and 60k; `rope_reference.json` carries its recipe (transformers 5.23)."""
    config = entry["config"]
    head_dim, limit = config["head_dim"], config["max_position_embeddings"]
    rope = RoPE(
        dims=head_dim, base=config["rope_theta"], scaling=scaling_of(config), max_position_embeddings=limit, ops=ops
    )
    half = mx.concatenate([mx.ones(head_dim // 2), mx.zeros(head_dim // 2)]).reshape(1, 1, 1, head_dim)
    for case in entry["by_length"]:
        assert rope.factor == pytest.approx(case["attention_factor"], rel=1e-6)
        for position, cos, sin in zip(REFERENCE["positions"], case["cos"], case["sin"], strict=True):
            found = rope(half, position, case["seq_len"]) / rope.factor  # (1, 0) turned by the angle: (cos, sin)
            # An angle in float32 is off by its last bits: frequency and product round, at 60,000 rad by 1e-2.
            tolerance = 1e-5 + position * 2e-7
            assert mx.allclose(found[0, 0, 0], mx.array(cos + sin), atol=tolerance, rtol=0), (position, case["seq_len"])


def test_frequencies_for_a_length_are_made_once_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    plain = RoPE._freqs
    monkeypatch.setattr(RoPE, "_freqs", lambda self, length: made.append(length) or plain(self, length))
    scaling = RopeScaling(kind="dynamic", factor=2.0)
    layers = [RoPE(dims=8, scaling=scaling, max_position_embeddings=16) for _ in range(3)]
    other = RoPE(dims=8, base=500.0, scaling=scaling, max_position_embeddings=16)
    x = rand(1, 2, 4, 8)
    alone, otherwise = layers[0](x, 30), other(x, 30)
    made.clear()
    batch = Batch(mx.zeros((1, 4), dtype=mx.int32), 30)
    for layer in layers:
        assert mx.array_equal(layer(x, 30, once=batch.once), alone)
    # A layer with another base must not get them, nor may the next pass, which is longer.
    assert mx.array_equal(other(x, 30, once=batch.once), otherwise) and not mx.array_equal(otherwise, alone)
    assert made == [34, 34]
    later = Batch(mx.zeros((1, 4), dtype=mx.int32), 34)
    assert not mx.array_equal(layers[0](x, 30, 38, once=later.once), alone)


@pytest.mark.parametrize(
    ("rows", "outputs", "inputs", "group", "dtype", "unpacks"),
    [
        (2, 128, 64, 64, mx.bfloat16, True),
        (40, 128, 128, 128, mx.float32, True),
        (40, 128, 256, 128, mx.float32, True),
        (37, 32, 64, 32, mx.float32, True),
        (2, 96, 256, 64, mx.float32, True),
        (1, 96, 64, 64, mx.float32, False),
        (1, 32, 32, 32, mx.float32, True),
        (40, 128, 256, 128, mx.bfloat16, False),
        (40, 192, 256, 64, mx.float32, False),
    ],
)
def test_cuda_unpacks_where_its_product_is_wrong(
    rows: int, outputs: int, inputs: int, group: int, dtype: mx.Dtype, unpacks: bool
) -> None:
    weight, scales, biases = mx.quantize(rand(outputs, inputs).astype(dtype), group_size=group, bits=4)
    x = rand(rows, inputs, seed=1).astype(dtype)
    form = {"group_size": group, "bits": 4, "mode": "affine"}
    found = CUDA.quantized_linear(x, QuantizedWeight(weight, scales, biases, group, 4, "affine"), None)
    wanted = x.astype(mx.float32) @ mx.dequantize(weight, scales, biases, **form).astype(mx.float32).T
    assert found.dtype == dtype  # a CPU adds bfloat16 products in bfloat16: 10 % of their deviation
    assert mx.allclose(found.astype(mx.float32), wanted, atol=3.0 if dtype == mx.bfloat16 else 1e-3, rtol=0)
    assert wrong_on_cuda(x, outputs, group, "affine") is unpacks


@pytest.mark.parametrize(("length", "factor"), [(12, 1.2), (40, 1.5)])
def test_a_longrope_with_two_scales_takes_that_of_its_length(length: int, factor: float) -> None:
    """Phi 3.5 MoE's, as its authors' code has it; transformers 5.23 keeps the short factors at any length."""
    both = RopeScaling(
        kind="longrope", short_factor=(1.0, 1.5), long_factor=(2.0, 8.0), original_max_position_embeddings=16,
        short_mscale=1.2, long_mscale=1.5,
    )  # fmt: skip
    one = dataclasses.replace(both, short_mscale=None, long_mscale=None, attention_factor=factor)
    x = mx.random.normal((1, 2, 5, 4))
    found, wanted = (RoPE(dims=4, scaling=s, max_position_embeddings=64)(x, 3, length) for s in (both, one))
    assert mx.allclose(found, wanted, atol=1e-6)
