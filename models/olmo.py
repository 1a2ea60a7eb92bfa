"""OLMo 1: LayerNorms without weights, and in some checkpoints q, k and v clipped.

Source: arXiv:2402.00838, and `transformers.models.olmo`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from runner.cache import Batch, KVCache
from runner.fast import Ops, provided_ops
from runner.models import llama
from runner.models.llama import LlamaConfig
from runner.weights import setting, weight


@dataclass(frozen=True, kw_only=True)
class OlmoConfig(LlamaConfig):
    """`config.json` of an OLMo; the norms' epsilon is fixed."""

    clip_qkv: float | None = None

    @property
    def norm_eps(self) -> float:
        return 1e-5


@dataclass
class PlainNorm:
    """A LayerNorm that learnt nothing; takes no tensor."""

    ops: Ops = provided_ops()

    def __call__(self, x: mx.array, eps: float) -> mx.array:
        return self.ops.layer_norm(x, None, None, eps)


@dataclass
class Attention(llama.Attention):
    """Numbers beyond the clip are cut off."""

    clip_qkv: float | None = setting()

    def heads(self, qkv: mx.array, batch: Batch) -> tuple[mx.array, mx.array, mx.array]:
        clip = self.clip_qkv
        return super().heads(qkv if clip is None else mx.clip(qkv, -clip, clip), batch)


@dataclass
class Block(llama.Layer):
    """Norm, sublayer, add; twice."""

    norm: PlainNorm
    self_attn: Attention = weight("self_attn")
    mlp: llama.MLP = weight("mlp")
    norm_eps: float = setting()

    def __call__(self, x: mx.array, batch: Batch, cache: KVCache) -> mx.array:
        x = x + self.self_attn(self.norm(x, self.norm_eps), batch, cache)
        return x + self.mlp(self.norm(x, self.norm_eps))


@dataclass
class Olmo(llama.Frame):
    """Llama's frame with those."""

    layers: Sequence[Block] = weight("model.layers", length="num_hidden_layers")
    norm: PlainNorm = weight("")
