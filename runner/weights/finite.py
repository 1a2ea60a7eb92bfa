"""Refuses numbers that a dtype cannot hold: a damaged model would look whole, or a whole one be written damaged."""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx

from runner.errors import CheckpointError

_BITS: Mapping[mx.Dtype, tuple[mx.Dtype, int, int]] = {
    mx.float32: (mx.uint32, 0x7FFFFFFF, 0x7F800000),
    mx.float16: (mx.uint16, 0x7FFF, 0x7C00),
    mx.bfloat16: (mx.uint16, 0x7FFF, 0x7F80),
}
"""By dtype: an integer as wide, the bits of a number without its sign, and those of infinity."""


def is_finite(array: mx.array) -> bool:
    """Whether all floats of `array` are finite."""
    # Without their signs, floats have the order of their bits, NaN above infinity: MLX compares integers ten times as
    # fast as floats.
    integer, magnitude, infinity = _BITS[array.dtype]
    return int(mx.max(array.view(integer) & magnitude)) < infinity


def check_rounded(what: str, before: mx.array, after: mx.array) -> None:
    """Check that numbers are finite once they are rounded to another dtype, `after` for `before`.

    Raises:
        CheckpointError: one is not finite, or too large for the dtype of `after`; the message begins with `what`.
    """
    if is_finite(after):
        return
    if not is_finite(before):
        raise CheckpointError(f"{what} has a number that is not finite: a file is damaged")
    wider = [dtype for dtype in (mx.bfloat16, mx.float32) if is_finite(before.astype(dtype))]
    names = " or ".join(spelled(dtype) for dtype in wider)
    raise CheckpointError(f"{what} has a number that is too large for {spelled(after.dtype)}; {names} can hold it")


def spelled(dtype: mx.Dtype) -> str:
    """The name of a dtype as `--dtype` has it."""
    return str(dtype).removeprefix("mlx.core.")
