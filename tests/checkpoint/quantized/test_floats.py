"""FP8 and compressed-tensors: layers equal the format's definition, exactly where quantized, rounded where plain."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from places import TESTS
from published_reference import (
    Case,
    bfloat16,
    ct_float4,
    ct_float8,
    ct_integers,
    e2m1,
    e4m3,
    fp8,
    linears,
    write_model,
    write_plain,
)
from published_source import Layers, opened, values

from runner.checkpoint.quantized import as_mlx
from runner.checkpoint.quantized.floats import E2M1, E4M3
from runner.engine.loaded import open_loaded
from runner.errors import ConfigError, RunnerError, WeightsError

SETTINGS = settings(max_examples=25, deadline=None, derandomize=True)
Build = Callable[[np.random.Generator, int, int], Case]
BLOCKS = st.sampled_from([(16, 16), (32, 32), (128, 128), (1, 32), (40, 64)])


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_the_tables_are_those_of_the_specification() -> None:
    assert all(np.isnan(E4M3[code]) if code & 127 == 127 else E4M3[code] == e4m3(code) for code in range(256))
    assert [float(x) for x in E2M1] == [e2m1(code) for code in range(16)]
    assert np.array_equal(E4M3, np.array(mx.from_fp8(mx.arange(256).astype(mx.uint8), mx.float32)), equal_nan=True)


@SETTINGS
@given(st.integers(0, 99), st.integers(1, 50), st.integers(1, 90), BLOCKS, st.sampled_from(["float32", "bfloat16"]))
def test_block_fp8_is_rounded_once(seed: int, rows: int, width: int, block: tuple[int, int], dtype: str) -> None:
    case = fp8(rng(seed), rows, width, block=block, dtype=getattr(mx, dtype))
    config, source = opened(case)
    assert "quantization" not in config and source.headers["a.weight"].dtype == "BF16"
    assert np.array_equal(values(config, source), bfloat16(case.numbers))


@SETTINGS
@given(st.integers(0, 99), st.integers(1, 50), st.integers(1, 5), st.booleans())
def test_fp8_under_powers_of_two_is_mxfp8_exactly(seed: int, rows: int, width: int, stored_as_bytes: bool) -> None:
    dtype = mx.uint8 if stored_as_bytes else mx.float32
    case = fp8(rng(seed), rows, 32 * width, block=(128, 128), powers=True, dtype=dtype)
    config, source = opened(case)
    assert config["quantization"]["mode"] == "mxfp8"
    assert np.array_equal(values(config, source), case.numbers)


def test_fp8_without_powers_of_two_is_plain_whatever_the_config_says() -> None:
    case = fp8(rng(), 32, 64)
    config, source = opened(case, {**case.options, "scale_fmt": "ue8m0"})
    assert "quantization" not in config
    assert np.array_equal(values(config, source), bfloat16(case.numbers))


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("name", ["weight_scale", "weight_scale_inv"])
def test_fp8_with_one_scale_for_a_matrix(shape: tuple[int, ...], name: str) -> None:
    case = fp8(rng(), 8, 24, block=(8, 24), name=name)
    case.tensors[name] = case.tensors[name].reshape(shape)
    found = values(*opened(case, {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": None}))
    assert np.array_equal(found, bfloat16(case.numbers))


def test_fp8_with_a_scale_for_each_output() -> None:
    case = fp8(rng(), 8, 24, block=(1, 24), name="weight_scale")
    found = values(*opened(case, {"quant_method": "fp8"}))
    assert np.array_equal(found, bfloat16(case.numbers))


@SETTINGS
@given(
    st.integers(0, 99), st.integers(1, 9), st.integers(1, 4), st.sampled_from([4, 8]), st.booleans(),
    st.sampled_from([32, 64, 128, None]), st.booleans(), st.sampled_from(["bfloat16", "float16"]),
)  # fmt: skip
def test_compressed_integers_are_exact(
    seed: int, rows: int, width: int, bits: int, symmetric: bool, group_size: int | None, pack: bool, dtype: str
) -> None:
    form = {"symmetric": symmetric, "group_size": group_size, "dtype": getattr(mx, dtype)}
    case = ct_integers(rng(seed), rows, 32 * width, bits=bits if pack else 8, pack=pack, **form)
    config, source = opened(case)
    assert config["quantization"]["bits"] == (bits if pack else 8)
    scale = {"bfloat16": "BF16", "float16": "F16"}[dtype]
    assert source.headers["a.scales"].dtype == (scale if symmetric else "F32")
    assert np.array_equal(values(config, source), case.numbers)


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
def test_compressed_integers_that_mlx_has_no_groups_for(pack: bool, symmetric: bool) -> None:
    for width, group_size, order in ((48, 16, False), (64, 32, True), (50, None, False)):
        kind = {"symmetric": symmetric, "group_size": group_size, "order": order}
        case = ct_integers(rng(), 5, width, bits=8, pack=pack, **kind)
        config, source = opened(case)
        assert "quantization" not in config
        assert np.array_equal(values(config, source), bfloat16(case.numbers))


def test_an_order_that_was_never_filled_in_is_none() -> None:
    case = ct_integers(rng(), 8, 64)
    case.tensors["weight_g_idx"] = mx.full(64, -1, mx.int32)
    config, source = opened(case)
    assert config["quantization"]["bits"] == 4 and np.array_equal(values(config, source), case.numbers)


def test_float32_scales_with_zero_points_are_not_packed() -> None:
    case = ct_integers(rng(), 8, 64, symmetric=False, dtype=mx.float32)
    config, source = opened(case)
    assert "quantization" not in config and np.array_equal(values(config, source), case.numbers)


@pytest.mark.parametrize("strategy", ["tensor", "channel", "block", "group"])
@pytest.mark.parametrize("shape", [(32, 64), (33, 70), (1, 16)])
def test_compressed_float8_is_rounded_once(strategy: str, shape: tuple[int, int]) -> None:
    case = ct_float8(rng(), *shape, strategy=strategy)
    config, source = opened(case)
    assert "quantization" not in config
    assert np.array_equal(values(config, source), bfloat16(case.numbers))


def test_compressed_mxfp8_is_exact() -> None:
    case = ct_float8(rng(), 24, 96, strategy="mx")
    config, source = opened(case)
    assert config["quantization"] == {"bits": 8, "group_size": 32, "mode": "mxfp8"}
    assert np.array_equal(values(config, source), case.numbers)


@pytest.mark.parametrize("overall", [1.0, 2.0, 0.5, 0.125, 64.0, 256.0])
@pytest.mark.parametrize("shape", [(1, 32), (7, 64), (8, 160)])
def test_nvfp4_takes_in_powers_of_two(overall: float, shape: tuple[int, int]) -> None:
    case = ct_float4(rng(), *shape, overall=overall)
    config, source = opened(case)
    assert config["quantization"] == {"bits": 4, "group_size": 16, "mode": "nvfp4"}
    assert np.array_equal(values(config, source), case.numbers)


@pytest.mark.parametrize("overall", [1000.0, 3.0, 1024.0, 2.0**-12, 2.0**30, 1e-3])
def test_nvfp4_is_plain_under_other_global_scales(overall: float) -> None:
    case = ct_float4(rng(), 8, 64, overall=overall)
    config, source = opened(case)
    assert "quantization" not in config
    assert np.array_equal(values(config, source), bfloat16(case.numbers))


def test_nvfp4_with_half_a_word_is_plain() -> None:
    case = ct_float4(rng(), 8, 48, overall=1.0)
    config, source = opened(case)
    assert "quantization" not in config and np.array_equal(values(config, source), bfloat16(case.numbers))


def test_mxfp4_is_exact() -> None:
    case = ct_float4(rng(), 8, 96, overall=None)
    config, source = opened(case)
    assert config["quantization"] == {"bits": 4, "group_size": 32, "mode": "mxfp4"}
    assert np.array_equal(values(config, source), case.numbers)


def test_groups_of_different_formats_find_their_layers() -> None:
    cases = {"a": ct_integers(rng(), 8, 64), "b": ct_float8(rng(1), 8, 64), "c": ct_integers(rng(2), 8, 64, bits=8)}
    options = copy.deepcopy(cases["a"].options)
    options["config_groups"] |= {n: cases[n].options["config_groups"]["group_0"] for n in ("b", "c")}
    options["format"] = "mixed-precision"
    config, source = as_mlx({"compression_config": options}, Layers(cases))
    assert set(config) == {"quantization"}
    assert np.array_equal(values(config, source, "a"), cases["a"].numbers)
    assert np.array_equal(values(config, source, "b"), bfloat16(cases["b"].numbers))
    assert np.array_equal(values(config, source, "c"), cases["c"].numbers)


MODELS: dict[str, Build] = {
    "fp8": fp8,
    "fp8 ue8m0": lambda g, rows, width: fp8(g, rows, width, powers=True, block=(32, 32)),
    "pack-quantized 4 bits": ct_integers,
    "pack-quantized 8 bits": lambda g, rows, width: ct_integers(g, rows, width, bits=8, symmetric=False),
    "int-quantized": lambda g, rows, width: ct_integers(g, rows, width, bits=8, pack=False, group_size=None),
    "float-quantized": ct_float8,
    "mxfp8-quantized": lambda g, rows, width: ct_float8(g, rows, width, strategy="mx"),
    "nvfp4-pack-quantized": ct_float4,
    "nvfp4-pack-quantized, folded": lambda g, rows, width: ct_float4(g, rows, width, overall=256.0),
    "mxfp4-pack-quantized": lambda g, rows, width: ct_float4(g, rows, width, overall=None),
}
ROUNDED = ("fp8", "float-quantized", "nvfp4-pack-quantized")


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("fixture", ["fixtures/llama/llama-gqa", "fixtures/families/qwen3_moe-base"])
def test_a_model_computes_what_its_weights_mean(kind: str, fixture: str, tmp_path: Path) -> None:
    generator = rng(1)
    shapes = {n: shape for n, shape in linears(TESTS / fixture).items() if "mxfp" not in kind or shape[1] % 32 == 0}
    cases = {name: MODELS[kind](generator, *shape) for name, shape in shapes.items()}
    options = next(iter(cases.values())).options
    model = open_loaded(write_model(tmp_path / "packed", TESTS / fixture, cases, options), dtype="float32")
    for case in cases.values():
        if kind in ROUNDED or case.numbers.shape[1] % 32:
            case.numbers = bfloat16(case.numbers)
    plain = open_loaded(write_plain(tmp_path / "plain", TESTS / fixture, cases), dtype="float32")
    wanted = np.array(plain.logits(range(3, 40)))
    error = np.abs(np.array(model.logits(range(3, 40))) - wanted).max() / wanted.std()
    assert error < 1e-3
    assert (model.nbytes < 0.8 * plain.nbytes) == (kind not in ROUNDED)


def changed(options: dict[str, Any], path: str, value: object) -> dict[str, Any]:
    """A copy of `options` with one value changed, whose path is given as keys with slashes between them."""
    result = copy.deepcopy(options)
    inner = result
    *above, last = path.split("/")
    for name in above:
        inner = inner[name]
    inner[last] = value
    return result


G = "config_groups/group_0"


@pytest.mark.parametrize(
    "path, value",
    [
        ("format", "dense"), ("format", "marlin-24"), ("format", 3), ("quantization_status", "initialized"),
        ("sparsity_config", {"format": "sparse-24-bitmask"}),
        ("sparsity_config", {"format": "dense", "wings": 2}), ("transform_config", {"config_groups": {"u": {}}}),
        ("moe_sparsity_config", {"a": 1}), ("wings", 2), ("ignore", "lm_head"), ("config_groups", {}),
        ("config_groups", [1]), (G, ["Linear"]), (f"{G}/format", "dense"), (f"{G}/wings", 2),
        (f"{G}/targets", [3]),
        (f"{G}/weights", None), (f"{G}/weights/num_bits", 3), (f"{G}/weights/num_bits", "4"),
        (f"{G}/weights/type", "float"), (f"{G}/weights/dynamic", True), (f"{G}/weights/strategy", "token"),
        (f"{G}/weights/strategy", "attn_head"), (f"{G}/weights/group_size", 0), (f"{G}/weights/group_size", None),
        (f"{G}/weights/group_size", 2.5), (f"{G}/weights/actorder", "sideways"), (f"{G}/weights/wings", 2),
        (f"{G}/weights/block_structure", [1]), (f"{G}/weights/symmetric", 1),
    ],
)  # fmt: skip
def test_options_of_compressed_tensors_that_are_not_supported_are_named(path: str, value: object) -> None:
    case = ct_integers(rng(), 8, 64)
    options = changed(case.options, path, value)
    if path == "format":
        options["config_groups"]["group_0"].pop("format")
    elif path == f"{G}/format":
        path = "format"
    name = "num_bits" if path.endswith("type") else path.rpartition("/")[2]
    with pytest.raises(ConfigError, match="wings" if "wings" in str(value) else name):
        opened(case, options)


@pytest.mark.parametrize(
    "path, value",
    [
        ("activation_scheme", "sideways"), ("fmt", "e5m2"), ("expert_dtype", "fp4"), ("scale_fmt", "e4m3"),
        ("weight_block_size", [128]), ("weight_block_size", [0, 128]), ("weight_block_size", 128),
        ("modules_to_not_convert", {"a": 1}), ("wings", 2),
    ],
)  # fmt: skip
def test_options_of_fp8_that_are_not_supported_are_named(path: str, value: object) -> None:
    case = fp8(rng(), 16, 32)
    with pytest.raises(ConfigError, match=path):
        opened(case, changed(case.options, path, value))


def damages() -> dict[str, Case]:
    """Layers of which one tensor is not as it should be."""

    def damaged(case: Case, name: str, array: mx.array | None) -> Case:
        case.tensors.pop(name, None)
        if array is not None:
            case.tensors[name] = array
        return case

    def integers(name: str, array: mx.array | None, **kind: Any) -> Case:
        return damaged(ct_integers(rng(), 8, 64, **kind), name, array)

    zeros, nan = mx.zeros((8, 2), mx.bfloat16), mx.full((8, 2), mx.nan, mx.bfloat16)
    return {
        "fp8 without scales": damaged(fp8(rng(), 16, 32), "weight_scale_inv", None),
        "fp8 with few scales": damaged(fp8(rng(), 16, 32), "weight_scale_inv", mx.ones((1, 1))),
        "fp8 with integer scales": damaged(fp8(rng(), 16, 32), "weight_scale_inv", mx.ones((1, 2), mx.int32)),
        "fp8 with one integer scale": damaged(fp8(rng(), 16, 16), "weight_scale_inv", mx.ones((1, 1), mx.int32)),
        "fp8 with infinite scales": damaged(fp8(rng(), 16, 32), "weight_scale_inv", mx.full((1, 2), mx.inf)),
        "fp8 with huge scales": damaged(fp8(rng(), 16, 32), "weight_scale_inv", mx.full((1, 2), 3e38)),
        "fp8 with huge exponents": damaged(fp8(rng(), 16, 32), "weight_scale_inv", mx.full((1, 2), 255, mx.uint8)),
        "fp8 with NaN": damaged(fp8(rng(), 16, 32), "weight", mx.full((16, 32), 127, mx.uint8)),
        "mxfp8 with NaN": damaged(
            fp8(rng(), 16, 32, powers=True, block=(32, 32)), "weight", mx.full((16, 32), 255, mx.uint8)
        ),
        "fp8 in three dimensions": damaged(fp8(rng(), 16, 32), "weight", mx.zeros((2, 16, 32), mx.uint8)),
        "no scales": integers("weight_scale", None),
        "no shape": integers("weight_shape", None),
        "another shape": integers("weight_shape", mx.array([9, 64])),
        "a wide shape": integers("weight_shape", mx.array([8, 65])),
        "a negative shape": integers("weight_shape", mx.array([8, -64])),
        "a shape of floats": integers("weight_shape", mx.array([8.0, 64.0])),
        "no zero points": integers("weight_zero_point", None, symmetric=False),
        "few zero points": integers("weight_zero_point", mx.zeros((1, 1), mx.int32), symmetric=False),
        "floating zero points": integers("weight_zero_point", zeros, symmetric=False),
        "int8 without zero points": integers("weight_zero_point", None, symmetric=False, bits=8, pack=False),
        "int8 with odd zero points": integers("weight_zero_point", zeros, symmetric=False, bits=8, pack=False),
        "few words": integers("weight_packed", mx.zeros((8, 7), mx.int32)),
        "floating words": integers("weight_packed", mx.zeros((8, 8))),
        "scales in one dimension": integers("weight_scale", mx.ones(16)),
        "scales that are no numbers": integers("weight_scale", nan),
        "integer scales": integers("weight_scale", mx.ones((8, 2), mx.int32)),
        "a group beyond": integers("weight_g_idx", mx.full(64, 2, mx.int32)),
        "a group below": integers("weight_g_idx", mx.array([-1] + 63 * [0], mx.int32)),
        "float8 with exponents": damaged(ct_float8(rng(), 8, 64), "weight_scale", mx.ones((8, 1), mx.uint8)),
        "mxfp8 with floats": damaged(ct_float8(rng(), 8, 64, strategy="mx"), "weight_scale", mx.ones((8, 2))),
        "plain weights": damaged(ct_float8(rng(), 8, 64), "weight", mx.ones((8, 64))),
        "nvfp4 in three dimensions": damaged(ct_float4(rng(), 8, 64), "weight_packed", mx.zeros((1, 8, 32), mx.uint8)),
        "nvfp4 with few scales": damaged(ct_float4(rng(), 8, 64), "weight_scale", mx.zeros((8, 3), mx.uint8)),
        "nvfp4 with NaN": damaged(ct_float4(rng(), 8, 64), "weight_scale", mx.full((8, 4), 127, mx.uint8)),
        "packed nvfp4 with NaN": damaged(
            ct_float4(rng(), 8, 64, overall=1.0), "weight_scale", mx.full((8, 4), 127, mx.uint8)
        ),
        "nvfp4 without a global scale": damaged(ct_float4(rng(), 8, 64), "weight_global_scale", None),
        "nvfp4 under nothing": damaged(ct_float4(rng(), 8, 64), "weight_global_scale", mx.zeros(1)),
        "nvfp4 under NaN": damaged(ct_float4(rng(), 8, 64), "weight_global_scale", mx.array([mx.nan])),
        "nvfp4 under two": damaged(ct_float4(rng(), 8, 64), "weight_global_scale", mx.ones(2)),
        "mxfp4 with huge exponents": damaged(
            ct_float4(rng(), 8, 64, overall=None), "weight_scale", mx.full((8, 2), 255, mx.uint8)
        ),
    }


@pytest.mark.parametrize("name", damages())
def test_damaged_layers_are_refused(name: str) -> None:
    with pytest.raises(RunnerError, match=r"\ba\b"):
        values(*opened(damages()[name]))


def test_float8_that_nothing_describes_is_refused() -> None:
    case = ct_integers(rng(), 8, 64)
    case.tensors["weight"] = mx.zeros((8, 64), mx.uint8)
    with pytest.raises(WeightsError, match=r"a\.weight"):
        opened(case)
