"""MiMo 7B: a Qwen 2 with layers for multi-token prediction, which are left unread.

Source: arXiv:2505.07608, whose code subclasses transformers' Qwen 2.
"""

from __future__ import annotations

from dataclasses import dataclass

from runner.config.base import key
from runner.models.qwen2 import Qwen2 as Qwen2
from runner.models.qwen2 import Qwen2Config


@dataclass(frozen=True, kw_only=True)
class MiMoConfig(Qwen2Config):
    """`config.json` of a MiMo."""

    num_nextn_predict_layers: int = key(default=0, minimum=0)

    def ignores(self, name: str) -> bool:
        return name.startswith("model.mtp_layers.")
