"""LFM2's gated short convolution, which stands where other layers have attention."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from runner.cache.recurrent import StateCache
from runner.nn.batch import Batch
from runner.nn.linear import HIDDEN, Linear
from runner.nn.short_conv import ShortConv
from runner.weights.module import Module
from runner.weights.tags import weight


@dataclass
class GatedConv(Module):
    """`out_proj(C * conv(B * x))`: B, C and x are parts of one projection, and the convolution has no activation.

    Source: `Lfm2ShortConv` in transformers. Its cache holds the last inputs of the convolution, "conv".
    """

    in_proj: Linear = weight("in_proj", (HIDDEN, HIDDEN, HIDDEN), HIDDEN, bias="conv_bias")
    conv: ShortConv = weight("conv", HIDDEN, "conv_L_cache", bias="conv_bias")
    out_proj: Linear = weight("out_proj", HIDDEN, HIDDEN, bias="conv_bias")

    def __call__(self, x: mx.array, batch: Batch, cache: StateCache) -> mx.array:
        """`[B, L, hidden_size]` to the same shape; `cache` goes forward by L tokens."""
        b, c, x = mx.split(self.in_proj(x), 3, axis=-1)
        gated = b * x
        found = self.conv(gated, cache.read(gated)["conv"], activation=None, each=cache.reserved)
        cache.write(x.shape[1], conv=found.rows)
        return self.out_proj(c * found.output)
