"""Refuses matrices that a quantized form cannot hold: they would be written damaged, and nobody be told."""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx

from runner.convert.quantize import LARGEST
from runner.errors import CheckpointError
from runner.local_files import quoted
from runner.nn.linear import Quantization
from runner.weights.finite import is_finite, spelled

LARGEST_SCALE, _FULL = 448, 0x7E
"""The largest scale of nvfp4 (E4M3), and its byte."""

NEGLIGIBLE = 1e-6
"""Numbers of matrices that may become zeros: rows that were never trained, and experts that are never chosen."""


class Packing:
    """Checks a matrix that is quantized some rows at a time: `check` those, and at the end `finish`.

    Attributes:
        kept: the sum of the largest numbers of the groups.
        lost: the sum of those of the groups that became zeros.
    """

    def __init__(self, name: str, form: Quantization) -> None:
        """Begin with the matrix `name`, which becomes `form`."""
        self.name = name
        self.form = form
        self.kept = 0.0
        self.lost = 0.0

    def check(self, rows: mx.array, made: Mapping[str, mx.array]) -> None:
        """Check some rows and what they became.

        Raises:
            CheckpointError: a scale cannot hold the numbers of its group.
        """
        scales = made["scales"]
        if self.form.mode == "affine" and not is_finite(scales):
            raise CheckpointError(f"{quoted(self.name)} has numbers too far apart for {spelled(scales.dtype)} scales")
        # Scales of the other modes are powers of two, which hold all numbers.
        if self.form.mode != "nvfp4":
            return
        # The groups' largest numbers are told by their scales, and looked for only where a scale is at one of its ends.
        zeros, full = scales == 0, scales == _FULL
        self.kept += float(mx.sum(mx.from_fp8(_padded(scales), dtype=mx.float32))) * LARGEST["nvfp4"]
        if not bool(mx.any(zeros | full)):
            return
        groups = mx.max(mx.abs(rows.astype(mx.float32)).reshape(*scales.shape, self.form.group_size), axis=-1)
        self.lost += float(mx.sum(mx.where(zeros & (groups > NEGLIGIBLE), groups, 0)))
        largest = LARGEST["nvfp4"] * LARGEST_SCALE
        if float(mx.max(groups)) > largest:
            raise CheckpointError(
                f"{quoted(self.name)} has numbers above {largest:g}, the largest that nvfp4 can hold; mxfp4 and mxfp8 "
                "can hold them"
            )

    def finish(self) -> None:
        """Check the matrix as a whole.

        Raises:
            CheckpointError: most of it became zeros.
        """
        if self.lost > self.kept:
            raise CheckpointError(
                f"{quoted(self.name)} would become zeros for the most part: its numbers are below what nvfp4's scales "
                "can hold; mxfp4 and mxfp8 can hold them"
            )


def _padded(scales: mx.array) -> mx.array:
    """All scales in a row, and zeros: MLX's CPU converts 8-bit floats four at a time and refuses a remainder."""
    return mx.pad(scales.flatten(), (0, -scales.size % 4))
