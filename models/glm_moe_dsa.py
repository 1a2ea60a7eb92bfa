"""GLM-5: DeepSeek V3.2 in other sizes, whose indexer turns neighbouring pairs and may choose for several layers.

Source: arXiv:2602.15763, and `transformers.models.glm_moe_dsa`.
"""

from __future__ import annotations

from dataclasses import dataclass

from runner.config.base import key
from runner.errors import ConfigError
from runner.models.deepseek_v32 import DeepseekV32Config
from runner.nn.blocks import ConfiguredDecoder as ConfiguredDecoder

KINDS = {"F": "full", "S": "shared"}


@dataclass(frozen=True, kw_only=True)
class GlmMoeDsaConfig(DeepseekV32Config):
    """`config.json` of a GLM-5. Layers of the kind "shared" look at what the last "full" one before them chose."""

    rms_norm_eps: float = 1e-5
    max_position_embeddings: int = 202752
    q_lora_rank: int | None = 2048
    qk_nope_head_dim: int = 192
    v_head_dim: int = 256
    n_group: int | None = 1
    topk_group: int | None = 1
    index_n_heads: int = 32
    indexer_rope_interleave: bool = True
    indexer_types: tuple[str, ...] | None = None
    index_topk_pattern: str | tuple[str, ...] | None = None
    index_topk_freq: int = key(default=1, minimum=0)
    index_skip_topk_offset: int = key(default=2, minimum=0)

    def __post_init__(self) -> None:
        pattern = self.index_topk_pattern
        if self.indexer_types is None and pattern is not None:
            named = tuple(KINDS.get(kind, kind) for kind in pattern)
            object.__setattr__(self, "indexer_types", named)
        super().__post_init__()
        kinds = self.indexer_types
        if kinds is not None and (
            len(kinds) != self.num_hidden_layers or set(kinds) - {"full", "shared"} or kinds[0] != "full"
        ):
            raise ConfigError(
                f"config.json: indexer_types must be full or shared for each of {self.num_hidden_layers} layers, the "
                "first of them full"
            )

    def indexing_layer(self, index: int) -> int:
        return next(i for i in range(index, -1, -1) if self.has_indexer(i))

    def has_indexer(self, index: int) -> bool:
        """Whether layer `index` has an indexer of its own."""
        if self.indexer_types is not None:
            return self.indexer_types[index] == "full"
        return max(index - self.index_skip_topk_offset + 1, 0) % max(self.index_topk_freq, 1) == 0
