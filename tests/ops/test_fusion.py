"""Functions in one kernel each: the same numbers as operation by operation, and one operation in the graph."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import pytest
from operations import operations
from places import TESTS
from references import error, expected, tolerance

from runner.engine import loaded
from runner.nn.fast import soft_capped
from runner.nn.xielu import xielu
from runner.ops.attention import capped_scores
from runner.ops.device import CPU_WITHOUT_KERNELS, CUDA, METAL, Device
from runner.ops.gates import clamped
from runner.ops.quantized import QuantizedWeight
from runner.ops.table import ACTIVATIONS, PORTABLE

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="MLX compiles for a CPU with g++")
FUNCTIONS: dict[str, tuple[Callable[..., mx.array], list[float], int]] = {
    "soft_capped": (soft_capped, [2.5], 1),
    "capped_scores": (capped_scores, [0.7, 2.5], 1),
    "clamped": (clamped, [1.702, 1.5], 2),
}
"""Function, numbers that it gets, and how many arrays before them."""


def rand(*shape: int, seed: int = 0, dtype: mx.Dtype = mx.float32) -> mx.array:
    return (3 * mx.random.normal(shape, key=mx.random.key(seed))).astype(dtype)


def same(found: mx.array, wanted: mx.array) -> bool:
    close = mx.allclose(found.astype(mx.float32), wanted.astype(mx.float32), rtol=1e-5, atol=1e-5)
    return found.dtype == wanted.dtype and found.shape == wanted.shape and bool(close)


@needs_compiler
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_fused_function_is_the_plain_one(name: str) -> None:
    function, numbers, arrays = FUNCTIONS[name]
    for shape in ((1, 1, 40), (2, 3, 7), (5, 8)):  # one kernel serves sizes, another number of dimensions gets its own
        given = [rand(*shape, seed=seed) for seed in range(arrays)]
        found = METAL.fused(function, *given, *numbers)
        assert operations(found).total() == 1 + operations(*given).total()
        assert same(found, function(*given, *numbers))
    # Numbers are part of the kernel: others make another one.
    doubled = [2 * number for number in numbers]
    assert same(METAL.fused(function, *given, *doubled), function(*given, *doubled))
    assert not same(METAL.fused(function, *given, *doubled), function(*given, *numbers))


@needs_compiler
@pytest.mark.parametrize("activation", [*ACTIVATIONS])
def test_fused_activations_are_the_plain_ones(activation: str) -> None:
    name = {"gelu_tanh": "gelu_pytorch_tanh"}.get(activation, activation)
    x = rand(2, 3, 32)
    mx.eval(x)
    for found, wanted in (
        (METAL.activate(x, name), PORTABLE.activate(x, name)),
        (METAL.glu(x, name), PORTABLE.glu(x, name)),
    ):
        assert operations(found).total() == 1
        assert same(found, wanted)


@needs_compiler
def test_a_fused_xielu_is_the_plain_one() -> None:
    parameters = [mx.array([0.8]), mx.array([0.3]), mx.array(0.5), mx.array(-1e-6)]
    x = rand(2, 3, 32)
    mx.eval(x, parameters)
    found = METAL.fused(xielu, x, *parameters)
    assert operations(found).total() == 1
    assert same(found, xielu(x, *parameters))


def test_only_gpus_fuse() -> None:
    """On a CPU a compiled function would run a C++ compiler in the middle of an answer."""
    x = rand(4, 8)
    mx.eval(x)
    for ops in (PORTABLE, CPU_WITHOUT_KERNELS):
        assert operations(ops.glu(x, "silu")).total() == 3
    for ops in (METAL, CUDA):
        assert operations(ops.glu(x, "silu")) == {"Compiled": 1}


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16, mx.float32])
def test_a_fused_function_keeps_the_dtype(dtype: mx.Dtype) -> None:
    x = rand(2, 8, dtype=dtype)
    assert (
        METAL.glu(x, "silu").dtype == METAL.activate(x, "gelu").dtype == METAL.fused(soft_capped, x, 3.0).dtype == dtype
    )


@needs_compiler
@pytest.mark.parametrize("name", ["gemma2-base", "gpt_oss-base", "apertus-base", "gemma3_text-base", "mixtral-window"])
def test_families_on_the_table_of_macs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU's table computes, here by MLX's CPU, is what transformers computed."""
    monkeypatch.setattr(loaded, "current", lambda: Device("as on a Mac", METAL))
    path = TESTS / "fixtures" / "families" / name
    model = loaded.open_loaded(path, dtype="float32")
    wanted: dict[str, Any] = mx.load(str(path / "expected.safetensors"))
    for prompt, ids in expected(path)["prompts"].items():
        assert error(model.logits(ids), wanted[f"logits.{prompt}"]) < tolerance(path)


@pytest.mark.parametrize("ids", [1, 3, 4])
def test_only_a_cpu_pads_the_rows_of_packed_tables(ids: int) -> None:
    """MLX's CPU unpacks nvfp4 rows four at a time; a GPU takes any number as they are."""
    weight, scales = mx.quantize(rand(8, 32), group_size=16, bits=4, mode="nvfp4")
    table = QuantizedWeight(weight, scales, None, 16, 4, "nvfp4")
    chosen = mx.arange(ids)
    mx.eval(chosen, *table[:2])
    padded = PORTABLE.quantized_embed(chosen, table, mx.float32)
    whole = METAL.quantized_embed(chosen, table, mx.float32)
    assert operations(padded)["Concatenate"] - operations(whole)["Concatenate"] == (ids % 4 != 0)
    assert mx.array_equal(padded, table.dequantize()[chosen].astype(mx.float32))
