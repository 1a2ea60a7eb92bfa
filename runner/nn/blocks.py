"""What families stack: the frame of a decoder, and the orders of a block's norms and sublayers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import mlx.core as mx

from runner.cache.kv import KVCache
from runner.config.base import Config
from runner.nn.batch import Batch
from runner.nn.fast import LayerNorm, RMSNorm
from runner.nn.linear import HIDDEN, VOCAB, Embedding, Linear
from runner.nn.mlp import FeedForward
from runner.weights.tags import Choice, Chooses, Header, setting, weight
from runner.weights.tree import Size, Tree


class Layer(Protocol):
    """What a decoder is a stack of: `[B, L, hidden_size]` to the same, with a cache of its own."""

    def __call__(self, x: mx.array, batch: Batch, cache: KVCache) -> mx.array: ...


class Norm(Protocol):
    """A normalisation of the last axis."""

    def __call__(self, x: mx.array, eps: float) -> mx.array: ...


@dataclass
class PreNorm(Layer):
    """Attention, then MLP, each on a normalised copy of the residual stream that they add to."""

    input_layernorm: RMSNorm = weight("input_layernorm", HIDDEN)
    self_attn: Layer = weight("self_attn")
    post_attention_layernorm: RMSNorm = weight("post_attention_layernorm", HIDDEN)
    mlp: FeedForward = weight("mlp")
    rms_norm_eps: float = setting()

    def __call__(self, x: mx.array, batch: Batch, cache: KVCache) -> mx.array:
        attended = self.self_attn(self.input_layernorm(x, self.rms_norm_eps), batch, cache)
        x, normed = self.post_attention_layernorm.add(x, attended, self.rms_norm_eps)
        return x + self.mlp(normed)


@dataclass
class PostNorm(Layer):
    """Sublayer, norm, add; twice."""

    self_attn: Layer = weight("self_attn")
    post_attention_layernorm: RMSNorm = weight("post_attention_layernorm", HIDDEN)
    mlp: FeedForward = weight("mlp")
    post_feedforward_layernorm: RMSNorm = weight("post_feedforward_layernorm", HIDDEN)
    rms_norm_eps: float = setting()

    def __call__(self, x: mx.array, batch: Batch, cache: KVCache) -> mx.array:
        x = x + self.post_attention_layernorm(self.self_attn(x, batch, cache), self.rms_norm_eps)
        return x + self.post_feedforward_layernorm(self.mlp(x), self.rms_norm_eps)


@dataclass
class BothNorms(PreNorm):
    """Norm, sublayer, norm, add; twice."""

    attention_norm: RMSNorm = weight("post_self_attn_layernorm", HIDDEN)
    mlp_norm: RMSNorm = weight("post_mlp_layernorm", HIDDEN)

    def __call__(self, x: mx.array, batch: Batch, cache: KVCache) -> mx.array:
        eps = self.rms_norm_eps
        attended = self.attention_norm(self.self_attn(self.input_layernorm(x, eps), batch, cache), eps)
        x, normed = self.post_attention_layernorm.add(x, attended, eps)
        return x + self.mlp_norm(self.mlp(normed), eps)


@dataclass
class Sequential(Layer):
    """The same order with LayerNorms: norm, sublayer, add; twice."""

    input_layernorm: Norm = weight("input_layernorm", HIDDEN)
    self_attn: Layer = weight("self_attn")
    post_attention_layernorm: Norm = weight("post_attention_layernorm", HIDDEN)
    mlp: FeedForward = weight("mlp")
    norm_eps: float = setting()

    def __call__(self, x: mx.array, batch: Batch, cache: KVCache) -> mx.array:
        x = x + self.self_attn(self.input_layernorm(x, self.norm_eps), batch, cache)
        return x + self.mlp(self.post_attention_layernorm(x, self.norm_eps))


@dataclass
class ParallelNorms(Sequential):
    """Both sublayers on the block's input, each behind its own norm; one sum."""

    def __call__(self, x: mx.array, batch: Batch, cache: KVCache) -> mx.array:
        attended = self.self_attn(self.input_layernorm(x, self.norm_eps), batch, cache)
        return x + attended + self.mlp(self.post_attention_layernorm(x, self.norm_eps))


@dataclass
class Parallel(Layer):
    """Both sublayers on what one norm gives; one sum."""

    input_layernorm: Norm = weight("input_layernorm", HIDDEN)
    self_attn: Layer = weight("self_attn")
    mlp: FeedForward = weight("mlp")
    norm_eps: float = setting()

    def __call__(self, x: mx.array, batch: Batch, cache: KVCache) -> mx.array:
        normed = self.input_layernorm(x, self.norm_eps)
        return x + self.self_attn(normed, batch, cache) + self.mlp(normed)


@runtime_checkable
class HasBlockClass(Protocol):
    """A config that says how its blocks are laid out."""

    @property
    def block_class(self) -> type: ...


class ConfiguredBlock(Chooses):
    """A block of the class that the config's `block_class` names."""

    def __call__(self, x: mx.array, batch: Batch, cache: KVCache) -> mx.array:
        raise NotImplementedError

    @classmethod
    def choose(cls, tree: Tree, shape: tuple[Size, ...], headers: Mapping[str, Header], config: Config) -> Choice:
        assert isinstance(config, HasBlockClass)
        return Choice(config.block_class, {})


@dataclass
class BaseDecoder:
    """What every decoder has: ids to hidden states, hidden states to logits. Subclasses say which layers."""

    embed_tokens: Embedding = weight("model.embed_tokens", VOCAB, HIDDEN)
    layers: Sequence[Layer] = weight("model.layers", length="num_hidden_layers")
    norm: Norm | None = weight("model.norm", HIDDEN)
    lm_head: Linear = weight("lm_head||model.embed_tokens", VOCAB, HIDDEN, otherwise="tie_word_embeddings")
    norm_eps: float = setting()
    final_logit_softcapping: float | None = setting(default=None)

    def __call__(self, batch: Batch, caches: list[KVCache]) -> mx.array:
        """Hidden states `[B, L, hidden_size]` of `batch`, whose keys and values join `caches`."""
        return self.run(self.embed(batch), batch, caches)

    def run(self, x: mx.array, batch: Batch, caches: list[KVCache]) -> mx.array:
        """The layers and the last norm, `[B, L, hidden_size]` to the same."""
        for layer, cache in zip(self.layers, caches, strict=True):
            x = layer(x, batch, cache)
        return x if self.norm is None else self.norm(x, self.norm_eps)

    def embed(self, batch: Batch) -> mx.array:
        """What the first layer sees, `[B, L, hidden_size]`."""
        return self.embed_tokens(batch.ids)

    def logits(self, hidden: mx.array) -> mx.array:
        """`[..., hidden_size] -> [..., vocab_size]`, within plus and minus `final_logit_softcapping` if there is one."""
        logits, cap = self.lm_head(hidden), self.final_logit_softcapping
        return logits if cap is None else mx.tanh(logits / cap) * cap


@dataclass
class Decoder(BaseDecoder):
    """A frame with an RMSNorm at the end."""

    norm: RMSNorm = weight("model.norm", HIDDEN)


@dataclass
class LayerNormDecoder(BaseDecoder):
    """A frame with a LayerNorm at the end."""

    norm: LayerNorm = weight("model.norm", HIDDEN)
