"""Gated DeltaNet layers: in place of attention, a state of fixed size that the gated delta rule moves with each token.

Source: arXiv:2412.06464, and `Qwen3NextGatedDeltaNet` in transformers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import mlx.core as mx

from runner.cache.recurrent import EachState, StateCache, step
from runner.config import layer_types
from runner.config.base import Config
from runner.config.hybrid import HybridConfig
from runner.config.memory import State
from runner.errors import ConfigError
from runner.nn.batch import Batch
from runner.nn.fast import provided_ops
from runner.nn.gated_norm import NormThenGate
from runner.nn.linear import HIDDEN, Linear
from runner.nn.short_conv import ShortConv
from runner.ops.delta_rule import Gates, Recurrence
from runner.ops.table import Ops
from runner.weights.module import Module
from runner.weights.tags import Choice, Header, setting, weight
from runner.weights.transforms import permute_rows
from runner.weights.tree import Join, Size, Tree

CHANNELS, HEADS = "linear_channels", "linear_num_value_heads"
KEYS, VALUES = "linear_num_key_heads*linear_key_head_dim", f"{HEADS}*linear_value_head_dim"
"""Dimensions as tags spell them: what is convolved, heads of the state, queries or keys, values."""


@dataclass(frozen=True, kw_only=True)
class DeltaNetConfig(HybridConfig):
    """Config of a hybrid whose layers without attention are Gated DeltaNets.

    A key head serves as many value heads as there are for each; `full_attention_interval` stands for `layer_types`
    where a file lacks these: every so many-th layer has attention.
    """

    OTHER_NAME: ClassVar[str] = "linear_attn"
    linear_conv_kernel_dim: int = 4
    linear_key_head_dim: int = 128
    linear_value_head_dim: int = 128
    linear_num_key_heads: int = 16
    linear_num_value_heads: int = 32
    full_attention_interval: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.linear_num_value_heads % self.linear_num_key_heads:
            raise ConfigError(
                f"config.json: linear_num_value_heads ({self.linear_num_value_heads}) must be a multiple of "
                f"linear_num_key_heads ({self.linear_num_key_heads})"
            )

    @property
    def usual_layer_types(self) -> Sequence[str]:
        return layer_types.every(self.full_attention_interval, self.num_hidden_layers, self.OTHER)

    @property
    def state(self) -> State:
        delta = (self.linear_num_value_heads, self.linear_value_head_dim, self.linear_key_head_dim)
        rows = (self.linear_conv_kernel_dim - 1, self.linear_channels)
        return State({"conv": rows, "delta": delta}, {"delta": "float32"})

    @property
    def gated_norm_groups(self) -> int:
        """Parts of a layer's output that are normalized by themselves: the heads."""
        return self.linear_num_value_heads

    @property
    def linear_channels(self) -> int:
        """Numbers of a token that are convolved: queries and keys, then values."""
        keys = self.linear_num_key_heads * self.linear_key_head_dim
        return 2 * keys + self.linear_num_value_heads * self.linear_value_head_dim


class Projected(NamedTuple):
    """What a layer makes of its input, each `[B, L, ..]`: queries, keys and values side by side, and three gates.

    `z` `[.., values]` gates the output, `b` and `a` `[.., heads]` are those of `runner.ops.delta_rule.Gates`.
    """

    qkv: mx.array
    z: mx.array
    b: mx.array
    a: mx.array


