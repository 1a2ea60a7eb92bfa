"""Blocks and decoders that families build on: the order of norms and sublayers, and the frame around the layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import mlx.core as mx

from runner.cache.several import Memories
from runner.config.base import Config
from runner.nn.batch import Batch
from runner.nn.fast import LayerNorm, RMSNorm, provided_ops, soft_capped
from runner.nn.linear import HIDDEN, VOCAB, Embedding, Linear
from runner.nn.mlp import ConfiguredMLP, FeedForward
from runner.ops.table import Ops
from runner.weights.module import Module
from runner.weights.tags import Choice, Chooses, Header, setting, weight
from runner.weights.tree import Size, Tree


class Layer(Protocol):
    """One layer of a decoder: `[B, L, hidden_size]` to the same shape, with what it remembers (`Caches.layers`)."""

    def __call__(self, x: mx.array, batch: Batch, cache: Any) -> mx.array: ...


class Norm(Protocol):
    """A normalization over the last axis."""

    def __call__(self, x: mx.array, eps: float) -> mx.array: ...


@dataclass
class PreNorm(Module, Layer):
    """Llama's order: RMSNorm, attention, add; RMSNorm, MLP, add. The residual stream itself is never normalized."""

    input_layernorm: RMSNorm = weight("input_layernorm", HIDDEN)
    self_attn: Layer = weight("self_attn")
    post_attention_layernorm: RMSNorm = weight("post_attention_layernorm", HIDDEN)
    mlp: FeedForward = weight("mlp")
    rms_norm_eps: float = setting()

    def __call__(self, x: mx.array, batch: Batch, cache: Any) -> mx.array:
        attended = self.self_attn(self.input_layernorm(x, self.rms_norm_eps), batch, cache)
        # The add and the next norm in one call, which devices may fuse.
        x, normed = self.post_attention_layernorm.add(x, attended, self.rms_norm_eps)
        return x + self.mlp(normed)


@dataclass
class PostNorm(Module, Layer):
    """OLMo 2's order: attention, RMSNorm, add; MLP, RMSNorm, add."""

    self_attn: Layer = weight("self_attn")
    post_attention_layernorm: RMSNorm = weight("post_attention_layernorm", HIDDEN)
    mlp: FeedForward = weight("mlp")
    post_feedforward_layernorm: RMSNorm = weight("post_feedforward_layernorm", HIDDEN)
    rms_norm_eps: float = setting()

    def __call__(self, x: mx.array, batch: Batch, cache: Any) -> mx.array:
        x = x + self.post_attention_layernorm(self.self_attn(x, batch, cache), self.rms_norm_eps)
        return x + self.post_feedforward_layernorm(self.mlp(x), self.rms_norm_eps)


@dataclass
class BothNorms(PreNorm):
    """Gemma 2's order, under its names: RMSNorm, attention, RMSNorm, add; RMSNorm, MLP, RMSNorm, add."""

    attention_norm: RMSNorm = weight("post_attention_layernorm", HIDDEN)
    post_attention_layernorm: RMSNorm = weight("pre_feedforward_layernorm", HIDDEN)
    mlp_norm: RMSNorm = weight("post_feedforward_layernorm", HIDDEN)
    post_norm_eps: float | None = setting(default=None)

    def __call__(self, x: mx.array, batch: Batch, cache: Any) -> mx.array:
        eps = self.rms_norm_eps
        post_eps = eps if self.post_norm_eps is None else self.post_norm_eps
        attended = self.attention_norm(self.self_attn(self.input_layernorm(x, eps), batch, cache), post_eps)
        x, normed = self.post_attention_layernorm.add(x, attended, eps)
        return x + self.mlp_norm(self.feed(x, normed), post_eps)

    def feed(self, x: mx.array, normed: mx.array) -> mx.array:
        """What the MLP adds to `x`, before its last norm; `normed` is `x` after the norm before the MLP."""
        return self.mlp(normed)


@dataclass
class Sequential(Module, Layer):
    """`PreNorm` with any kind of norm (mostly LayerNorm) and `norm_eps`: norm, attention, add; norm, MLP, add."""

    input_layernorm: Norm = weight("input_layernorm", HIDDEN)
    self_attn: Layer = weight("self_attn")
    post_attention_layernorm: Norm = weight("post_attention_layernorm", HIDDEN)
    mlp: FeedForward = weight("mlp")
    norm_eps: float = setting()

    def __call__(self, x: mx.array, batch: Batch, cache: Any) -> mx.array:
        x = x + self.self_attn(self.input_layernorm(x, self.norm_eps), batch, cache)
        return x + self.mlp(self.post_attention_layernorm(x, self.norm_eps))


@dataclass
class ParallelNorms(Sequential):
    """Attention and MLP in parallel: both read the block's input, each through its own norm; one sum."""

    def __call__(self, x: mx.array, batch: Batch, cache: Any) -> mx.array:
        attended = self.self_attn(self.input_layernorm(x, self.norm_eps), batch, cache)
        return x + attended + self.mlp(self.post_attention_layernorm(x, self.norm_eps))


@dataclass
class Parallel(Module, Layer):
    """Attention and MLP in parallel: both read the block's input through one norm; one sum."""

    input_layernorm: Norm = weight("input_layernorm", HIDDEN)
    self_attn: Layer = weight("self_attn")
    mlp: FeedForward = weight("mlp")
    norm_eps: float = setting()

    def __call__(self, x: mx.array, batch: Batch, cache: Any) -> mx.array:
        normed = self.input_layernorm(x, self.norm_eps)
        return x + self.self_attn(normed, batch, cache) + self.mlp(normed)


