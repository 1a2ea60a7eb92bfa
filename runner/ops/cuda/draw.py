"""Draws a token from each row of logits by one kernel: MLX's operations would sort each row for top-k and top-p."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from runner.ops.cuda.driver import code_of
from runner.ops.cuda.shape import text
from runner.ops.picking import Draw
from runner.ops.picking import draw as by_sorting

THREADS = 512
"""Of a block, which takes a row."""

_OPTIONS = np.dtype([("chance", "u4"), ("temperature", "f4"), ("top_k", "i4"), ("top_p", "f4"), ("log_min_p", "f4")])
"""`Options` in `draw.cu`."""


def draw(logits: mx.array, rows: Sequence[Draw]) -> tuple[mx.array, mx.array]:
    """`runner.ops.picking.draw`, of whose filters only the sum that meets `top_p` is rounded otherwise."""
    code = _code()
    if code is None or logits.shape[1] >= 1 << 20:  # whose weights might add up to more than 64 bits
        return by_sorting(logits, rows)
    options = np.array([_numbers(row, logits.shape[1]) for row in rows], _OPTIONS)
    tokens, peaks = mx.fast.precompiled_cuda_kernel(
        name="runner_draw",
        compiled_source=code,
        inputs=[logits, mx.array(options.view(np.uint32).reshape(len(rows), -1))],
        output_shapes=[(len(rows),)] * 2,
        output_dtypes=[mx.uint32, mx.float32],
        scalars=[logits.shape[1]],
        grid=(len(rows) * THREADS, 1, 1),
        threadgroup=(THREADS, 1, 1),
        ensure_row_contiguous=True,
    )
    return tokens, peaks


def _numbers(row: Draw, size: int) -> tuple[int, float, int, float, float]:
    """A row's options, as the kernel takes them."""
    least = math.log(row.min_p) if row.min_p > 0 else -math.inf
    return int(row.chance * 2.0**32), row.temperature, min(row.top_k, size), row.top_p, least


@functools.cache
def _code() -> bytes | None:
    """The kernel; None where none can be made."""
    return code_of(text("draw.cu"))
