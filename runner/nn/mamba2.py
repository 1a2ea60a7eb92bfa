"""Mamba 2 layers: in place of attention, a state of fixed size for each head, which every token lets decay and adds to.

Source: arXiv:2405.21060, and `BambaMixer` in transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import mlx.core as mx

from runner.cache.recurrent import EachState, StateCache, step
from runner.config.base import Config
from runner.config.mamba import Mamba2Config
from runner.nn.batch import Batch
from runner.nn.fast import provided_ops
from runner.nn.gated_norm import Gate, GateThenNorm, NormThenGate
from runner.nn.linear import HIDDEN, Linear
from runner.nn.short_conv import ShortConv
from runner.ops.state_space import Dynamics, each_token
from runner.ops.table import Ops
from runner.weights.module import Module
from runner.weights.tags import Choice, Chooses, Header, setting, weight
from runner.weights.tree import Size, Tree

INNER, CHANNELS, HEADS = "mamba_inner", "mamba_channels", "mamba_n_heads"


class OutputNorm(Chooses):
    """The gated norm behind the recurrence, in the order that the config says, or its gate alone."""

    def __call__(self, x: mx.array, gate: mx.array, eps: float) -> mx.array:
        raise NotImplementedError

    @classmethod
    def choose(cls, tree: Tree, shape: tuple[Size, ...], headers: Mapping[str, Header], config: Config) -> Choice:
        assert isinstance(config, Mamba2Config)
        normalized = NormThenGate if config.mamba_norm_before_gate else GateThenNorm
        return Choice(normalized if config.mamba_rms_norm else Gate, {})


@dataclass
class Mamba2(Module):
    """The layer: one projection, a short convolution over x, B and C, the recurrence, a gated norm, a projection.

    Its cache holds the last inputs of the convolution, "conv", and the heads' states, "states".
    """

    in_proj: Linear = weight("in_proj", (INNER, CHANNELS, HEADS), HIDDEN, bias="mamba_proj_bias")
    conv1d: ShortConv = weight("conv1d", CHANNELS, "mamba_d_conv", bias="mamba_conv_bias")
    norm: OutputNorm = weight("norm", INNER)
    out_proj: Linear = weight("out_proj", HIDDEN, INNER, bias="mamba_proj_bias")
    a_log: mx.array = weight("A_log", HEADS, exact=True)
    d: mx.array = weight("D", HEADS, exact=True)
    dt_bias: mx.array = weight("dt_bias", HEADS, exact=True)
    mamba_inner: int = setting()
    mamba_channels: int = setting()
    mamba_n_groups: int = setting()
    time_step_limit: tuple[float, float] = setting()
    norm_eps: float = setting()
    mamba_activation: str = setting()
    ops: Ops = provided_ops()

    def __call__(self, x: mx.array, batch: Batch, cache: StateCache) -> mx.array:
        """`[B, L, hidden_size]` to the same shape; `cache` goes forward by L tokens."""
        gate, mixed, dt = self.project(x)
        outputs = self.step(cache, x, mixed, dt)
        if outputs is None:
            outputs = batch.apart(self.recurrence, cache, x, mixed, dt)
        return self.out_proj(self.norm(outputs, gate, self.norm_eps).astype(x.dtype))

    def recurrence(self, cache: StateCache, x: mx.array, mixed: mx.array, dt: mx.array) -> mx.array:
        """Outputs `[B, L, mamba_inner]`, before the norm."""
        outputs = self.step(cache, x, mixed, dt)
        return self.scan(x, mixed, dt, cache) if outputs is None else outputs

    @property
    def dynamics(self) -> Dynamics:
        """What the recurrence is, besides what a token says."""
        return Dynamics(self.a_log, self.d, self.dt_bias, self.mamba_n_groups, self.time_step_limit)

    def step(self, cache: EachState, x: mx.array, mixed: mx.array, dt: mx.array) -> mx.array | None:
        """Outputs `[B, L, mamba_inner]` of one token of each request, moved in place; None where it cannot be."""
        taps, dynamics = self.conv1d.taps(self.mamba_activation), self.dynamics
        return step(cache, x, lambda slots, at: self.ops.space_step(slots, at, mixed, dt, taps, dynamics))

    def scan(self, x: mx.array, mixed: mx.array, dt: mx.array, cache: StateCache) -> mx.array:
        """Outputs `[B, L, mamba_inner]` of any number of tokens."""
        states, dynamics = cache.read(x), self.dynamics
        mixed, rows = self.conv1d(mixed, states["conv"], activation=self.mamba_activation, each=cache.reserved)
        scan = self.ops.state_space
        outputs, after = (
            each_token(scan, mixed, dt, dynamics, states["states"])
            if cache.reserved
            else scan(mixed, dt, dynamics, states["states"])
        )
        cache.write(x.shape[1], conv=rows, states=after)
        return outputs

    def project(self, x: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """What `x` `[B, L, hidden_size]` says: the gate, what is convolved, and the steps, each `[B, L, ..]`."""
        gate, mixed, dt = mx.split(self.in_proj(x), [self.mamba_inner, self.mamba_inner + self.mamba_channels], axis=-1)
        return gate, mixed, dt
