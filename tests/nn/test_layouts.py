"""Matrices stored in other orders: once read, they multiply as naive code does; saved, they are stored as before."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import pytest
from sources import Arrays

from runner.errors import WeightsError
from runner.models.llama import LlamaConfig
from runner.nn.layouts import Conv1D, FusedQKV, grouped_rows
from runner.nn.linear import Linear, PlainLinear, QuantizedLinear
from runner.weights import loading
from runner.weights.plan import plan
from runner.weights.tags import weight

HEAD = 16


def config(heads: int, groups: int) -> LlamaConfig:
    return LlamaConfig(
        model_type="t", vocab_size=3, hidden_size=64, intermediate_size=96, num_hidden_layers=1,
        num_attention_heads=heads, num_key_value_heads=groups, head_dim=HEAD,
    )  # fmt: skip


def rand(*shape: int) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(sum(shape)))


@dataclass
class Fused:
    qkv: FusedQKV = weight(
        "query_key_value",
        ("num_attention_heads*head_dim", "num_key_value_heads*head_dim", "num_key_value_heads*head_dim"),
        "hidden_size",
        bias=True,
    )


@dataclass
class Turned:
    c_fc: Conv1D = weight("h.c_fc|model.h.c_fc", "intermediate_size", "hidden_size", bias=True)


def load(cls: type, arrays: dict[str, mx.array], made: LlamaConfig) -> object:
    source = Arrays(arrays)
    layout = plan(cls, made, source.headers)
    model = loading.build(layout, source)
    saved = dict(loading.tensors(model, layout))
    assert set(saved) == set(arrays) and all(mx.array_equal(saved[name], arrays[name]) for name in saved)
    return model


def packed(name: str, matrix: mx.array) -> dict[str, mx.array]:
    parts = mx.quantize(matrix, group_size=32, bits=4)
    return dict(zip((f"{name}.weight", f"{name}.scales", f"{name}.biases"), parts, strict=True))


def test_grouped_rows_by_hand() -> None:
    # Two groups of two heads, heads of one row: q0 q1 k0 v0 q2 q3 k1 v1.
    assert grouped_rows(8, 2, 2) == [0, 1, 4, 5, 2, 6, 3, 7]
    assert grouped_rows(6, 1, 1) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("quantised", [False, True])
def test_fused_qkv(heads: int, groups: int, quantised: bool) -> None:
    matrix, bias, x = rand((heads + 2 * groups) * HEAD, 64), rand((heads + 2 * groups) * HEAD), rand(2, 3, 64)
    arrays = packed("query_key_value", matrix) if quantised else {"query_key_value.weight": matrix}
    model = load(Fused, {**arrays, "query_key_value.bias": bias}, config(heads, groups))
    assert isinstance(model, Fused) and isinstance(model.qkv, QuantizedLinear if quantised else PlainLinear)
    if quantised:
        names = ("weight", "scales", "biases")
        matrix = mx.dequantize(*(arrays[f"query_key_value.{n}"] for n in names), group_size=32, bits=4)
    # The naive twin multiplies in the stored order and takes each group apart.
    stored = (x @ matrix.T + bias).reshape(2, 3, groups, heads // groups + 2, HEAD)
    q, k, v = stored[:, :, :, :-2], stored[:, :, :, -2], stored[:, :, :, -1]
    wanted = mx.concatenate([part.flatten(2) for part in (q, k, v)], axis=-1)
    assert mx.allclose(model.qkv(x), wanted, atol=1e-3)


def conv(model: object) -> Linear:
    assert isinstance(model, Turned)
    return model.c_fc


def test_conv1d_is_stored_the_other_way_round() -> None:
    matrix, bias, x = rand(64, 96), rand(96), rand(2, 64)
    found = conv(load(Turned, {"h.c_fc.weight": matrix, "h.c_fc.bias": bias}, config(4, 4)))
    assert mx.allclose(found(x), x @ matrix + bias, atol=1e-4)


@pytest.mark.parametrize("prefix", ["h", "model.h"])
def test_packed_conv1d_is_not_turned(prefix: str) -> None:
    arrays = packed(f"{prefix}.c_fc", rand(96, 64))
    matrix = mx.dequantize(*arrays.values(), group_size=32, bits=4)
    found = conv(load(Turned, {**arrays, f"{prefix}.c_fc.bias": rand(96)}, config(4, 4)))
    x = rand(2, 64)
    assert isinstance(found, QuantizedLinear) and mx.allclose(found(x), x @ matrix.T + rand(96), atol=1e-3)


def test_mlx_lm_writes_conv1d_turned() -> None:
    matrix, bias, x = rand(96, 64), rand(96), rand(2, 64)
    found = conv(load(Turned, {"model.h.c_fc.weight": matrix, "model.h.c_fc.bias": bias}, config(4, 4)))
    assert mx.allclose(found(x), x @ matrix.T + bias, atol=1e-4)


def test_the_wrong_way_round_is_refused() -> None:
    source = Arrays({"h.c_fc.weight": rand(96, 64), "h.c_fc.bias": rand(96)})
    with pytest.raises(WeightsError, match=r"wrong shape: h.c_fc.weight: expected \[64, 96\], found \[96, 64\]"):
        plan(Turned, config(4, 4), source.headers)
