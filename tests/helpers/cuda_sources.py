"""Every text that NVRTC compiles, for models of many shapes, and what a compiler says of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

from cuda_shapes import AMPERE, FLOATS, HOPPER, LLAMA_8B, MIXED, MIXTURE, PART, PART_OF_EXPERTS, QWEN, SMOLLM2

from runner.ops.cuda.experts import source
from runner.ops.cuda.packed import WIDE, Product
from runner.ops.cuda.rows_shape import RowsPlan
from runner.ops.cuda.several import Kernel
from runner.ops.cuda.shape import StepShape, divide, text

SHAPES: Mapping[str, StepShape] = {
    "SmolLM2-135M": SMOLLM2,
    "Llama-3.1-8B 4 bits": LLAMA_8B,
    "Qwen2.5-0.5B 8 bits": QWEN,
    "mixed forms": MIXED,
    "Qwen3-30B-A3B 4 bits": MIXTURE,
    "a part of Llama-3.1-8B": PART,
    "a part of Qwen3-30B-A3B": PART_OF_EXPERTS,
    **{f"Llama-3.1-8B {name}": shape for name, shape in FLOATS.items()},
}
OPERATIONS = {"4 bits": (4, 64, 0), "8 bits": (8, 32, 0), "mxfp4": (4, 32, 1), "mxfp8": (8, 32, 1), "nvfp4": (4, 16, 2)}
"""BITS, G and S of products in operations."""


class Used(NamedTuple):
    """What a kernel takes on an architecture: registers, and bytes."""

    name: str
    registers: int
    spilled: int
    static_memory: int


def sources(architecture: str) -> dict[str, Callable[[], str]]:
    """What is compiled for a GPU of this architecture, by a name each."""
    copies = architecture == "sm_80"
    found: dict[str, Callable[[], str]] = {
        name: lambda n=name: text(f"{n}.cu")  # type: ignore[misc]
        for name in ("prompts", "draw")
    }
    for name, shape in SHAPES.items():
        if not shape.experts and shape.ranks == 1:
            found[f"step, {name}"] = lambda s=shape: divide(s, *(AMPERE if copies else HOPPER), copies=copies).source
        for rows in (8, 64):
            found[f"{rows} rows, {name}"] = lambda s=shape, r=rows: RowsPlan(s, r).source
    for name, form in OPERATIONS.items():
        for tiles, experts in ((1, 0), (4, 0), (4, 128)):
            product = Product(2, *form, 2048, 4096, experts, tiles)
            what = f"{tiles * 8} vectors" if not experts else "experts' vectors"
            found[f"{what}, {name}"] = lambda p=product: p.source
    for name, kind in (("float16", 1), ("bfloat16", 2)):
        found[f"rows of experts, {name}"] = lambda k=kind: source(k)
    for tiles in (2, 4, WIDE):
        plain = Product(2, 0, 1, 0, 2048, 4096, 128, tiles)
        found[f"experts' vectors, {8 * tiles} of plain matrices"] = lambda p=plain: p.source
    for name, kind in (("float32", 0), ("bfloat16", 2)):
        found[f"several sequences, {name}"] = lambda k=kind: Kernel(k, 128, 128, 8, 32, True, 0.1, 0.0).source
    return found


def used(log: str) -> list[Used]:
    """What ptxas says of each kernel."""
    pattern = r"entry function '(\w+)'.*?(\d+) bytes spill stores.*?Used (\d+) registers([^\n]*)"
    kernels = []
    for name, spilled, registers, rest in re.findall(pattern, log, re.S):
        static = re.search(r"(\d+) bytes smem", rest)
        kernels.append(Used(name, int(registers), int(spilled), int(static[1]) if static else 0))
    return kernels
