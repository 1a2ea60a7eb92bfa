"""Gemma 3n (text): four streams of which a layer computes one, an input for each layer, and layers without keys.

AltUp predicts all streams from each other before a layer, and corrects them by what the layer made of one
(arXiv:2301.13310). Source: `transformers.models.gemma3n`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, ClassVar

import mlx.core as mx

from runner.cache.several import Memories
from runner.config import layer_types
from runner.config.base import fixed, key
from runner.config.layered import of_layer
from runner.errors import ConfigError
from runner.models import gemma, llama, qwen3
from runner.models.gemma3_text import Gemma3Config
from runner.nn.altup import AltUp, sized
from runner.nn.batch import Batch
from runner.nn.blocks import BothNorms, ConfiguredAttention
from runner.nn.fast import PlainRMSNorm, RMSNorm
from runner.nn.layer_inputs import LayerInput, LayerInputs
from runner.nn.linear import HIDDEN, Linear
from runner.nn.mlp import ConfiguredMLP
from runner.nn.shared_keys import SharedAttention, SharingConfig
from runner.weights.module import Module
from runner.weights.tags import setting, weight


@dataclass(frozen=True, kw_only=True)
class Gemma3nConfig(Gemma3Config, SharingConfig):
    """`config.json` of a Gemma 3n's text model; coefficients are clipped in training only."""

    INERT: ClassVar[frozenset[str]] = Gemma3Config.INERT | {"altup_coef_clip", "query_pre_attn_scalar"}
    vocab_size: int = 262400
    hidden_size: int = 2048
    num_hidden_layers: int = 35
    num_attention_heads: int = 8
    intermediate_size: tuple[int, ...] | int = 16384  # type: ignore[assignment]
    num_key_value_heads: int = 2
    max_position_embeddings: int = 32768
    query_pre_attn_scalar: float = fixed(1.0)
    sliding_window: int = 512
    sliding_window_pattern: int = fixed(5)
    final_logit_softcapping: float | None = 30.0
    num_kv_shared_layers: int = key(default=15, minimum=0)
    vocab_size_per_layer_input: int = 262144
    hidden_size_per_layer_input: int = 256
    altup_active_idx: int = key(default=0, minimum=0)
    altup_correct_scale: bool = True
    altup_num_inputs: int = 4
    laurel_rank: int = 64
    activation_sparsity_pattern: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.altup_active_idx >= self.altup_num_inputs:
            streams = f"altup_num_inputs = {self.altup_num_inputs}"
            raise ConfigError(f"config.json: altup_active_idx = {self.altup_active_idx}, but {streams}")
        if not all(0 <= share < 1 for share in self.activation_sparsity_pattern or ()):
            raise ConfigError("config.json: activation_sparsity_pattern must have shares from 0 to below 1")

    @property
    def usual_layer_types(self) -> Sequence[str]:
        return layer_types.every(self.pattern, self.num_hidden_layers)

    def layer_settings(self, index: int) -> Mapping[str, Any]:
        width = of_layer(self.intermediate_size, index, self.num_hidden_layers, "intermediate_size")
        return {**super().layer_settings(index), "intermediate_size": width}

    @property
    def sparsity(self) -> float:
        """The share of this layer's gates that are cut off."""
        given, index = self.activation_sparsity_pattern, self.layer_index or 0
        if given is None:
            return 0.95 if self.num_hidden_layers > 10 and index < 10 else 0.0
        return of_layer(given, index, self.num_hidden_layers, "activation_sparsity_pattern")

    @property
    def others(self) -> int:
        """How many streams there are beside the first."""
        return self.altup_num_inputs - 1

    @property
    def stream_width(self) -> int:
        return self.altup_num_inputs * self.hidden_size

    @property
    def attention_class(self) -> type:
        return SharedAttention if self.shares else Attention

    @property
    def mlp_class(self) -> type:
        return SparseMLP if self.sparsity > 0 else llama.MLP


