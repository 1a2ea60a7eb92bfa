"""Damaged options and tensors of published formats end in a `RunnerError` or in numbers, never in a crash."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from places import TESTS
from published_reference import Case, awq, ct_float4, ct_float8, ct_integers, fp8, gptq, linears, write_model
from published_source import Layers, values

import runner
from runner.checkpoint.quantized import as_mlx
from runner.engine.loaded import open_loaded
from runner.errors import RunnerError
from runner.inspect_model import inspect

SETTINGS = settings(max_examples=300, deadline=None, derandomize=True)
BUILDERS: list[Callable[[np.random.Generator], Case]] = [
    lambda g: gptq(g, 32, 64),
    lambda g: gptq(g, 32, 64, bits=3, sym=False, order=True),
    lambda g: awq(g, 16, 64),
    lambda g: fp8(g, 16, 64),
    lambda g: fp8(g, 16, 64, block=(32, 32), powers=True),
    lambda g: ct_integers(g, 8, 64, symmetric=False),
    lambda g: ct_integers(g, 8, 64, bits=8, pack=False),
    lambda g: ct_float8(g, 8, 64, strategy="block"),
    lambda g: ct_float4(g, 8, 64, overall=64.0),
    lambda g: ct_float4(g, 8, 64, overall=None),
]
CASES = [build(np.random.default_rng(0)) for build in BUILDERS]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8)
    | st.sampled_from([0, -1, 1, 2, 4, 8, 16, 32, 64, 128, "gptq", "awq", "float", "int", "group", "dynamic"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)  # fmt: skip
ARRAYS = st.builds(
    lambda shape, dtype, value: mx.full(tuple(shape), value).astype(dtype),
    st.lists(st.sampled_from([0, 1, 2, 3, 4, 8, 16, 32, 63, 64, 65]), max_size=3),
    st.sampled_from([mx.int32, mx.uint32, mx.uint8, mx.int8, mx.int64, mx.float16, mx.bfloat16, mx.float32]),
    st.sampled_from([0, 1, -1, 255, float("nan"), float("inf"), 1e-40]),
)


def paths(options: Any) -> list[tuple[str, ...]]:
    """Paths of every key in nested objects."""
    found = []
    for name, value in options.items() if isinstance(options, dict) else ():
        found += [(name,), *((name, *rest) for rest in paths(value))]
    return found


def ends_well(case: Case, options: object) -> None:
    try:
        given = Layers({"a": case})
        config, source = as_mlx({"model_type": "t", "quantization_config": options}, given)
        if "a.weight" in source.headers and source is not given:
            assert np.isfinite(values(config, source)).all()
    except RunnerError as error:
        assert str(error) and "\n" not in str(error)


@SETTINGS
@given(st.data())
def test_any_option(data: st.DataObject) -> None:
    case = data.draw(st.sampled_from(CASES))
    options = copy.deepcopy(case.options)
    *above, last = data.draw(st.sampled_from([*paths(options), ("wings",)]))
    inner = options
    for name in above:
        inner = inner[name]
    inner[last] = data.draw(JSON)
    ends_well(case, options)


@SETTINGS
@given(st.data())
def test_any_tensor(data: st.DataObject) -> None:
    case = data.draw(st.sampled_from(CASES))
    name = data.draw(st.sampled_from(sorted(case.tensors)))
    changed = Case({**case.tensors, name: data.draw(ARRAYS)}, case.numbers)
    if data.draw(st.booleans()):
        del changed.tensors[name]
    ends_well(changed, case.options)


@pytest.mark.parametrize("build", [awq, gptq, ct_integers, ct_float4])  # all but AWQ are read from when opened
def test_inspect_and_load_see_what_a_layer_becomes(build: Callable[..., Case], tmp_path: Path) -> None:
    fixture = TESTS / "fixtures" / "llama" / "llama-gqa"
    cases = {name: build(np.random.default_rng(0), *shape) for name, shape in linears(fixture).items()}
    path = write_model(tmp_path / "model", fixture, cases, next(iter(cases.values())).options)
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(fixture / file, path / file)
    report = inspect(path)
    entry = next(entry for entry in report.entries if entry.field == "layers.0.self_attn.qkv_proj.weight")
    assert (entry.dtype, entry.shape) == (("BF16", (64, 32)) if build is ct_float4 else ("U32", (64, 4)))
    assert report.parameters == inspect(fixture).parameters
    assert all(name.endswith("input_global_scale") for name in report.ignored)
    assert runner.load(path).generate("a", max_tokens=2, temperature=0).text is not None


def test_other_configs_come_back_as_they_are() -> None:
    source = Layers({})
    for raw in ({}, {"quantization_config": {"bits": 4, "group_size": 64}}, {"quantization_config": None}):
        assert as_mlx(raw, source) == (raw, source)
    for fixture in ("gpt_oss-mxfp4",):
        raw = json.loads((TESTS / "fixtures" / "families" / fixture / "config.json").read_text())
        assert raw["quantization_config"]["quant_method"] == "mxfp4" and as_mlx(raw, source) == (raw, source)


def test_mxfp4_of_other_families_is_refused(tmp_path: Path) -> None:
    fixture = TESTS / "fixtures" / "llama" / "llama-gqa"
    name = next(iter(linears(fixture)))
    packed = Case({"weight_blocks": mx.zeros((2, 16), mx.uint8)}, np.zeros(()))
    path = write_model(tmp_path / "model", fixture, {name: packed}, {"quant_method": "mxfp4"})
    with pytest.raises(RunnerError, match=r"mxfp4.*not supported"):
        open_loaded(path)
