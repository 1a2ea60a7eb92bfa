"""InternLM 3: a Llama whose two flags for biases have other names.

Source: `transformers.models.internlm3`, which computes it as a Llama.
"""

from __future__ import annotations

from dataclasses import dataclass

from runner.config.base import key
from runner.errors import ConfigError
from runner.models.llama import Llama as Llama
from runner.models.llama import LlamaConfig


@dataclass(frozen=True, kw_only=True)
class InternLM3Config(LlamaConfig):
    """`config.json` of an InternLM 3; as in transformers, `qkv_bias` and `bias` must agree."""

    num_key_value_heads: int = 2
    head_dim: int = 128
    max_position_embeddings: int = 32768
    rms_norm_eps: float = 1e-5
    attention_bias: bool = key("qkv_bias", also="attention_bias", default=False)
    mlp_bias: bool = key("bias", also="mlp_bias", default=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.attention_bias != self.mlp_bias:
            found = f"qkv_bias {self.attention_bias} and bias {self.mlp_bias}"
            raise ConfigError(f"config.json: {found} differ, which is not supported for an InternLM 3")