@runtime_checkable
class HasAttentionClass(Protocol):
    """A config whose `attention_class` is the class of the attention in its layer `layer_index`."""

    @property
    def attention_class(self) -> type: ...


class ConfiguredAttention(Chooses):
    """Attention of the class that the config's `attention_class` names: layers of one model may have several."""

    def __call__(self, x: mx.array, batch: Batch, cache: Any) -> mx.array:
        raise NotImplementedError

    @classmethod
    def choose(cls, tree: Tree, shape: tuple[Size, ...], headers: Mapping[str, Header], config: Config) -> Choice:
        assert isinstance(config, HasAttentionClass)
        return Choice(config.attention_class, {})


@runtime_checkable
class HasBlockClass(Protocol):
    """A config whose `block_class` is the class of the model's blocks."""

    @property
    def block_class(self) -> type: ...


class ConfiguredBlock(Chooses):
    """A block of the class that the config's `block_class` names."""

    def __call__(self, x: mx.array, batch: Batch, cache: Any) -> mx.array:
        raise NotImplementedError

    @classmethod
    def choose(cls, tree: Tree, shape: tuple[Size, ...], headers: Mapping[str, Header], config: Config) -> Choice:
        assert isinstance(config, HasBlockClass)
        return Choice(config.block_class, {})


@dataclass
class ConfiguredPreNorm(PreNorm):
    """`PreNorm` with what the config chooses for each layer: attention or what stands in its place, MLP or experts."""

    self_attn: ConfiguredAttention = weight("{mixer}")
    mlp: ConfiguredMLP = weight("mlp")


@dataclass
class SingleBlock(Module, Layer):
    """One sublayer, which the config chooses: RMSNorm, sublayer, add."""

    norm: RMSNorm = weight("norm", HIDDEN)
    mixer: ConfiguredAttention = weight("mixer")
    norm_eps: float = setting()

    def __call__(self, x: mx.array, batch: Batch, cache: Any) -> mx.array:
        return x + self.mixer(self.norm(x, self.norm_eps), batch, cache)


@dataclass
class BaseDecoder(Module):
    """The frame of every decoder: ids to hidden states, hidden states to logits. Subclasses declare the layers."""

    embed_tokens: Embedding = weight("model.embed_tokens", VOCAB, HIDDEN)
    layers: Sequence[Layer] = weight("model.layers", length="num_hidden_layers")
    norm: Norm | None = weight("model.norm", HIDDEN)
    lm_head: Linear = weight("lm_head||model.embed_tokens", VOCAB, HIDDEN, otherwise="tie_word_embeddings")
    norm_eps: float = setting()
    final_logit_softcapping: float | None = setting(default=None)
    ops: Ops = provided_ops()

    def __call__(self, batch: Batch, caches: Memories) -> mx.array:
        """Hidden states `[B, L, hidden_size]` of `batch`; its keys and values are appended to `caches`."""
        return self.run(self.embed(batch), batch, caches)

    def run(self, x: mx.array, batch: Batch, caches: Memories) -> mx.array:
        """Pass `x` `[B, L, hidden_size]` through the layers and the final norm; the shape stays."""
        for index, (layer, cache) in enumerate(zip(self.layers, caches.layers, strict=True)):
            x = self.begun(layer(x, batch, cache), index, batch, caches)
        return x if self.norm is None else self.norm(x, self.norm_eps)

    def begun(self, x: mx.array, index: int, batch: Batch, caches: Memories) -> mx.array:
        """`x`, what comes out of layer `index`: of many tokens, it is computed while later layers are still built.

        Not so where no later layer remembers anything of it: perhaps nobody asks for its logits.
        """
        eager = self.ops.eager
        if eager is not None and index % 2 == 0 and batch.ids.size >= eager and index < caches.last:
            self.ops.schedule(x)
        return x

    def embed(self, batch: Batch) -> mx.array:
        """The input of the first layer, `[B, L, hidden_size]`."""
        return self.embed_tokens(batch.ids)

    def logits(self, hidden: mx.array) -> mx.array:
        """`[..., hidden_size] -> [..., vocab_size]`, soft-capped to +-`final_logit_softcapping` if that is set."""
        logits, cap = self.lm_head(hidden), self.final_logit_softcapping
        return logits if cap is None else self.ops.fused(soft_capped, logits, cap)


@dataclass
class Decoder(BaseDecoder):
    """A decoder whose final norm is an RMSNorm."""

    norm: RMSNorm = weight("model.norm", HIDDEN)


@dataclass
class ConfiguredDecoder(Decoder):
    """A decoder of pre-norm blocks whose attention and MLP the config chooses, layer by layer."""

    layers: Sequence[ConfiguredPreNorm] = weight("model.layers", length="num_hidden_layers")


@dataclass
class Backbone(Decoder):
    """A decoder of single blocks, under Mamba's names: files say `backbone`, transformers 5 has `model`."""

    embed_tokens: Embedding = weight("backbone.embeddings|model.embeddings", VOCAB, HIDDEN)
    layers: Sequence[Layer] = weight("backbone.layers|model.layers", length="num_hidden_layers")
    norm: RMSNorm = weight("backbone.norm_f|model.norm_f", HIDDEN)
    lm_head: Linear = weight(
        "lm_head||backbone.embeddings|model.embeddings", VOCAB, HIDDEN, otherwise="tie_word_embeddings"
    )


@dataclass
class SingleDecoder(Backbone):
    """A backbone of which all blocks are of one kind."""

    layers: Sequence[SingleBlock] = weight("backbone.layers|model.layers", length="num_hidden_layers")


@dataclass
class LayerNormDecoder(BaseDecoder):
    """A decoder whose final norm is a LayerNorm."""

    norm: LayerNorm = weight("model.norm", HIDDEN)
