"""LFM2's gated short convolution, which stands where other layers have attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import mlx.core as mx

from runner.cache.recurrent import EachState, StateCache, step
from runner.config.base import key
from runner.config.hybrid import HybridConfig
from runner.config.layer_types import CONV
from runner.config.memory import State
from runner.nn.batch import Batch
from runner.nn.fast import provided_ops
from runner.nn.linear import HIDDEN, Linear
from runner.nn.short_conv import ShortConv
from runner.ops.table import Ops
from runner.weights.module import Module
from runner.weights.tags import weight


@dataclass(frozen=True, kw_only=True)
class GatedConvConfig(HybridConfig):
    """Config of a hybrid whose layers without attention are gated short convolutions, over `conv_L_cache` tokens."""

    OTHER: ClassVar[str] = CONV
    OTHER_NAME: ClassVar[str] = "conv"
    conv_L_cache: int = key(default=3, minimum=2)
    conv_bias: bool = False

    @property
    def state(self) -> State:
        return State({"conv": (self.conv_L_cache - 1, self.hidden_size)}, {})


@dataclass
class GatedConv(Module):
    """`out_proj(C * conv(B * x))`: B, C and x are parts of one projection, and the convolution has no activation.

    Source: `Lfm2ShortConv` in transformers. Its cache holds the last inputs of the convolution, "conv".
    """

    in_proj: Linear = weight("in_proj", (HIDDEN, HIDDEN, HIDDEN), HIDDEN, bias="conv_bias")
    conv: ShortConv = weight("conv", HIDDEN, "conv_L_cache", bias="conv_bias")
    out_proj: Linear = weight("out_proj", HIDDEN, HIDDEN, bias="conv_bias")
    ops: Ops = provided_ops()

    def __call__(self, x: mx.array, batch: Batch, cache: StateCache) -> mx.array:
        """`[B, L, hidden_size]` to the same shape; `cache` goes forward by L tokens."""
        b, c, x = mx.split(self.in_proj(x), 3, axis=-1)
        gated = b * x
        output = self.step(cache, gated)
        return self.out_proj(c * (batch.apart(self.convolved, cache, gated) if output is None else output))

    def convolved(self, cache: StateCache, gated: mx.array) -> mx.array:
        """What the convolution makes of any number of tokens."""
        output = self.step(cache, gated)
        if output is None:
            output, rows = self.conv(gated, cache.read(gated)["conv"], activation=None, each=cache.reserved)
            cache.write(gated.shape[1], conv=rows)
        return output

    def step(self, cache: EachState, gated: mx.array) -> mx.array | None:
        """What the convolution makes of one token of each request, moved in place; None where it cannot be."""
        return step(cache, gated, lambda slots, at: self.ops.conv_step(slots, at, gated, self.conv.taps(None)))
