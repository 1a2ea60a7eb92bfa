"""Parts of matrices in published forms are those of the whole, and made of parts of their tensors where that can be."""

from __future__ import annotations

import random
from collections.abc import Callable

import mlx.core as mx
import numpy as np
import pytest
from cuts import equal, some
from published_reference import Case, awq, ct_float4, ct_float8, ct_integers, fp8, gptq
from published_source import Layers

from runner.checkpoint.quantized import as_mlx
from runner.weights.cuts import Cut, cut_out

ROWS, WIDTH = 256, 384
BUILDERS: dict[str, tuple[Callable[[np.random.Generator], Case], tuple[bool, bool]]] = {
    "gptq": (lambda g: gptq(g, ROWS, WIDTH), (True, True)),
    "gptq of 3 bits": (lambda g: gptq(g, ROWS, WIDTH, bits=3, sym=False), (True, True)),
    "gptq in another order": (lambda g: gptq(g, ROWS, WIDTH, sym=False, order=True), (True, False)),
    "awq": (lambda g: awq(g, ROWS, WIDTH), (True, True)),
    "fp8": (lambda g: fp8(g, ROWS, WIDTH), (True, True)),
    "fp8 by powers of two": (lambda g: fp8(g, ROWS, WIDTH, block=(32, 32), powers=True), (True, True)),
    "integers": (lambda g: ct_integers(g, ROWS, WIDTH, symmetric=False), (True, True)),
    "integers of 8 bits": (lambda g: ct_integers(g, ROWS, WIDTH, bits=8, pack=False), (True, True)),
    "float8 by blocks": (lambda g: ct_float8(g, ROWS, WIDTH, strategy="block"), (True, True)),
    "float8 by outputs": (lambda g: ct_float8(g, ROWS, WIDTH, strategy="channel"), (True, True)),
    "nvfp4": (lambda g: ct_float4(g, ROWS, WIDTH, overall=64.0), (True, True)),
    "nvfp4 as numbers": (lambda g: ct_float4(g, ROWS, WIDTH), (True, True)),
    "mxfp4": (lambda g: ct_float4(g, ROWS, WIDTH, overall=None), (True, True)),
}
"""Matrices, and whether some of their outputs and some of their inputs can be made by themselves."""


class Counted(Layers):
    """Counts the bytes that are read."""

    count = 0

    def read(self, name: str) -> mx.array:
        self.count += self.arrays[name].nbytes
        return self.arrays[name]

    def read_part(self, name: str, cut: Cut) -> mx.array:
        part = cut_out(self.arrays[name], cut)
        self.count += part.nbytes
        return part


@pytest.mark.parametrize("name", BUILDERS)
def test_parts_are_those_of_the_whole(name: str) -> None:
    build, can = BUILDERS[name]
    case, draw = build(np.random.default_rng(0)), random.Random(0)
    stored = Counted({"a": case})
    _, source = as_mlx({"model_type": "t", "quantization_config": case.options}, stored)
    for axis, unit in ((0, 128), (1, 128), (0, 128), (1, 128), (0, 8), (1, 32), (0, 1)):
        full = (ROWS, WIDTH)[axis]
        kept = ((0, full // 2),) if unit == 128 and axis == 0 else some(full, unit, draw)
        for each, header in source.parts.items():
            size = header.shape[axis]
            here = tuple((start * size // full, stop * size // full) for start, stop in kept)
            if any(start == stop for start, stop in here):
                continue
            cut = (here, None) if axis == 0 else (None, here)
            stored.count = 0
            whole = source.read(each)
            all_of_it, stored.count = stored.count, 0
            assert equal(source.read_part(each, cut), cut_out(whole, cut)), (each, cut)
            if unit == 128 and can[axis]:
                share = sum(stop - start for start, stop in kept) / full
                assert stored.count <= all_of_it * share + 6000, (each, cut)  # and scales that say what it becomes


def test_a_block_that_is_cut_short_is_not_taken_for_a_whole_one() -> None:
    """Of 250 outputs in blocks of 128, the second half begins within the first block."""
    case = fp8(np.random.default_rng(0), 250, 256, block=(128, 128))
    _, source = as_mlx({"model_type": "t", "quantization_config": case.options}, Counted({"a": case}))
    for kept in (((125, 250),), ((0, 128),), ((128, 250),)):
        for each in source.parts:
            assert equal(source.read_part(each, (kept, None)), cut_out(source.read(each), (kept, None)))
