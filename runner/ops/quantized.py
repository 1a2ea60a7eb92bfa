"""A quantized matrix as one value: its packed codes, scales and form."""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx


class QuantizedWeight(NamedTuple):
    """A quantized matrix `[..., out, in]`, or a stack of them: all that an operation needs to multiply with it.

    `weight` is uint32 `[..., out, in * bits / 32]`; `scales` (and `biases`, in affine mode) are
    `[..., out, in / group_size]`. `mode` is "affine", "mxfp4", "mxfp8" or "nvfp4". A named tuple, because layers make
    one for each product: a frozen dataclass takes three times as long to make.
    """

    weight: mx.array
    scales: mx.array
    biases: mx.array | None
    group_size: int
    bits: int
    mode: str

    def dequantize(self) -> mx.array:
        """The matrix as numbers, `[..., out, in]`: in the dtype of the scales in affine mode, else bfloat16."""
        weight, scales, biases, group_size, bits, mode = self
        return mx.dequantize(weight, scales, biases, group_size=group_size, bits=bits, mode=mode)

    def rows(self, ids: mx.array) -> QuantizedWeight:
        """The rows `ids` of a table, still quantized."""
        biases = None if self.biases is None else self.biases[ids]
        return self._replace(weight=self.weight[ids], scales=self.scales[ids], biases=biases)
