"""Rows of a mixture's tokens, taken to their experts and brought back, at the memory's speed.

MLX 0.32.4 takes rows out of an array at 0.2 TB/s on an H200, of 4.3: for a prompt of 2,048 tokens and eight experts of
2,048 numbers 0.3 ms a layer, and as long to bring them back.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import mlx.core as mx

from runner.ops.cuda.driver import code_of
from runner.ops.cuda.shape import NUMBERS, text
from runner.ops.table import PORTABLE

UNIT = 16
"""Bytes that a thread moves at a time."""

THREADS = 256
"""Threads of a block, which takes a row."""

KINDS = {mx.float16: NUMBERS["float16"], mx.bfloat16: NUMBERS["bfloat16"]}
"""Types of the rows that are added up, by the kernels' numbers for them."""


def take_rows(x: mx.array, ids: mx.array) -> mx.array:
    """`Ops.take_rows`."""
    found = _moved(x, ids, back=False)
    return PORTABLE.take_rows(x, ids) if found is None else found


def put_rows(x: mx.array, ids: mx.array) -> mx.array:
    """`Ops.put_rows`."""
    found = _moved(x, ids, back=True)
    return PORTABLE.put_rows(x, ids) if found is None else found


def mixture(others: Callable[..., mx.array], outputs: mx.array, weights: mx.array) -> mx.array:
    """`Ops.mixture`, which rounds once, at its end; `others` where there is no kernel for such outputs."""
    *shape, count, width = outputs.shape
    code = _code(KINDS[outputs.dtype]) if outputs.dtype in KINDS and width % 8 == 0 and outputs.size else None
    if code is None:
        return others(outputs, weights)
    tokens = outputs.size // (count * width)
    (y,) = mx.fast.precompiled_cuda_kernel(
        name="runner_mixture",
        compiled_source=code,
        inputs=[outputs, weights.astype(mx.float32)],
        output_shapes=[(*shape, width)],
        output_dtypes=[outputs.dtype],
        scalars=[count, width // 8],
        grid=(tokens * THREADS, 1, 1),
        threadgroup=(THREADS, 1, 1),
        ensure_row_contiguous=True,
    )
    return y


def _moved(x: mx.array, ids: mx.array, *, back: bool) -> mx.array | None:
    """The rows that `ids` name, or rows put there; None where there is no kernel for such rows."""
    nbytes = x.nbytes // max(1, x.shape[0])
    code = None if nbytes % UNIT or not x.size or not ids.size else _code(NUMBERS["bfloat16"])
    if code is None:
        return None
    (y,) = mx.fast.precompiled_cuda_kernel(
        name="runner_rows",
        compiled_source=code,
        inputs=[x, ids.astype(mx.uint32)],
        output_shapes=[(ids.shape[0], *x.shape[1:])],
        output_dtypes=[x.dtype],
        scalars=[nbytes // UNIT, int(back)],
        grid=(ids.shape[0] * THREADS, 1, 1),
        threadgroup=(THREADS, 1, 1),
        ensure_row_contiguous=True,
    )
    return y


def source(kind: int) -> str:
    """The kernels' text for rows of this type."""
    return "\n".join([f"constexpr int XT = {kind};", text("forms.cu"), text("tiles.cu"), text("experts.cu")])


@functools.cache
def _code(kind: int) -> bytes | None:
    """The kernels; None where none can be made."""
    return code_of(source(kind))
