"""MPT: ALiBi, LayerNorms without biases, and linear layers without biases, q, k and v as one matrix.

Source: `transformers.models.mpt`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from runner.config.base import fixed, key
from runner.config.decoder import UnrotatedConfig
from runner.errors import ConfigError
from runner.models import olmo
from runner.models.bloom import AlibiDecoder
from runner.nn.blocks import Sequential
from runner.nn.fast import ScaledLayerNorm
from runner.nn.linear import HIDDEN, KV, VOCAB, Embedding, Linear, Q
from runner.nn.mlp import PlainMLP
from runner.weights.tags import weight


@dataclass(frozen=True, kw_only=True)
class MptConfig(UnrotatedConfig):
    """`config.json` of an MPT; `attn_config` is an object of its own. As in transformers, which always adds ALiBi's
    biases, other positions are not supported.
    """

    ONLY: ClassVar[Mapping[str, object]] = {
        "alibi": True, "alibi_bias_max": 8, "attn_type": "multihead_attention", "attn_uses_sequence_id": False,
        "embedding_fraction": 1.0, "expansion_ratio": 4, "no_bias": True, "prefix_lm": False, "qk_ln": False,
    }  # fmt: skip
    INERT: ClassVar[frozenset[str]] = frozenset(
        {"attn_impl", "emb_pdrop", "init_device", "learned_pos_emb", "norm_type", "attn_pdrop", "resid_pdrop"}
    )
    hidden_size: int = key("d_model", also="hidden_size", default=2048)
    num_hidden_layers: int = key("n_layers", also="num_hidden_layers", default=24)
    num_attention_heads: int = key("n_heads", also="num_attention_heads", default=16)
    max_position_embeddings: int = key("max_seq_len", default=2048)
    intermediate_size: int = fixed(0)
    hidden_act: str = fixed("gelu")
    layer_norm_eps: float = key("layer_norm_epsilon", default=1e-5)
    tie_word_embeddings: bool = True
    clip_qkv: float | None = None
    softmax_scale: float | None = None

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Self:
        inner = raw.get("attn_config") or {}
        if not isinstance(inner, Mapping):
            raise ConfigError(f"config.json: attn_config must be an object, not {inner!r}")
        values = {name: value for name, value in raw.items() if name != "attn_config"}
        return super().from_dict({**{k: v for k, v in inner.items() if k != "model_type"}, **values})

    def __post_init__(self) -> None:
        object.__setattr__(self, "intermediate_size", 4 * self.hidden_size)
        super().__post_init__()

    @property
    def attention_scale(self) -> float:
        return super().attention_scale if self.softmax_scale is None else self.softmax_scale


@dataclass
class Attention(olmo.Attention):
    """Attention without rotation that clips q, k and v as OLMo does."""

    qkv_proj: Linear = weight("Wqkv", (Q, KV, KV), HIDDEN)
    o_proj: Linear = weight("out_proj", HIDDEN, Q)


@dataclass
class Block(Sequential):
    """A pre-norm block with LayerNorms that have no biases."""

    input_layernorm: ScaledLayerNorm = weight("norm_1", HIDDEN)
    self_attn: Attention = weight("attn")
    post_attention_layernorm: ScaledLayerNorm = weight("norm_2", HIDDEN)
    mlp: PlainMLP = weight("ffn")


@dataclass
class Mpt(AlibiDecoder):
    """The model: embeddings, MPT blocks, LayerNorm, head."""

    embed_tokens: Embedding = weight("transformer.wte", VOCAB, HIDDEN)
    layers: Sequence[Block] = weight("transformer.blocks", length="num_hidden_layers")
    norm: ScaledLayerNorm = weight("transformer.norm_f", HIDDEN)
    lm_head: Linear = weight("lm_head||transformer.wte", VOCAB, HIDDEN, otherwise="tie_word_embeddings")
