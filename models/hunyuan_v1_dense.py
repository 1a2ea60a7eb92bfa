"""Hunyuan (dense): a Llama that normalizes q and k after RoPE, whose base is raised once for all lengths, by `alpha`.

Source: `transformers.models.hunyuan_v1_dense`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import mlx.core as mx

from runner.config.base import key
from runner.config.ranges import check_range
from runner.errors import ConfigError
from runner.models import llama
from runner.models.llama import LlamaConfig
from runner.nn import blocks
from runner.nn.batch import Batch
from runner.nn.fast import RMSNorm
from runner.weights.tags import setting, weight


@dataclass(frozen=True, kw_only=True)
class HunyuanConfig(LlamaConfig):
    """`config.json` of a Hunyuan; "dynamic" RoPE with `alpha` has base theta * alpha^(d / (d - 2)) at any length.

    The inert keys are token ids, the settings of `use_cla` (which no file sets), and a classifier's.
    """

    ONLY: ClassVar[Mapping[str, object]] = {"norm_type": "rms", "use_qk_norm": True, "use_rotary_pos_emb": True}
    INERT: ClassVar[frozenset[str]] = frozenset(
        {"cla_share_factor", "class_num", "dense_list", "eod_token_id", "im_end_id", "im_newline_id", "im_start_id"}
        | {"mask_init_id", "org_vocab_size", "pad_id", "pool_type", "text_end_id", "text_start_id"}
    )
    rms_norm_eps: float = 1e-5
    head_dim: int = key(also="attention_head_dim", default=0)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Self:
        place = "rope_parameters" if isinstance(raw.get("rope_parameters"), dict) else "rope_scaling"
        stretched = raw.get(place)
        alpha = stretched.get("alpha") if isinstance(stretched, dict) else None
        if not isinstance(stretched, dict) or alpha is None:
            return super().from_dict(raw)  # no alpha: RoPE scaling as in any Llama
        if (
            isinstance(alpha, bool)
            or not isinstance(alpha, int | float)
            or not 0 < alpha <= 1e9
            or stretched.get("factor", 1.0) != 1.0
        ):
            raise ConfigError(f"config.json: {place} {stretched!r} needs a positive alpha and a factor of 1")
        kept = {"rope_theta": stretched["rope_theta"], "rope_type": "default"} if "rope_theta" in stretched else None
        config = super().from_dict({**raw, place: kept})
        exponent = config.head_dim / max(config.head_dim - 2, 1)
        object.__setattr__(config, "rope_theta", config.rope_theta * alpha**exponent)  # NTK-aware scaling
        check_range("rope_theta", config.rope_theta, f"rope_theta, multiplied for alpha {alpha!r},")
        return config


@dataclass
class Attention(llama.Attention):
    """Llama's attention with an RMSNorm on each head's q and k after RoPE, where Qwen 3 has it before."""

    query_layernorm: RMSNorm = weight("query_layernorm", "head_dim")
    key_layernorm: RMSNorm = weight("key_layernorm", "head_dim")
    rms_norm_eps: float = setting()

    def heads(self, qkv: mx.array, batch: Batch) -> tuple[mx.array, mx.array, mx.array]:
        q, k, v = super().heads(qkv, batch)
        return self.query_layernorm(q, self.rms_norm_eps), self.key_layernorm(k, self.rms_norm_eps), v


@dataclass
class Block(llama.Block):
    """A Llama block with Hunyuan's attention."""

    self_attn: Attention = weight("self_attn")


@dataclass
class Hunyuan(blocks.Decoder):
    """The model: embeddings, Hunyuan blocks, RMSNorm, head."""

    layers: Sequence[Block] = weight("model.layers", length="num_hidden_layers")
