"""Command-R7B and Command-A: Cohere with a sliding window in three of four layers; full-attention layers have no RoPE.

Source: arXiv:2504.00698, and `transformers.models.cohere2`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from runner.config import layer_types
from runner.config.decoder import WindowedConfig
from runner.errors import ConfigError
from runner.models.cohere import Cohere as Cohere
from runner.models.cohere import CohereConfig

FIXED = {
    "order_of_interleaved_layers": "local_attn_first",
    "position_embedding_type": "rope_gptj",
    "rotary_pct": 1.0,
    "use_embedding_sharing": True,
    "use_gated_activation": True,
    "use_parallel_block": True,
    "use_parallel_embedding": False,
    "use_qk_norm": False,
}
"""Keys that the authors' own code reads; transformers implements these values only."""


@dataclass(frozen=True, kw_only=True)
class Cohere2Config(CohereConfig, WindowedConfig):
    """`config.json` of a Command-R7B; `layer_switch` repeats the pattern, `cache_implementation` is about memory."""

    rope_theta: float = 10000.0
    sliding_window_pattern: int = 4
    layer_switch: int | None = None
    cache_implementation: str | None = None
    order_of_interleaved_layers: str = "local_attn_first"
    position_embedding_type: str = "rope_gptj"
    rotary_pct: float = 1.0
    use_embedding_sharing: bool = True
    use_gated_activation: bool = True
    use_parallel_block: bool = True
    use_parallel_embedding: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, wanted in FIXED.items():
            if vars(self)[name] != wanted:
                raise ConfigError(f"config.json: {name} = {vars(self)[name]!r} is not supported, only {wanted!r}")

    @property
    def usual_layer_types(self) -> Sequence[str]:
        return layer_types.every(self.sliding_window_pattern, self.num_hidden_layers)

    @property
    def rotary_dim(self) -> int:
        return self.head_dim if self.layer_index is None or self.cache_window(self.layer_index) is not None else 0
