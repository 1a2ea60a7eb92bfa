"""IQuest-Coder: a Llama with other defaults.

Source: `transformers.models.iquestcoder`, which computes it as a Llama.
"""

from __future__ import annotations

from dataclasses import dataclass

from runner.models.llama import Llama as Llama
from runner.models.llama import LlamaConfig


@dataclass(frozen=True, kw_only=True)
class IQuestCoderConfig(LlamaConfig):
    """`config.json` of an IQuest-Coder."""

    num_key_value_heads: int = 8
    head_dim: int = 128
    max_position_embeddings: int = 131072
    rms_norm_eps: float = 1e-5
