"""Feed-forward layers: plain, gated, and one whose class the config chooses layer by layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import mlx.core as mx

from runner.config.base import Config
from runner.nn.fast import provided_ops
from runner.nn.linear import HIDDEN, INTERMEDIATE, Linear
from runner.ops.table import Ops
from runner.weights.module import Module
from runner.weights.tags import Choice, Chooses, Header, setting, weight
from runner.weights.tree import Size, Tree


@dataclass
class GLU(Module):
    """The gated activation `act(gate) * up` (arXiv:2002.05202); input is gate and up, `[..., 2 I] -> [..., I]`."""

    activation: str = setting("hidden_act", default="silu")
    ops: Ops = provided_ops()

    def __call__(self, gate_up: mx.array) -> mx.array:
        return self.ops.glu(gate_up, self.activation)


@dataclass
class Ungated(GLU):
    """The activation alone, where other layers have a gate: `[..., I]` to the same shape."""

    def __call__(self, up: mx.array) -> mx.array:
        return self.ops.activate(up, self.activation)


@dataclass
class Activation(Module):
    """The activation `hidden_act` of an MLP without a gate."""

    name: str = setting("hidden_act", default="gelu")
    ops: Ops = provided_ops()

    def __call__(self, x: mx.array) -> mx.array:
        return self.ops.activate(x, self.name)


class FeedForward(Protocol):
    """A feed-forward layer: works on each token alone, `[B, L, hidden_size]` to the same shape."""

    def __call__(self, x: mx.array) -> mx.array: ...


@dataclass
class PlainMLP(Module, FeedForward):
    """The MLP without a gate: up, activation, down."""

    act: Activation
    up_proj: Linear = weight("up_proj", INTERMEDIATE, HIDDEN, bias="mlp_bias")
    down_proj: Linear = weight("down_proj", HIDDEN, INTERMEDIATE, bias="mlp_bias")

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(self.act(self.up_proj(x)))


@dataclass
class GatedMLP(Module, FeedForward):
    """A gated MLP of hidden width `$0`, which the parent's tag gives: gate and up as one product, GLU, down."""

    glu: GLU
    gate_up_proj: Linear = weight("{gate,up}_proj", ("$0", "$0"), HIDDEN)
    down_proj: Linear = weight("down_proj", HIDDEN, "$0")

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(self.glu(self.gate_up_proj(x)))


@runtime_checkable
class HasMLPClass(Protocol):
    """A config whose `mlp_class` is the class of the MLP in its layer `layer_index`."""

    @property
    def mlp_class(self) -> type: ...


class ConfiguredMLP(Chooses):
    """An MLP of the class that the config's `mlp_class` names: experts in some layers, a plain MLP in others."""

    def __call__(self, x: mx.array) -> mx.array:
        raise NotImplementedError

    @classmethod
    def choose(cls, tree: Tree, shape: tuple[Size, ...], headers: Mapping[str, Header], config: Config) -> Choice:
        assert isinstance(config, HasMLPClass)
        return Choice(config.mlp_class, {})
