"""Mamba layers (the first kind): each channel has states of its own, with decays and steps of its own.

Source: arXiv:2312.00752, and `MambaMixer`, `FalconMambaMixer` and `JambaMambaMixer` in transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import mlx.core as mx

from runner.cache.recurrent import EachState, Slots, StateCache, Stepped, step
from runner.nn.batch import Batch
from runner.nn.fast import provided_ops
from runner.nn.linear import HIDDEN, Linear
from runner.nn.short_conv import ShortConv
from runner.ops.gates import gated
from runner.ops.selective import Selective
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
    rates: mx.array = field(init=False, repr=False)
    skip: mx.array = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.rates = -mx.exp(self.a_log.astype(mx.float32))
        self.skip = self.d.astype(mx.float32)

    def __call__(self, x: mx.array, batch: Batch, cache: StateCache) -> mx.array:
        """`[B, L, hidden_size]` to the same shape; `cache` goes forward by L tokens."""
        inner, gate = mx.split(self.in_proj(x), 2, axis=-1)
        outputs = self.step(cache, inner)
        if outputs is None:
            outputs = self.passed(inner, batch, cache)
        return self.out_proj(self.ops.fused(gated, outputs, gate).astype(x.dtype))

    def step(self, cache: EachState, inner: mx.array) -> mx.array | None:
        """Outputs `[B, L, mamba_inner]` of one token of each request, moved in place; None where it cannot be."""

        def move(slots: Slots, at: Sequence[int]) -> Stepped | None:
            buffers = slots()
            found = self.ops.conv_step(lambda: buffers, at, inner, self.conv1d.taps(self.hidden_act))
            if found is None:
                return None
            convolved, rows = found
            scanned = self.ops.selective_step(lambda: buffers, at, self.told(convolved))
            return None if scanned is None else (scanned[0], {**rows, **scanned[1]})

        return step(cache, inner, move)

    def passed(self, inner: mx.array, batch: Batch, cache: StateCache) -> mx.array:
        """Outputs `[B, L, mamba_inner]` in float32 of any number of tokens; matrices see those of all requests."""
        rows: list[mx.array] = []  # the last inputs of the convolution, of each request of the pass

        def convolved(cache: StateCache, inner: mx.array) -> mx.array:
            before = cache.read(inner)["conv"]
            output, after = self.conv1d(inner, before, activation=self.hidden_act, each=cache.reserved)
            rows.append(after)
            return output

        told = self.told(batch.apart(convolved, cache, inner))
        waiting = iter(rows)

        def scanned(cache: StateCache, x: mx.array, steps: mx.array, b: mx.array, c: mx.array) -> mx.array:
            own = told._replace(x=x, steps=steps, b=b, c=c)
            outputs, after = self.scan(own, cache.read(x)["states"], cache.reserved)
            cache.write(x.shape[1], conv=next(waiting), states=after)
            return outputs

        return batch.apart(scanned, cache, *told[:4])

    def told(self, inner: mx.array) -> Selective:
        """What tokens say, made of `inner` `[B, L, mamba_inner]`, which is convolved."""
        rank, states_end = self.mamba_rank, self.mamba_rank + self.mamba_d_state
        dt, b, c = self.normed(*mx.split(self.x_proj(inner), [rank, states_end], axis=-1))
        return Selective(inner, self.dt_proj(dt), b, c, self.rates, self.skip)

    def normed(self, dt: mx.array, b: mx.array, c: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """What steps `[.., rank]`, B and C `[.., states]` are made of; some families normalize each."""
        return dt, b, c

    def scan(self, told: Selective, state: mx.array, each: bool) -> tuple[mx.array, mx.array]:
        """Outputs `[B, L, C]` in float32, and the state `[B, C, N]` behind them, or `[L, B, C, N]` behind each."""
        if not each:
            return self.ops.selective_scan(told, state)
        outputs, states = [], []
        for t in range(told.x.shape[1]):
            x, steps, b, c = (array[:, t : t + 1] for array in told[:4])
            output, state = self.ops.selective_scan(told._replace(x=x, steps=steps, b=b, c=c), state)
            outputs.append(output)
            states.append(state)
        return mx.concatenate(outputs, axis=1), mx.stack(states)
