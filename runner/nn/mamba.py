"""Mamba layers (the first kind): each channel has states of its own, with decays and steps of its own.

Source: arXiv:2312.00752, and `MambaMixer`, `FalconMambaMixer` and `JambaMambaMixer` in transformers.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from runner.cache.recurrent import StateCache
from runner.nn.batch import Batch
from runner.nn.fast import provided_ops
from runner.nn.linear import HIDDEN, Linear
from runner.nn.short_conv import ShortConv
from runner.ops.gates import gated
from runner.ops.table import Ops
from runner.weights.module import Module
from runner.weights.tags import setting, weight

INNER, RANK, STATES = "mamba_inner", "mamba_rank", "mamba_d_state"


@dataclass
class Mamba(Module):
    """The layer: a projection, a short convolution, steps and B and C made of what comes out, the recurrence, a gate.

    With the step `dt = softplus(dt_proj(..))` of a channel, its states go from S to exp(-exp(A_log) dt) S + dt x B, and
    its output is S C + D x. Tokens are taken one by one, in float32, so no result depends on where a prompt is cut.
    """

    in_proj: Linear = weight("in_proj", (INNER, INNER), HIDDEN, bias="mamba_proj_bias")
    conv1d: ShortConv = weight("conv1d", INNER, "mamba_d_conv", bias="mamba_conv_bias")
    x_proj: Linear = weight("x_proj", (RANK, STATES, STATES), INNER)
    dt_proj: Linear = weight("dt_proj", INNER, RANK, bias=True)
    out_proj: Linear = weight("out_proj", HIDDEN, INNER, bias="mamba_proj_bias")
    a_log: mx.array = weight("A_log", INNER, STATES, exact=True)
    d: mx.array = weight("D", INNER, exact=True)
    mamba_rank: int = setting()
    mamba_d_state: int = setting()
    hidden_act: str = setting()
    ops: Ops = provided_ops()

    def __call__(self, x: mx.array, batch: Batch, cache: StateCache) -> mx.array:
        """`[B, L, hidden_size]` to the same shape; `cache` goes forward by L tokens."""
        inner, gate = mx.split(self.in_proj(x), 2, axis=-1)
        rows: list[mx.array] = []  # the last inputs of the convolution, of each request of the pass

        def convolved(cache: StateCache, inner: mx.array) -> mx.array:
            before = cache.read(inner)["conv"]
            output, after = self.conv1d(inner, before, activation=self.hidden_act, each=cache.reserved)
            rows.append(after)
            return output

        inner = batch.apart(convolved, cache, inner)
        rank, states_end = self.mamba_rank, self.mamba_rank + self.mamba_d_state
        dt, b, c = self.normed(*mx.split(self.x_proj(inner), [rank, states_end], axis=-1))
        waiting = iter(rows)

        def scanned(cache: StateCache, inner: mx.array, dt: mx.array, b: mx.array, c: mx.array) -> mx.array:
            outputs, after = self.scan(inner, dt, b, c, cache.read(inner)["states"], cache.reserved)
            cache.write(inner.shape[1], conv=next(waiting), states=after)
            return outputs

        outputs = batch.apart(scanned, cache, inner, self.dt_proj(dt), b, c)
        return self.out_proj(self.ops.fused(gated, outputs, gate).astype(x.dtype))

    def normed(self, dt: mx.array, b: mx.array, c: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """What steps `[.., rank]`, B and C `[.., states]` are made of; some families normalize each."""
        return dt, b, c

    def scan(
        self, x: mx.array, dt: mx.array, b: mx.array, c: mx.array, state: mx.array, each: bool
    ) -> tuple[mx.array, mx.array]:
        """Outputs `[B, L, C]` in float32, and the state `[B, C, N]` behind them, or `[L, B, C, N]` behind each."""
        wide = x.astype(mx.float32)
        step = self.ops.fused(softplus, dt)
        taken, rates = step * wide, -mx.exp(self.a_log.astype(mx.float32))
        b, c = b.astype(mx.float32), c.astype(mx.float32)
        outputs, states = [], []
        for t in range(x.shape[1]):
            state = self.ops.fused(moved, state, step[:, t, :, None], rates, taken[:, t, :, None], b[:, t, None])
            outputs.append((state @ c[:, t, :, None])[..., 0])
            states.append(state)
        passed = mx.stack(outputs, axis=1) + wide * self.d.astype(mx.float32)
        return passed, mx.stack(states) if each else state


def softplus(x: mx.array) -> mx.array:
    """The logarithm of 1 + e to the `x`, in float32."""
    wide = x.astype(mx.float32)
    return mx.logaddexp(wide, mx.zeros_like(wide))


def moved(state: mx.array, step: mx.array, rates: mx.array, taken: mx.array, b: mx.array) -> mx.array:
    """The states `[C, N]` after a token of steps `[C, 1]`, inputs `[C, 1]` times these, and b `[1, N]`."""
    return state * mx.exp(step * rates) + taken * b