@dataclass
class GatedDeltaNet(Module):
    """The layer: a short convolution over queries, keys and values, the gated delta rule, a gated norm.

    Subclasses say how the projections are stored.
    """

    conv1d: ShortConv = weight("conv1d", CHANNELS, "linear_conv_kernel_dim")
    norm: NormThenGate = weight("norm", "linear_value_head_dim")
    out_proj: Linear = weight("out_proj", HIDDEN, VALUES)
    a_log: mx.array = weight("A_log", HEADS, exact=True)
    dt_bias: mx.array = weight("dt_bias", HEADS, exact=True)
    linear_num_key_heads: int = setting()
    linear_key_head_dim: int = setting()
    linear_num_value_heads: int = setting()
    linear_value_head_dim: int = setting()
    linear_channels: int = setting()
    rms_norm_eps: float = setting()
    hidden_act: str = setting()
    ops: Ops = provided_ops()

    def project(self, x: mx.array) -> Projected:
        """Queries, keys, values and gates of `x` `[B, L, hidden_size]`."""
        raise NotImplementedError

    def __call__(self, x: mx.array, batch: Batch, cache: StateCache) -> mx.array:
        projected = self.project(x)
        told = (x, projected.qkv, projected.a, projected.b)
        outputs = self.step(cache, *told)
        if outputs is None:
            outputs = batch.apart(self.recurrence, cache, *told)
        normed = self.norm(outputs.flatten(2), projected.z, self.rms_norm_eps)
        return self.out_proj(normed.astype(x.dtype))

    def recurrence(self, cache: StateCache, x: mx.array, qkv: mx.array, a: mx.array, b: mx.array) -> mx.array:
        """Outputs `[B, L, heads, dv]`, before the norm."""
        outputs = self.step(cache, x, qkv, a, b)
        return self.scan(x, qkv, Gates(a, b, self.a_log, self.dt_bias), cache) if outputs is None else outputs

    def step(self, cache: EachState, x: mx.array, qkv: mx.array, a: mx.array, b: mx.array) -> mx.array | None:
        """Outputs `[B, L, heads, dv]` of one token of each request, moved in place; None where it cannot be."""
        taps, gates = self.conv1d.taps(self.hidden_act), Gates(a, b, self.a_log, self.dt_bias)
        heads = self.linear_num_key_heads
        return step(cache, x, lambda slots, at: self.ops.delta_step(slots, at, qkv, taps, gates, heads))

    def scan(self, x: mx.array, qkv: mx.array, gates: Gates, cache: StateCache) -> mx.array:
        """Outputs `[B, L, heads, dv]` of any number of tokens, in float32."""
        batches, length, _ = x.shape
        states = cache.read(x)
        mixed, rows = self.conv1d(qkv, states["conv"], activation=self.hidden_act, each=cache.reserved)
        keys = self.linear_num_key_heads * self.linear_key_head_dim
        # Widened once, while a token is still one row; all that follows is computed in float32.
        q, k, v = mx.split(mixed.astype(mx.float32), [keys, 2 * keys], axis=-1)
        q, k = (part.reshape(batches, length, self.linear_num_key_heads, -1) for part in (q, k))
        v = v.reshape(batches, length, self.linear_num_value_heads, -1)
        outputs, state = (
            each_token(self.ops, q, k, v, gates, states["delta"])
            if cache.reserved
            else self.ops.gated_delta(q, k, v, gates, states["delta"])
        )
        cache.write(length, conv=rows, delta=state)
        return outputs


def each_token(ops: Ops, q: mx.array, k: mx.array, v: mx.array, gates: Gates, state: mx.array) -> Recurrence:
    """`Ops.gated_delta`, but with the states behind each of the tokens `[L, B, heads, dv, dk]`."""
    outputs, states = [], []
    for t in range(v.shape[1]):
        now = slice(t, t + 1)
        gate = gates._replace(a=gates.a[:, now], b=gates.b[:, now])
        output, state = ops.gated_delta(q[:, now], k[:, now], v[:, now], gate, state)
        outputs.append(output)
        states.append(state)
    return mx.concatenate(outputs, axis=1), mx.stack(states)


class ByKeyHead(Linear):
    """A matrix whose rows are sorted by key head: each one's parts one after the other.

    Reading puts the parts in order, each with the rows of all heads: queries, keys, values, z; or b, a. Parts that are
    stored apart (GGUF: z, and the three others) are in order.
    """

    @classmethod
    def choose(cls, tree: Tree, shape: tuple[Size, ...], headers: Mapping[str, Header], config: Config) -> Choice:
        assert isinstance(config, DeltaNetConfig)
        choice, heads, parts = Linear.choose(tree, shape, headers, config), config.linear_num_key_heads, shape[0]
        assert isinstance(parts, tuple)
        if isinstance(tree, Join):
            return choice
        if parts[0] == config.linear_channels:
            keys = heads * config.linear_key_head_dim
            parts = (keys, keys, parts[0] - 2 * keys, parts[1])
        order = permute_rows(f"{parts} of {heads} heads", lambda rows: by_part(parts, heads))
        return Choice(choice.cls, {**choice.scope, "transform": order})


def by_part(parts: Sequence[int], heads: int) -> list[int]:
    """The stored row of each row of the parts, whose rows lie head by head: a share of each part in every head."""
    shares = [part // heads for part in parts]
    starts = [sum(shares[:index]) for index in range(len(parts))]
    head = sum(shares)
    places = [(h * head + start, share) for start, share in zip(starts, shares, strict=True) for h in range(heads)]
    return [first + i for first, share in places for i in range(share)]
