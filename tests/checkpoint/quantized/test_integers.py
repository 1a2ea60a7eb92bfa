"""GPTQ and AWQ: converted layers equal the format's definition number for number, and models compute with them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from places import TESTS
from published_reference import Case, awq, gptq, linears, write_model, write_plain
from published_source import opened, values
from sources import Arrays

from runner.checkpoint.directory import Checkpoint
from runner.checkpoint.quantized import as_mlx
from runner.engine.loaded import open_loaded
from runner.errors import ConfigError, RunnerError, WeightsError

SETTINGS = settings(max_examples=30, deadline=None, derandomize=True)
Build = Callable[[np.random.Generator, int, int], Case]


@SETTINGS
@given(
    st.integers(0, 99), st.sampled_from([2, 3, 4, 8]), st.integers(1, 3), st.integers(1, 5),
    st.sampled_from([32, 64, 128, -1]), st.booleans(), st.sampled_from(["gptq", "gptq_v2"]), st.booleans(),
)  # fmt: skip
def test_gptq_in_order_is_exact(
    seed: int, bits: int, rows: int, width: int, group_size: int, sym: bool, version: str, index: bool
) -> None:
    rng = np.random.default_rng(seed)
    case = gptq(
        rng, 32 * rows, 32 * width, bits=bits, group_size=group_size, sym=sym, version=version, index=index
    )  # fmt: skip
    config, source = opened(case)
    assert "quantization_config" not in config and config["quantization"]["bits"] == bits
    assert source.headers["a.scales"].dtype == ("F16" if sym else "F32")
    assert np.array_equal(values(config, source), case.numbers)


@SETTINGS
@given(st.integers(0, 99), st.integers(1, 3), st.integers(1, 5), st.sampled_from([32, 64, 128, -1]))
def test_awq_is_exact(seed: int, rows: int, width: int, group_size: int) -> None:
    case = awq(np.random.default_rng(seed), 8 * rows, 32 * width, group_size=group_size)
    config, source = opened(case)
    assert config["quantization"]["bits"] == 4
    assert np.array_equal(values(config, source), case.numbers)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sym", [False, True])
def test_activation_order_becomes_plain_numbers(bits: int, sym: bool) -> None:
    case = gptq(np.random.default_rng(bits), 32, 128, bits=bits, sym=sym, order=True)
    config, source = opened(case)
    assert "quantization" not in config
    assert source.headers["a.weight"].dtype == "F16"
    assert np.array_equal(values(config, source), case.numbers.astype(np.float16).astype(np.float32))


def test_groups_that_mlx_has_not_become_plain_numbers() -> None:
    for case in (
        gptq(np.random.default_rng(0), 32, 64, group_size=16),
        awq(np.random.default_rng(0), 8, 48, group_size=16),
    ):
        config, source = opened(case)
        assert "quantization" not in config
        assert np.array_equal(values(config, source), case.numbers.astype(np.float16).astype(np.float32))


def test_many_rows_are_unpacked_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runner.checkpoint.quantized.layers.CHUNK", 100)
    case = gptq(np.random.default_rng(0), 32, 64, order=True)
    assert np.array_equal(values(*opened(case)), case.numbers.astype(np.float16).astype(np.float32))


LLAMA: dict[str, Build] = {
    "gptq 4 bits": lambda rng, rows, width: gptq(rng, rows, width),
    "gptq 2 bits": lambda rng, rows, width: gptq(rng, rows, width, bits=2, sym=False),
    "gptq 8 bits v2": lambda rng, rows, width: gptq(rng, rows, width, bits=8, version="gptq_v2", sym=False),
    "gptq desc_act": lambda rng, rows, width: gptq(rng, rows, width, group_size=8, order=True),
    "awq": lambda rng, rows, width: awq(rng, rows, width),
}


@pytest.mark.parametrize("kind", LLAMA)
@pytest.mark.parametrize("fixture", ["fixtures/llama/llama-gqa", "fixtures/families/qwen3_moe-base"])
def test_a_model_computes_what_its_weights_mean(kind: str, fixture: str, tmp_path: Path) -> None:
    directory = TESTS / fixture
    rng = np.random.default_rng(1)
    cases = {name: LLAMA[kind](rng, *shape) for name, shape in linears(directory).items()}
    options = next(iter(cases.values())).options
    for case in cases.values():
        if kind == "gptq desc_act" or case.numbers.shape[1] % 32:  # plain numbers have the scales' precision
            case.numbers = case.numbers.astype(np.float16).astype(np.float32)
    model = open_loaded(write_model(tmp_path / "packed", directory, cases, options), dtype="float32")
    plain = open_loaded(write_plain(tmp_path / "plain", directory, cases), dtype="float32")
    ids = list(range(3, 40))
    wanted = np.array(plain.logits(ids))
    error = np.abs(np.array(model.logits(ids)) - wanted).max() / wanted.std()
    assert error < 1e-3
    assert (model.nbytes < plain.nbytes) or "desc" in kind


@pytest.mark.parametrize("fixture", ["fixtures/llama/llama-gqa", "fixtures/families/qwen2-base"])
def test_zero_biases_of_old_quantisers_are_left_out(fixture: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    directory = TESTS / fixture
    cases = {name: gptq(rng, *shape) for name, shape in linears(directory).items()}
    plain = open_loaded(write_plain(tmp_path / "plain", directory, cases), dtype="float32")
    options = next(iter(cases.values())).options
    stored = Checkpoint.open(directory).headers
    added = [name for name in cases if f"{name}.bias" not in stored]
    assert 0 < len(added) <= len(cases)
    for name in added:
        cases[name].tensors["bias"] = mx.zeros(cases[name].numbers.shape[0], mx.float16)
    model = open_loaded(write_model(tmp_path / "zero", directory, cases, options), dtype="float32")
    assert np.allclose(np.array(model.logits([5, 6])), np.array(plain.logits([5, 6])), atol=1e-3)
    cases[added[0]].tensors["bias"][0] = 1
    with pytest.raises(WeightsError, match=r"unused.*bias"):
        open_loaded(write_model(tmp_path / "one", directory, cases, options))


def test_zero_biases_that_the_family_has_stay(tmp_path: Path) -> None:
    directory = TESTS / "fixtures" / "llama" / "llama-attention-bias"
    cases = {name: gptq(np.random.default_rng(2), *shape) for name, shape in linears(directory).items()}
    for name, case in cases.items():
        if "self_attn" in name:
            case.tensors["bias"] = mx.zeros(case.numbers.shape[0], mx.float16)
    path = write_model(tmp_path / "zero", directory, cases, next(iter(cases.values())).options)
    assert open_loaded(path).logits([5, 6]).shape[0] == 2


def test_dynamic_gives_layers_their_own_bits() -> None:
    rng = np.random.default_rng(3)
    four, eight = gptq(rng, 32, 64), gptq(rng, 32, 64, bits=8, group_size=64)
    arrays = {f"a.{k}": v for k, v in four.tensors.items()} | {f"b.{k}": v for k, v in eight.tensors.items()}
    dynamic = {"-:c": {}, "+:b": {"bits": 8, "group_size": 64}}
    config, source = as_mlx({"quantization_config": {**four.options, "dynamic": dynamic}}, Arrays(arrays))
    assert config["quantization"] == {
        "bits": 4, "group_size": 32, "mode": "affine", "b": {"bits": 8, "group_size": 64, "mode": "affine"}
    }  # fmt: skip
    parts = [source.read(f"b.{name}") for name in ("weight", "scales", "biases")]
    found = mx.dequantize(parts[0], *(part.astype(mx.float32) for part in parts[1:]), group_size=64, bits=8)
    assert np.array_equal(np.array(found), eight.numbers)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"bits": 5}, "bits = 5"),
    ({"bits": True}, "bits = True"),
    ({"bits": None}, "bits = None"),
    ({"group_size": 0}, "group_size = 0"),
    ({"group_size": "128"}, "group_size = '128'"),
    ({"checkpoint_format": "marlin"}, "checkpoint_format = 'marlin'"),
    ({"pack_dtype": "int16"}, "pack_dtype = 'int16'"),
    ({"sym": "yes"}, "sym = 'yes'"),
    ({"is_marlin_format": True}, "is_marlin_format"),
    ({"rotation": "hadamard"}, "rotation"),
    ({"dynamic": {"+:x": {"bits": 7}}}, "dynamic"),
    ({"dynamic": {"+:x": {"wings": 2}}}, "wings"),
    ({"dynamic": 3}, "dynamic"),
    ({"format": "gptq_v2"}, "disagree"),
]


@pytest.mark.parametrize("change, message", REFUSED)
def test_gptq_options_that_are_not_supported_are_named(change: dict[str, Any], message: str) -> None:
    case = gptq(np.random.default_rng(0), 32, 32)
    with pytest.raises(ConfigError, match=message):
        opened(case, {**case.options, **change})


@pytest.mark.parametrize(
    "change, message",
    [
        ({"version": "gemv"}, "gemv"), ({"version": "marlin"}, "marlin"), ({"bits": 8}, "bits = 8"),
        ({"zero_point": False}, "zero_point"), ({"backend": "llm-awq"}, "llm-awq"),
        ({"modules_to_not_convert": "gate"}, "modules_to_not_convert"), ({"wings": 2}, "wings"),
    ],
)  # fmt: skip
def test_awq_options_that_are_not_supported_are_named(change: dict[str, Any], message: str) -> None:
    case = awq(np.random.default_rng(0), 8, 32)
    with pytest.raises(ConfigError, match=message):
        opened(case, {**case.options, **change})


@pytest.mark.parametrize("method", ["bitsandbytes", "hqq", "quanto", "torchao", "aqlm", "bitnet", "quark", "", 3, None])
def test_other_methods_are_refused_with_those_that_are_read(method: object) -> None:
    case = gptq(np.random.default_rng(0), 32, 32)
    with pytest.raises(ConfigError, match=r"quant_method .*gptq, awq"):
        opened(case, {"quant_method": method})


def damages(rng: np.random.Generator) -> dict[str, Case]:
    """Layers of which one tensor is not as it should be."""

    def changed(name: str, array: mx.array | None, **kind: Any) -> Case:
        case = gptq(rng, 32, 64, **kind)
        case.tensors.pop(name)
        if array is not None:
            case.tensors[name] = array
        return case

    return {
        "no zeros": changed("qzeros", None),
        "no scales": changed("scales", None),
        "float words": changed("qweight", mx.zeros((8, 32))),
        "words of rank 1": changed("qweight", mx.zeros(8, mx.int32)),
        "no words": changed("qweight", mx.zeros((0, 32), mx.int32)),
        "too few words": changed("qweight", mx.zeros((7, 32), mx.int32)),
        "too few zeros": changed("qzeros", mx.zeros((1, 4), mx.int32)),
        "integer scales": changed("scales", mx.zeros((2, 32), mx.int32)),
        "too many groups": changed("scales", mx.zeros((3, 32), mx.float16)),
        "a group beyond": changed("g_idx", mx.full(64, 2, mx.int32)),
        "a group below": changed("g_idx", mx.full(64, -1, mx.int32)),
        "short index": changed("g_idx", mx.zeros(32, mx.int32)),
        "infinite scales": changed("scales", mx.full((2, 32), mx.inf, mx.float16)),
        "scales that overflow": changed("scales", mx.full((2, 32), 60000, mx.float16)),
        "scales that overflow, in order": changed("scales", mx.full((2, 32), 60000, mx.float16), order=True),
        "not symmetric": changed("qzeros", mx.zeros((2, 4), mx.int32)),
    }


@pytest.mark.parametrize("name", damages(np.random.default_rng(0)))
def test_damaged_layers_are_refused(name: str) -> None:
    case = damages(np.random.default_rng(0))[name]
    with pytest.raises(RunnerError, match=r"\ba\b"):
        values(*opened(case))


def test_a_layer_that_is_there_twice_is_refused() -> None:
    case = gptq(np.random.default_rng(0), 32, 64)
    case.tensors["weight"] = mx.zeros((32, 64))
    with pytest.raises(WeightsError, match="both"):
        opened(case)


def test_where_one_expert_is_plain_all_are() -> None:
    rng = np.random.default_rng(0)
    kinds = {"l.experts.0.up": False, "l.experts.1.up": True, "l.other": False}
    cases = {name: gptq(rng, 32, 64, order=order) for name, order in kinds.items()}
    arrays = {f"{name}.{k}": v for name, case in cases.items() for k, v in case.tensors.items()}
    config, source = as_mlx({"quantization_config": cases["l.other"].options}, Arrays(arrays))
    assert config["quantization"]["l.experts.0.up"] is False and "l.other.scales" in source.headers
    found = np.array(source.read("l.experts.0.up.weight").astype(mx.float32))
    assert np.array_equal(found, cases["l.experts.0.up"].numbers.astype(np.float16).astype(np.float32))
