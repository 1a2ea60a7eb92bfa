"""DeepSeek V3.2: V3 with an indexer, which chooses the tokens that attention looks at.

Sources: arXiv:2512.02556, and `transformers.models.deepseek_v32`.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from runner.cache.kv import KVCache
from runner.config.base import key
from runner.config.memory import Memory, Rows
from runner.errors import ConfigError
from runner.models.deepseek_v3 import DeepseekV3Config, ListedExpertsConfig
from runner.nn.batch import Batch
from runner.nn.blocks import ConfiguredDecoder as ConfiguredDecoder
from runner.nn.indexer import Chosen, Indexer, narrowing
from runner.nn.mla import LatentAttention, LatentQueries
from runner.weights.tags import setting, weight

INDEXED = "indexed_attention"


@dataclass(frozen=True, kw_only=True)
class DeepseekV32Config(ListedExpertsConfig, DeepseekV3Config):
    """`config.json` of a DeepSeek V3.2; layer `num_hidden_layers` of its files is for multi-token prediction."""

    max_position_embeddings: int = 163840
    first_k_dense_replace: int = key(default=3, minimum=0)
    n_group: int | None = 8
    topk_group: int | None = 4
    routed_scaling_factor: float = 2.5
    num_nextn_predict_layers: int = key(also="num_mtp_layers", default=1, minimum=0)
    layer_types: tuple[str, ...] | None = None
    index_topk: int = 2048
    index_head_dim: int = 128
    index_n_heads: int = 64
    indexer_rope_interleave: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.q_lora_rank is None:
            raise ConfigError("config.json: q_lora_rank must be set: the indexer reads the query latent")
        if set(self.layer_types or ()) - {INDEXED}:
            raise ConfigError(
                f"config.json: layer_types can only be {INDEXED}, not {sorted(set(self.layer_types or ()))}"
            )
        if self.index_head_dim <= self.qk_rope_head_dim:
            sizes = f"{self.index_head_dim} and qk_rope_head_dim = {self.qk_rope_head_dim}"
            raise ConfigError(f"config.json: index_head_dim = {sizes}: it must be larger")

    @property
    def attention_class(self) -> type:
        return Attention

    def indexing_layer(self, index: int) -> int:
        """The layer whose indexer chooses for layer `index`: its own."""
        return index

    @property
    def indexed_by(self) -> int:
        """The layer whose indexer chooses for this one."""
        return self.indexing_layer(self.layer_index or 0)

    @property
    def indexes(self) -> bool:
        """Whether this layer has an indexer of its own."""
        return self.indexed_by == (self.layer_index or 0)

    def memory(self, index: int) -> tuple[Memory, ...]:
        if self.indexing_layer(index) != index:
            return super().memory(index)
        # The indexer's key, its rotated part and the rest.
        rotated = self.qk_rope_head_dim
        return (*super().memory(index), Rows(1, rotated, self.index_head_dim - rotated, joined=True))


@dataclass
class Attention(LatentAttention):
    """Latent attention over the tokens that an indexer chose: this layer's, or that of an earlier one."""

    queries: LatentQueries = weight("")
    indexer: Indexer | None = weight("indexer", when="indexes")
    indexed_by: int = setting()

    def __call__(self, x: mx.array, batch: Batch, cache: KVCache | tuple[KVCache, KVCache]) -> mx.array:
        latent = self.queries.latent(x)
        rows, keys = cache if isinstance(cache, tuple) else (cache, None)

        def choose() -> Chosen:
            assert self.indexer is not None and keys is not None, "a layer without an indexer came before the first one"
            return self.indexer(x, latent, batch, keys)

        chosen = batch.once((Indexer, self.indexed_by), choose)
        return self.attended(self.queries.q_b_proj(latent), x, batch, rows, narrowing(chosen, self.attend.ops))
