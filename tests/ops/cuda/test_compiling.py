"""Kernels compile for GPUs of all kinds, where there is NVRTC: `scripts/check_cuda` brings it, and all of them."""

from __future__ import annotations

import dataclasses

import pytest
from cuda_shapes import HOPPER, SMOLLM2
from cuda_sources import sources, used

from runner.errors import BackendError
from runner.ops.cuda.nvrtc import ARCHITECTURES, Nvrtc
from runner.ops.cuda.shape import divide

MOST_REGISTERS = {
    "prompts": 168,
    "draw": 128,
    "step": 96,
    "8 rows": 144,
    "64 rows": 224,
    "8 vectors": 168,
    "32 vectors": 255,
    "experts' vectors": 255,
    "rows of experts": 64,
    "several sequences": 180,
}
"""Of a thread: with more, a block of `step` does not fit a multiprocessor; others hide less of the memory's time."""

FEW = (
    "draw",
    "prompts",
    "step, Llama-3.1-8B nvfp4",
    "8 rows, Qwen3-30B-A3B 4 bits",
    "32 vectors, mxfp8",
    "rows of experts, float16",
)
ALL = [name if name in FEW else pytest.param(name, marks=pytest.mark.long) for name in sources("sm_90a")]


def nvrtc() -> Nvrtc:
    try:
        return Nvrtc()
    except BackendError:
        pytest.skip("there is no NVRTC here")


@pytest.mark.parametrize("architecture", ARCHITECTURES[:3])
@pytest.mark.parametrize("name", ALL)
def test_kernels_compile(name: str, architecture: str) -> None:
    code, log = nvrtc().compile(sources(architecture)[name](), architecture)
    assert code.startswith(b"\x7fELF")
    kernels = used(log)
    assert kernels
    for kernel in kernels:
        assert kernel.registers <= MOST_REGISTERS[name.partition(",")[0]], kernel
        assert kernel.spilled <= (128 if kernel.name == "decode_steps" else 8), kernel


def test_a_gpu_with_bulk_copies_could_do_without() -> None:
    division = divide(SMOLLM2, *HOPPER, copies=True)
    assert dataclasses.replace(division, copies=False) == divide(SMOLLM2, *HOPPER)
    assert nvrtc().compile(division.source, "sm_90a")
