"""MiniCPM 3: DeepSeek's latent attention in a dense model, with Granite's multipliers under other names.

Source: arXiv:2404.06395 (the scales), and `transformers.models.minicpm3`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from runner.config.base import key
from runner.models import granite, llama
from runner.nn.mla import LatentAttention, LatentConfig
from runner.weights.tags import weight


@dataclass(frozen=True, kw_only=True)
class MiniCPM3Config(LatentConfig):
    """`config.json` of a MiniCPM 3. A null `scale_depth` or `dim_model_base` leaves sublayers or logits as they are."""

    NULL: ClassVar[Mapping[str, object]] = {**LatentConfig.NULL, "v_head_dim": 0}
    max_position_embeddings: int = 32768
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = True
    q_lora_rank: int | None = 768
    kv_lora_rank: int = 256
    qk_nope_head_dim: int = 64
    qk_rope_head_dim: int = 32
    v_head_dim: int = key(default=0, minimum=0)
    scale_emb: float = 12.0
    scale_depth: float | None = 1.4
    dim_model_base: int | None = 256

    def __post_init__(self) -> None:
        object.__setattr__(self, "v_head_dim", self.v_head_dim or self.hidden_size // self.num_attention_heads)
        super().__post_init__()

    @property
    def traditional(self) -> bool:
        return False

    @property
    def embedding_multiplier(self) -> float:
        """What embeddings are multiplied by."""
        return self.scale_emb

    @property
    def residual_multiplier(self) -> float:
        """What a sublayer's output is multiplied by before it is added."""
        return 1.0 if self.scale_depth is None else float(self.scale_depth / self.num_hidden_layers**0.5)

    @property
    def logits_scaling(self) -> float:
        """What logits are divided by."""
        return self.hidden_size / (self.dim_model_base or self.hidden_size)


@dataclass
class Block(granite.ScaledPreNorm):
    """Granite's scaled residual branches around latent attention and Llama's MLP."""

    self_attn: LatentAttention = weight("self_attn")
    mlp: llama.MLP = weight("mlp")


@dataclass
class MiniCPM3(granite.Decoder):
    """The model: scaled embeddings, MiniCPM 3 blocks, RMSNorm, head with scaled logits."""

    layers: Sequence[Block] = weight("model.layers", length="num_hidden_layers")
