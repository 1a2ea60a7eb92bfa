"""Layers without keys and values of their own: they attend to those of an earlier layer (arXiv:2405.12981)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import mlx.core as mx

from runner.cache.caches import SharedCache
from runner.config.base import key
from runner.config.decoder import WindowedConfig
from runner.config.memory import Memory, Shared
from runner.errors import ConfigError
from runner.nn.attention import Attend, merge_heads, split_heads
from runner.nn.batch import Batch
from runner.nn.fast import RMSNorm, RoPE
from runner.nn.linear import HIDDEN, Linear, Q
from runner.weights.module import Module
from runner.weights.tags import setting, weight

UNUSED = re.compile(r"model\.layers\.(\d{1,4})\.self_attn\.(k_proj|v_proj|k_norm|v_norm)\.")
"""What published files hold for layers without keys, all the same."""


@dataclass(frozen=True, kw_only=True)
class SharingConfig(WindowedConfig):
    """The keys of `config.json` that say how many of the last layers have no keys."""

    num_kv_shared_layers: int = key(default=0, minimum=0)

    def owner(self, index: int) -> int | None:
        """The layer whose keys layer `index` attends to: the last one of its type that has any; None: its own.

        Raises:
            ConfigError: there is no such layer.
        """
        first = self.num_hidden_layers - self.num_kv_shared_layers
        if index < first:
            return None
        owners: Mapping[str, int] = {kind: layer for layer, kind in enumerate(self.kinds[: max(first, 0)])}
        if self.kinds[index] not in owners:
            raise ConfigError(
                f"config.json: num_kv_shared_layers = {self.num_kv_shared_layers}, but none of the layers before them "
                f"is of type {self.kinds[index]}, as layer {index} is"
            )
        return owners[self.kinds[index]]

    @property
    def shares(self) -> bool:
        """Whether this layer has no keys of its own."""
        return self.layer_index is not None and self.owner(self.layer_index) is not None

    def memory(self, index: int) -> tuple[Memory, ...]:
        owner = self.owner(index)
        return super().memory(index) if owner is None else (Shared(owner),)

    def ignores(self, name: str) -> bool:
        found = UNUSED.match(name)
        shares = found is not None and 0 <= self.num_hidden_layers - 1 - int(found[1]) < self.num_kv_shared_layers
        return shares or super().ignores(name)


@dataclass
class SharedAttention(Module):
    """Attention of normalized queries over the keys and values of an earlier layer, those of this pass included."""

    rope: RoPE
    attend: Attend
    q_proj: Linear = weight("q_proj", Q, HIDDEN, bias="attention_bias")
    o_proj: Linear = weight("o_proj", HIDDEN, Q, bias="attention_bias")
    q_norm: RMSNorm = weight("q_norm", "head_dim")
    head_dim: int = setting()
    norm_eps: float = setting()

    def __call__(self, x: mx.array, batch: Batch, cache: SharedCache) -> mx.array:
        q = self.q_norm(split_heads(self.q_proj(x), self.head_dim), self.norm_eps)
        q = self.rope(q, batch.offset, batch.length, once=batch.once)
        return self.o_proj(merge_heads(self.attend(q, cache.history, batch)))
