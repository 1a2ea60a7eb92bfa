"""dots.llm1: Qwen 3's attention, and DeepSeek V3's experts.

Source: arXiv:2506.05767, and `transformers.models.dots1`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from runner.config.base import key
from runner.config.decoder import WindowedConfig
from runner.config.layer_types import FULL, SLIDING
from runner.models import qwen3
from runner.models.deepseek_v3 import BalancedConfig
from runner.nn.blocks import ConfiguredDecoder as ConfiguredDecoder


@dataclass(frozen=True, kw_only=True)
class Dots1Config(BalancedConfig, WindowedConfig):
    """`config.json` of a dots.llm1; layers from `max_window_layers` on have the sliding window.

    Published files name V3's way of choosing experts, `noaux_tc`, where V3's name its scores, sigmoid.
    """

    num_key_value_heads: int = 32
    num_experts: int = key("n_routed_experts", also="num_local_experts", default=128)
    n_shared_experts: int = key(default=2, minimum=0)
    num_experts_per_tok: int = 6
    norm_topk_prob: bool = False
    max_window_layers: int = key(default=62, minimum=0)

    def __post_init__(self) -> None:
        if self.scoring_func == "noaux_tc":
            object.__setattr__(self, "scoring_func", "sigmoid")
        super().__post_init__()

    @property
    def attention_class(self) -> type:
        return qwen3.Attention

    @property
    def usual_layer_types(self) -> Sequence[str]:
        windowed = self.sliding_window is not None
        return [SLIDING if windowed and i >= self.max_window_layers else FULL for i in range(self.num_hidden_layers)]