@dataclass
class Attention(qwen3.Attention):
    """Qwen 3's attention with values normalized, too, without a weight."""

    v_norm: PlainRMSNorm = weight("v_norm")

    def heads(self, qkv: mx.array, batch: Batch) -> tuple[mx.array, mx.array, mx.array]:
        q, k, v = super().heads(qkv, batch)
        return q, k, self.v_norm(v, self.norm_eps)


@dataclass
class SparseMLP(llama.MLP):
    """A gated MLP whose gates below a quantile are zero: that of a normal distribution of their mean and deviation."""

    UNDIVIDED = True  # mean and deviation are those of the whole gate
    sparsity: float = setting()

    def __call__(self, x: mx.array) -> mx.array:
        gate, up = mx.split(self.gate_up_proj(x), 2, axis=-1)
        mean, deviation = mx.mean(gate, axis=-1, keepdims=True), mx.std(gate, axis=-1, keepdims=True)
        above = mx.maximum(gate - (mean + deviation * NormalDist().inv_cdf(self.sparsity)), 0)
        return self.down_proj(self.glu(mx.concatenate([above, up], axis=-1)))


@dataclass
class Laurel(Module):
    """A residual of low rank beside attention: `x + norm(right(left(x)))` (arXiv:2411.07501)."""

    left: Linear = weight("linear_left", "laurel_rank", HIDDEN)
    right: Linear = weight("linear_right", HIDDEN, "laurel_rank")
    norm: RMSNorm = weight("post_laurel_norm", HIDDEN)
    norm_eps: float = setting()

    def __call__(self, x: mx.array) -> mx.array:
        return x + self.norm(self.right(self.left(x)), self.norm_eps)


@dataclass
class Block(BothNorms):
    """Gemma 2's norms around a layer of one stream; norms are stored as they are."""

    self_attn: ConfiguredAttention = weight("self_attn")
    mlp: ConfiguredMLP = weight("mlp")
    altup: AltUp = weight("altup")
    laurel: Laurel = weight("laurel")
    layer_input: LayerInput = weight("")

    def __call__(self, x: mx.array, batch: Batch, cache: Any, given: mx.array | None = None) -> mx.array:
        """Streams `[B, L, S, hidden_size]` and the layer's input `[B, L, width]` to the streams after this layer."""
        assert given is not None
        eps = self.rms_norm_eps
        predicted = self.altup.predict(x)
        active = predicted[:, :, self.altup.active]
        normed = self.input_layernorm(active, eps)
        attended = active + self.attention_norm(self.self_attn(normed, batch, cache), eps)
        attended = (attended + self.laurel(normed)) * 2**-0.5
        fed = self.mlp_norm(self.mlp(self.post_attention_layernorm(attended, eps)), eps)
        streams = self.altup.correct(predicted, attended + fed)
        added = self.layer_input(self.altup.output(streams), given)
        # The first stream stays, whichever is the active one.
        return mx.concatenate([streams[:, :, :1], streams[:, :, 1:] + added[:, :, None]], axis=2)


@dataclass
class Gemma3n(gemma.Decoder):
    """The model: embeddings projected to streams of equal size, blocks, streams projected back and averaged, norm."""

    layers: Sequence[Block] = weight("model.layers", length="num_hidden_layers")
    norm: RMSNorm = weight("model.norm", HIDDEN)
    layer_inputs: LayerInputs = weight("model")
    projections: Sequence[Linear] = weight("model.altup_projections.{others}", HIDDEN, HIDDEN)
    unembeddings: Sequence[Linear] = weight("model.altup_unembed_projections.{others}", HIDDEN, HIDDEN)

    def run(self, x: mx.array, batch: Batch, caches: Memories) -> mx.array:
        inputs = self.layer_inputs(batch.ids, x)
        streams = mx.stack([x, *(sized(project(x), x) for project in self.projections)], axis=2)
        for index, (layer, cache) in enumerate(zip(self.layers, caches.layers, strict=True)):
            streams = self.begun(layer(streams, batch, cache, inputs[:, :, index]), index, batch, caches)
        first = streams[:, :, 0]
        others = [sized(project(streams[:, :, i + 1]), first) for i, project in enumerate(self.unembeddings)]
        return self.norm(mx.mean(mx.stack([first, *others]), axis=0), self.norm_eps)
