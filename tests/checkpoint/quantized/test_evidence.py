"""Tensors decide how a checkpoint is read: names of methods that outlived them, static scales, unknown methods."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from places import TESTS
from published_reference import Case, bfloat16, ct_float8, ct_integers, float8, linears, write_model, write_plain
from published_source import Layers, opened, values
from sources import Info

import runner
from runner.checkpoint.quantized import as_mlx
from runner.checkpoint.quantized.floats import E5M2
from runner.errors import ConfigError, RunnerError, WeightsError
from runner.inspect_model import inspect

FIXTURE = TESTS / "fixtures" / "llama" / "llama-gqa"
METHODS = (
    "gptq", "awq", "fp8", "compressed-tensors", "mxfp4", "bitsandbytes", "hqq", "quanto", "torchao", "fbgemm_fp8",
    "modelopt", "quark", "aqlm", "", None, 3,
)  # fmt: skip


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def static(**kind: Any) -> Case:
    """A float8 layer with one scale for its matrix, and scales for its input and the cache."""
    case = ct_float8(rng(), 32, 64, strategy="tensor", **kind)
    scale = mx.array(0.5)
    case.tensors |= {"input_scale": scale, "output_scale": scale, "k_scale": scale, "v_scale": scale.reshape(1)}
    return case


def model(tmp_path: Path, cases: Mapping[str, Case], options: Mapping[str, Any]) -> Path:
    """The fixture with these layers, and its tokenizer."""
    path = write_model(tmp_path / "model", FIXTURE, cases, options)
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(FIXTURE / file, path / file)
    return path


KV = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False}
STATIC: dict[str, dict[str, Any]] = {
    "autofp8": {
        "quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"], "kv_cache_scheme": "static"
    },
    "compressed-tensors": {
        **static().options, "kv_cache_scheme": KV,
        "config_groups": {"group_0": {**static().options["config_groups"]["group_0"], "input_activations": KV}},
    },
    "modelopt": {
        "quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_scheme": {"type": "float", "num_bits": 8},
        "producer": {"name": "modelopt", "version": "0.39.0"}, "ignore": ["lm_head"],
    },
    "fbgemm_fp8": {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0, "modules_to_not_convert": ["lm_head"]},
    "quark": {"quant_method": "quark", "export": {"kv_cache_group": []}, "quant_mode": "eager_mode"},
    "a method of tomorrow": {"quant_method": "fp8_of_tomorrow", "wings": 2},
    "an old method's name": {"quant_method": "awq", "bits": 4, "version": "gemm"},
    "none": {},
}  # fmt: skip


@pytest.mark.parametrize("name", STATIC)
def test_static_scales_of_activations_and_caches_stay_unread_and_are_named(name: str, tmp_path: Path) -> None:
    cases = {layer: static_of(shape) for layer, shape in linears(FIXTURE).items()}
    path = model(tmp_path, cases, STATIC[name])
    report = inspect(path)
    scales = ("input_scale", "output_scale", "k_scale", "v_scale")
    assert set(report.ignored) == {f"{layer}.{scale}" for layer in cases for scale in scales}
    for case in cases.values():
        case.numbers = bfloat16(case.numbers)
    plain = write_plain(tmp_path / "plain", FIXTURE, cases)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(FIXTURE / file, plain / file)
    wanted = np.array(runner.load(plain, dtype="float32").logits([5, 6, 7]))
    found = np.array(runner.load(path, dtype="float32").logits([5, 6, 7]))
    assert np.abs(found - wanted).max() < 1e-5 * wanted.std()


def static_of(shape: tuple[int, int]) -> Case:
    case = float8(rng(), *shape, block=shape, name="weight_scale")
    case.tensors["weight_scale"] = case.tensors["weight_scale"].reshape(())
    scale = mx.array(0.5)
    return Case({**case.tensors, "input_scale": scale, "output_scale": scale, "k_scale": scale, "v_scale": scale},
                case.numbers)  # fmt: skip


SHAPES = {
    "one": ((32, 64), ()), "one in a list": ((32, 64), (1,)), "one in a matrix": ((32, 64), (1, 1)),
    "channels": ((1, 64), (32,)), "channels in a column": ((1, 64), (32, 1)), "groups": ((1, 16), (32, 4)),
    "blocks": ((16, 16), (2, 4)), "blocks of modelopt": ((16, 16), (2, 1, 4, 1)),
}  # fmt: skip


@pytest.mark.parametrize("scales", SHAPES)
@pytest.mark.parametrize("name", ["weight_scale", "weight_scale_inv"])
@pytest.mark.parametrize("method", ["modelopt", "fp8", None])
def test_the_shape_of_scales_says_what_they_are_for(scales: str, name: str, method: str | None) -> None:
    block, shape = SHAPES[scales]
    case = float8(rng(), 32, 64, block=block, name=name)
    case.tensors[name] = case.tensors[name].reshape(shape)
    config, source = opened(case, {"quant_method": method} if method else {})
    assert np.array_equal(values(config, source), bfloat16(case.numbers))


def test_blocks_that_are_cut_short_are_those_of_published_models_or_of_the_config() -> None:
    case = float8(rng(), 130, 200, block=(128, 128))
    assert np.array_equal(values(*opened(case, {"quant_method": "x"})), bfloat16(case.numbers))
    case = float8(rng(), 31, 64, block=(16, 16))
    with pytest.raises(WeightsError, match=r"a\.weight_scale_inv is \[2, 4\].*weight_block_size"):
        opened(case, {"quant_method": "x"})
    config, source = opened(case, {"quant_method": "x", "weight_block_size": [16, 16]})
    assert np.array_equal(values(config, source), bfloat16(case.numbers))


def test_e5m2_has_numbers_too() -> None:
    # ml_dtypes 0.5: np.array([0x00, 0x01, 0x3c, 0x3d, 0x7b, 0xbc], "uint8").view(ml_dtypes.float8_e5m2)
    assert E5M2[[0x00, 0x01, 0x3C, 0x3D, 0x7B, 0xBC]].tolist() == [0.0, 2.0**-16, 1.0, 1.25, 57344.0, -1.0]
    case = float8(rng(), 8, 16, block=(8, 16), name="weight_scale")
    case.tensors["weight"] = mx.array(np.tile(np.array([0x3C, 0xBD, 0x01, 0x7B], np.uint8), (8, 4)))
    source = Layers({"a": case})
    source.headers["a.weight"] = Info("F8_E5M2", (8, 16), 128)
    factor = np.float32(np.array(case.tensors["weight_scale"]).reshape(()))
    row = np.tile(np.float32([1, -1.25, 2.0**-16, 57344]), 4) * factor
    assert np.array_equal(values(*as_mlx({}, source)), bfloat16(np.tile(row, (8, 1))))


@pytest.mark.parametrize("method", METHODS)
def test_a_method_that_outlived_its_tensors_changes_nothing(method: object, tmp_path: Path) -> None:
    options = {"quant_method": method, "bits": 4, "wings": 2, "kv_cache_scheme": KV}
    path = model(tmp_path, {}, options)
    wanted = np.array(runner.load(FIXTURE).logits([5, 6, 7]))
    assert np.array_equal(np.array(runner.load(path).logits([5, 6, 7])), wanted)
    assert inspect(path).ignored == ()


@pytest.mark.parametrize("method", ["fp8", "awq", "hqq"])
def test_a_method_that_outlived_mlx_packing_changes_nothing(method: str, tmp_path: Path) -> None:
    fixture = TESTS / "fixtures" / "llama" / "llama-mlx-4bit"
    path = write_model(tmp_path / "model", fixture, {}, {"quant_method": method})
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(fixture / file, path / file)
    wanted = np.array(runner.load(fixture).logits([5, 6, 7]))
    assert np.array_equal(np.array(runner.load(path).logits([5, 6, 7])), wanted)


def test_groups_of_activations_alone_need_no_weights() -> None:
    case = ct_integers(rng(), 8, 64)
    kv = {"targets": ["re:.*proj"], "weights": None, "input_activations": KV}
    options = {**case.options, "config_groups": {"kv": kv, **case.options["config_groups"]}}
    assert np.array_equal(values(*opened(case, options)), case.numbers)


PACKED: dict[str, dict[str, mx.array]] = {
    "bitsandbytes": {"weight": mx.zeros((512, 1), mx.uint8), "weight.absmax": mx.zeros(16)},
    "hqq": {"W_q": mx.zeros((16, 64), mx.uint8), "scale": mx.zeros((32, 1))},
    "quanto": {"weight._data": mx.zeros((32, 64), mx.int8), "weight._scale": mx.ones((32, 1))},
    "modelopt": {"weight": mx.zeros((32, 32), mx.uint8), "weight_scale_2": mx.ones(())},
    "aqlm": {"codes": mx.zeros((4, 8, 1), mx.int8), "codebooks": mx.zeros((1, 256, 1, 8))},
}


@pytest.mark.parametrize("method", PACKED)
@pytest.mark.parametrize("beside", [False, True])
def test_tensors_that_only_a_method_explains_are_refused_by_name(method: str, beside: bool) -> None:
    source = Layers({"a": Case(PACKED[method], np.zeros(())), **({"b": static()} if beside else {})})
    if method == "modelopt":  # its bytes are named as float8 is
        source.headers["a.weight"] = Info("U8", (32, 32), 1024)
    elif method == "bitsandbytes":
        source.headers["a.weight"] = Info("U8", (512, 1), 512)
    with pytest.raises(ConfigError, match=rf"quant_method '{method}' is not supported.*'a\."):
        as_mlx({"quantization_config": {"quant_method": method}}, source)


def test_a_scale_that_changes_numbers_is_not_taken_for_an_activations(tmp_path: Path) -> None:
    layer, shape = next(iter(linears(FIXTURE).items()))
    case = static_of(shape)
    case.tensors["pre_quant_scale"] = mx.ones(shape[1])
    with pytest.raises(RunnerError, match=r"unused.*pre_quant_scale"):
        inspect(model(tmp_path, {layer: case}, {"quant_method": "modelopt"}))
