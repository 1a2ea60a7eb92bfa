"""The planner on small made-up models: names, joins, stacks, parts, transforms, and all problems in one message."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import pytest
from sources import Arrays

from runner.config.base import Config
from runner.errors import WeightsError
from runner.nn.fast import RMSNorm
from runner.nn.linear import Embedding, JoinedLinear, Linear, QuantizedLinear
from runner.weights import loading
from runner.weights.plan import count_parameters, plan
from runner.weights.tags import weight
from runner.weights.transforms import PLUS_ONE, TRANSPOSE, permute_rows

D, E = "hidden_size", "vocab_size"
CONFIG = Config(model_type="t", vocab_size=3, hidden_size=64, num_hidden_layers=2, num_attention_heads=2)


def rand(*shape: int) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(sum(shape)))


def load(cls: type, arrays: dict[str, mx.array], config: Config = CONFIG) -> object:
    source = Arrays(arrays)
    layout = plan(cls, config, source.headers)
    assert source.reads == []
    model = loading.build(layout, source)
    saved = dict(loading.tensors(model, layout))
    assert set(saved) == set(arrays) and all(mx.array_equal(saved[k], arrays[k]) for k in saved)
    return model


@dataclass
class Fused:
    qkv: Linear = weight("attn.{q,k,v}_proj", (64, 32, 32), D)


@dataclass
class Stacked:
    experts: mx.array = weight("experts.{vocab_size}.w1.weight", 8, D)


@dataclass
class Split:
    a: mx.array = weight("ab.weight", 5, D, part=(0, (5, 3)))
    b: mx.array = weight("ab.weight", 3, D, part=(1, (5, 3)))


@dataclass
class Changed:
    plus: mx.array = weight("norm.weight", D, transform=PLUS_ONE)
    turned: mx.array = weight("conv.weight", 8, D, transform=TRANSPOSE)
    mixed: mx.array = weight("rows.weight", 4, D, transform=permute_rows("odd", lambda n: [1, 0, 3, 2][:n]))


@dataclass
class Block:
    norm: RMSNorm = weight("norm", D)


@dataclass
class Tied:
    embed: Embedding = weight("embed", E, D)
    layers: list[Block] = weight("layers", length="num_hidden_layers")
    head: Linear = weight("head||embed", E, D, otherwise="tie_word_embeddings")
    extra: RMSNorm | None = weight("extra", D, optional=True)


def packed(name: str, rows: int, bits: int = 4) -> dict[str, mx.array]:
    parts = mx.quantize(rand(rows, 64), group_size=32, bits=bits)
    return dict(zip((f"{name}.weight", f"{name}.scales", f"{name}.biases"), parts, strict=True))


def test_fused_parts_are_joined_in_order() -> None:
    arrays = {
        f"attn.{n}_proj.weight": rand(rows, 64) + i for i, (n, rows) in enumerate((("q", 64), ("k", 32), ("v", 32)))
    }
    model = load(Fused, arrays)
    assert isinstance(model, Fused)
    x = rand(2, 64)
    assert mx.allclose(model.qkv(x), x @ mx.concatenate(list(arrays.values())).T, atol=1e-4)


def test_fused_parts_may_be_quantised_alike() -> None:
    arrays = {**packed("attn.q_proj", 64), **packed("attn.k_proj", 32), **packed("attn.v_proj", 32)}
    model = load(Fused, arrays)
    assert isinstance(model, Fused) and isinstance(model.qkv, QuantizedLinear)
    assert model.qkv.weight.shape == (128, 8) and (model.qkv.bits, model.qkv.group_size) == (4, 32)


def test_fused_parts_may_be_quantised_differently() -> None:
    arrays = {**packed("attn.q_proj", 64), **packed("attn.k_proj", 32, 8), "attn.v_proj.weight": rand(32, 64)}
    model = load(Fused, arrays)
    assert isinstance(model, Fused) and isinstance(model.qkv, JoinedLinear)
    x = rand(2, 64)
    wanted = [
        mx.dequantize(*(arrays[f"attn.{n}_proj.{s}"] for s in ("weight", "scales", "biases")), group_size=32, bits=b)
        for n, b in (("q", 4), ("k", 8))
    ]
    assert mx.allclose(model.qkv(x), x @ mx.concatenate([*wanted, arrays["attn.v_proj.weight"]]).T, atol=1e-3)


def test_stacked_split_and_transformed_fields() -> None:
    stacked = load(Stacked, {f"experts.{i}.w1.weight": rand(8, 64) + i for i in range(3)})
    assert isinstance(stacked, Stacked) and stacked.experts.shape == (3, 8, 64)
    whole = rand(8, 64)
    split = load(Split, {"ab.weight": whole})
    assert isinstance(split, Split) and mx.array_equal(mx.concatenate([split.a, split.b]), whole)
    arrays = {"norm.weight": mx.ones(64), "conv.weight": rand(64, 8), "rows.weight": rand(4, 64)}
    changed = load(Changed, arrays)
    assert isinstance(changed, Changed) and changed.turned.shape == (8, 64)
    assert mx.array_equal(changed.plus, mx.full(64, 2.0))
    assert mx.array_equal(changed.mixed[0], arrays["rows.weight"][1])


def tied_arrays() -> dict[str, mx.array]:
    return {"embed.weight": rand(3, 64), "layers.0.norm.weight": rand(64), "layers.1.norm.weight": rand(64) * 2}


def test_a_tied_head_shares_the_embedding() -> None:
    tied = Config(**{**vars(CONFIG), "tie_word_embeddings": True})
    model = load(Tied, tied_arrays(), tied)
    assert isinstance(model, Tied) and model.extra is None
    found = dict(loading.arrays(model))
    assert found["embed.weight"] is found["head.weight"]
    assert loading.nbytes(model) == (3 * 64 + 2 * 64) * 4


@dataclass
class Renamed:
    embed: Embedding = weight("embed|model.embed", E, D)
    head: Linear = weight("head|model.head||embed|model.embed", E, D, otherwise="tie_word_embeddings")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("prefix", ["", "model."])
def test_alternatives_behind_two_bars_need_the_flag(tied: bool, prefix: str) -> None:
    config = Config(**{**vars(CONFIG), "tie_word_embeddings": tied})
    arrays = {f"{prefix}embed.weight": rand(3, 64), f"{prefix}head.weight": rand(3, 64) + 1}
    model = load(Renamed, arrays, config)
    assert isinstance(model, Renamed) and mx.array_equal(model.head(mx.eye(64)).T, arrays[f"{prefix}head.weight"])
    del arrays[f"{prefix}head.weight"]
    if tied:
        found = dict(loading.arrays(load(Renamed, arrays, config)))
        assert found["embed.weight"] is found["head.weight"]
    else:
        with pytest.raises(WeightsError, match=r"missing: head.weight: expected \[3, 64\]"):
            plan(Renamed, config, Arrays(arrays).headers)
    assert count_parameters(plan(Renamed, config, None)) == (1 if tied else 2) * 3 * 64


@pytest.mark.parametrize(("cls", "name"), [(Tied, "num_hidden_layers"), (Stacked, "vocab_size")])
def test_more_layers_or_experts_than_tensors_are_refused_at_once(cls: type, name: str) -> None:
    config = Config(**{**vars(CONFIG), name: 1 << 24})
    with pytest.raises(
        WeightsError, match=f"config.json says {name} = 16777216, but the checkpoint has only 1 tensors"
    ):
        plan(cls, config, Arrays({"embed.weight": rand(3, 64)}).headers)


def test_every_problem_is_named_at_once_before_reading() -> None:
    arrays = tied_arrays()
    arrays["layers.0.nrom.weight"] = arrays.pop("layers.0.norm.weight")
    arrays["layers.1.norm.weight"] = rand(63)
    arrays["embed.weight"] = mx.zeros((3, 64), dtype=mx.int32)
    arrays["rotary_emb.inv_freq"] = rand(4)
    source = Arrays(arrays)
    with pytest.raises(WeightsError) as caught:
        plan(Tied, CONFIG, source.headers)
    text = str(caught.value)
    assert "missing: layers.0.norm.weight: expected [64]; nearest name here: layers.0.nrom.weight" in text
    assert "unused: layers.0.nrom.weight" in text
    assert "wrong shape: layers.1.norm.weight: expected [64], found [63]" in text
    assert "wrong dtype: embed.weight" in text and "found I32" in text
    assert "missing: head.weight: expected [3, 64]" in text
    assert "inv_freq" not in text and source.reads == []


@dataclass
class Named:
    norm: RMSNorm = weight("{model_type}.norm", D)


def test_a_word_of_the_config_stands_in_a_name() -> None:
    """Where tensors are found, and where one is reported missing."""
    load(Named, {"t.norm.weight": rand(64)})
    with pytest.raises(WeightsError, match=r"t\.norm\.weight"):
        plan(Named, CONFIG, Arrays({"u.norm.weight": rand(64)}).headers)
