"""Phi 3.5 MoE: Llama's attention between LayerNorms with biases, and two experts by SparseMixer.

Sources: arXiv:2404.14219, SparseMixer arXiv:2310.00811, and `transformers.models.phimoe`. Past the original context
RoPE has LongRoPE's long factors, as in the authors' code; transformers 5.23 keeps the short ones there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import mlx.core as mx

from runner.errors import ConfigError
from runner.models import llama, mixtral
from runner.models.mixtral import MixtralConfig
from runner.nn.blocks import LayerNormDecoder, Sequential
from runner.nn.fast import LayerNorm
from runner.nn.linear import HIDDEN, VOCAB, Linear
from runner.weights.tags import setting, weight

SCALES = ("short_mscale", "long_mscale")


@dataclass(frozen=True, kw_only=True)
class PhimoeConfig(MixtralConfig):
    """`config.json` of a Phi 3.5 MoE. `router_jitter_noise` decides how far below the best score another one counts;
    `input_jitter_noise` matters in training only.
    """

    router_jitter_noise: float = 0.01
    input_jitter_noise: float | None = None
    lm_head_bias: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_experts_per_tok != 2 or self.num_local_experts < 2:
            raise ConfigError(
                "config.json: a Phi 3.5 MoE chooses two experts, as SparseMixer does, and no other number"
            )
        if self.lm_head_bias and self.tie_word_embeddings:
            raise ConfigError("config.json: tie_word_embeddings is not supported for a head with a bias")

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Self:
        place = "rope_parameters" if isinstance(raw.get("rope_parameters"), Mapping) else "rope_scaling"
        scaling = raw.get(place)
        if not isinstance(scaling, Mapping) or not set(SCALES) & set(scaling):
            return super().from_dict(raw)
        config = super().from_dict({**raw, place: {k: v for k, v in scaling.items() if k not in SCALES}})
        if config.rope_scaling is not None:
            short, long = (scaling.get(name) for name in SCALES)
            if not all(isinstance(scale, int | float) and 0 < scale < 1e6 for scale in (short, long)):
                raise ConfigError(
                    f"config.json: {place} needs positive {' and '.join(SCALES)}, not {short!r} and {long!r}"
                )
            scaled = dataclasses.replace(config.rope_scaling, short_mscale=short, long_mscale=long)
            object.__setattr__(config, "rope_scaling", scaled)
        return config


@dataclass
class MoE(mixtral.MoE):
    """Mixtral's experts; each of two is the best of those left, weighed by a softmax over the scores close to its."""

    router: Linear = weight("gate|router", "num_local_experts", HIDDEN, exact=True)
    router_jitter_noise: float = setting()

    def route(self, x: mx.array) -> tuple[mx.array, mx.array]:
        scores = self.router(x.astype(mx.float32)).astype(mx.float32)
        first, weighed = self.best(scores, scores)
        second, too = self.best(mx.put_along_axis(scores, first, mx.array(-mx.inf), axis=-1), scores)
        return mx.concatenate([first, second], axis=-1), mx.concatenate([weighed, too], axis=-1)

    def best(self, left: mx.array, scores: mx.array) -> tuple[mx.array, mx.array]:
        """Index and routing weight, `[B, L, 1]`, of the largest of the `left` scores; the others are minus infinity."""
        index = mx.argmax(left, axis=-1, keepdims=True)
        top = mx.take_along_axis(left, index, axis=-1)
        far = (top - scores) / mx.maximum(mx.abs(scores), top) > 2 * self.router_jitter_noise
        return index, mx.take_along_axis(mx.softmax(mx.where(far, -mx.inf, left), axis=-1), index, axis=-1)


@dataclass
class Block(Sequential):
    """A Llama block with LayerNorms, and experts instead of the MLP."""

    input_layernorm: LayerNorm = weight("input_layernorm", HIDDEN)
    self_attn: llama.Attention = weight("self_attn")
    post_attention_layernorm: LayerNorm = weight("post_attention_layernorm", HIDDEN)
    mlp: MoE = weight("block_sparse_moe|mlp")


@dataclass
class Phimoe(LayerNormDecoder):
    """The model: embeddings, Phi 3.5 MoE blocks, LayerNorm, head."""

    layers: Sequence[Block] = weight("model.layers", length="num_hidden_layers")
    lm_head: Linear = weight(
        "lm_head||model.embed_tokens", VOCAB, HIDDEN, otherwise="tie_word_embeddings", bias="lm_head_bias"
    )
