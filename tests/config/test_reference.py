"""Published configs, also with keys left out or null, compared with what transformers makes of them.

tests/data/config_reference.json names the script that made it (scripts/fixtures/make_config_reference). The tiny
fixtures test the numbers of a forward pass; this file tests what they cannot: full sizes, the defaults, and every key
that a published config has.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from places import TESTS

from runner.config.rope import inverse_frequencies
from runner.families import find
from runner.nn.fast import RoPE
from runner.weights.plan import ModulePlan, Value, plan
from runner.weights.tree import leaf_shapes

CASES: dict[str, dict[str, Any]] = json.loads((TESTS / "data" / "config_reference.json").read_text(encoding="utf-8"))[
    "cases"
]

each_spelling = pytest.mark.parametrize("spelling", ["config", "saved"])
by_name = pytest.mark.parametrize("name", CASES)


def settings(module: ModulePlan) -> dict[str, Any]:
    """The arguments of a module that are neither tensors nor modules, by name."""
    return {name: item.value for name, item in module.fields.items() if isinstance(item, Value)}


def read(name: str, spelling: str) -> tuple[Any, ModulePlan, list[ModulePlan]]:
    """The config of a case, and the plans of its model and of the model's layers."""
    config_class, model_class = find(CASES[name][spelling])
    config = config_class.from_dict(CASES[name][spelling])
    whole = plan(model_class, config, None)
    layers = whole.fields["layers"]
    assert isinstance(layers, list)
    return config, whole, layers


def part(module: ModulePlan, name: str) -> ModulePlan:
    found = module.fields[name]
    assert isinstance(found, ModulePlan)
    return found


@each_spelling
@by_name
def test_tensors(name: str, spelling: str) -> None:
    """Names and shapes of the tensors outside the layers and in the first layer, and the number of all tensors."""
    _, whole, _ = read(name, spelling)
    shapes: dict[str, list[int]] = {}
    for array in whole.arrays():
        for leaf, shape in leaf_shapes(array.tree, array.sizes):
            shapes[leaf.name] = list(array.transform.stored_shape(shape))
    some = {key: shape for key, shape in shapes.items() if ".layers." not in key or ".layers.0." in key}
    assert some == CASES[name]["tensors"]
    assert len(shapes) == CASES[name]["count"]


@each_spelling
@by_name
def test_windows_and_settings(name: str, spelling: str) -> None:
    config, whole, layers = read(name, spelling)
    case = CASES[name]
    assert config.max_position_embeddings == case["max_position_embeddings"]
    assert [config.cache_window(i) for i in range(config.num_hidden_layers)] == case["windows"]
    for layer in layers:
        attend = settings(part(part(layer, "self_attn"), "attend"))
        assert attend["scale"] == pytest.approx(case["scale"], rel=1e-7)
        assert attend.get("softcap") == case["softcap"]
        assert settings(layer)["rms_norm_eps"] == settings(whole)["norm_eps"] == case["eps"]
        mlp = part(layer, "mlp")
        activation = settings(part(mlp, "glu"))["activation"] if "glu" in mlp.fields else "xielu"
        assert activation == case["activation"]


@each_spelling
@by_name
def test_rotary_frequencies(name: str, spelling: str) -> None:
    """The frequencies of each layer fit its type; a layer without RoPE rotates nothing."""
    config, _, layers = read(name, spelling)
    case = CASES[name]
    for index, layer in enumerate(layers):
        rope = RoPE(**settings(part(part(layer, "self_attn"), "rope")))
        if not case["rotates"][index]:
            assert rope.dims == 0
            continue
        kind = "full_attention" if case["windows"][index] is None else "sliding_attention"
        wanted = case["ropes"].get(kind) or case["ropes"]["all"]
        assert frequencies(rope, 0) == pytest.approx(wanted["inv_freq"], rel=1e-5)
        assert rope.factor == pytest.approx(wanted["factor"], rel=1e-6)
        if "long" in case["ropes"]:
            assert config.rope_depends_on_length
            wanted = case["ropes"]["long"]
            assert frequencies(rope, wanted["length"]) == pytest.approx(wanted["inv_freq"], rel=1e-5)


def frequencies(rope: RoPE, length: int) -> list[float]:
    if rope.scaling is None:
        return [rope.base ** (-2 * i / rope.dims) for i in range(rope.dims // 2)]
    limit = rope.max_position_embeddings
    return inverse_frequencies(
        rope.scaling, dims=rope.dims, base=rope.base, max_position_embeddings=limit, length=length
    )


@pytest.mark.parametrize("name", [name for name in CASES if name != "olmo3-no-layer-types"])
def test_both_spellings_give_one_object(name: str) -> None:
    """All cases but one: saving `olmo3-no-layer-types` writes out the original length that its config leaves out."""
    assert read(name, "config")[1].fields == read(name, "saved")[1].fields
