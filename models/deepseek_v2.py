"""DeepSeek V2: keys and values as one compressed latent a token, fine-grained experts in groups, shared experts.

Source: arXiv:2405.04434, and `transformers.models.deepseek_v2`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx

from runner import blocks, moe
from runner.blocks import HIDDEN
from runner.cache import Batch, History, KVCache
from runner.config import Config, key
from runner.errors import ConfigError
from runner.fast import RMSNorm, RoPE
from runner.models import llama
from runner.models.llama import LlamaConfig
from runner.moe import ExpertLinear
from runner.nn import GLU, Attend, Linear, merge_heads, split_heads
from runner.rope import yarn_mscale
from runner.weights import Choice, Chooses, Header, Size, Tree, setting, weight

EXPERT, SHARED, EXPERTS = "moe_intermediate_size", "n_shared_experts*moe_intermediate_size", "n_routed_experts"
LATENT, ROTATED, QUERIES = "kv_lora_rank", "qk_rope_head_dim", "num_attention_heads*qk_head_dim"
NORM_EPS = 1e-6  # of the norms inside attention, whatever rms_norm_eps says


@dataclass(frozen=True, kw_only=True)
class DeepseekConfig(LlamaConfig):
    """What `config.json` of V2 and V3 have in common; `ep_size` and the `aux` keys are about training."""

    q_lora_rank: int | None = None
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    qk_head_dim: int = key(default=0, minimum=0)
    v_head_dim: int = 128
    first_k_dense_replace: int = key(default=0, minimum=0)
    moe_layer_freq: int = 1
    moe_intermediate_size: int = 1407
    n_routed_experts: int = 64
    n_shared_experts: int = 2
    num_experts_per_tok: int = 2
    n_group: int | None = 1
    topk_group: int | None = 1
    routed_scaling_factor: float = 1.0
    norm_topk_prob: bool = False
    topk_method: str = "greedy"
    scoring_func: str = "softmax"
    ep_size: int | None = None
    aux_loss_alpha: float | None = None
    seq_aux: bool | None = None
    output_router_logits: bool | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "qk_head_dim", self.qk_nope_head_dim + self.qk_rope_head_dim)
        object.__setattr__(self, "n_group", self.n_group or 1)
        object.__setattr__(self, "topk_group", self.topk_group or 1)

    @property
    def rotary_dim(self) -> int:
        return self.qk_rope_head_dim

    @property
    def traditional(self) -> bool:
        """Neighbours are a pair."""
        return True

    @property
    def attention_scale(self) -> float:
        scaling = self.rope_scaling
        stretched = scaling is not None and scaling.kind == "yarn" and scaling.mscale_all_dim
        factor = yarn_mscale(scaling.factor or 1.0, scaling.mscale_all_dim or 1.0) if scaling and stretched else 1.0
        return float(self.qk_head_dim**-0.5) * factor * factor

    @property
    def latent_width(self) -> int:
        """Of what is stored for a token."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def expanded_width(self) -> int:
        """Of a token's keys and values, all heads, without the rotated part."""
        return self.num_attention_heads * (self.qk_nope_head_dim + self.v_head_dim)

    @property
    def compressed_query(self) -> bool:
        """Whether queries pass a narrow layer."""
        return self.q_lora_rank is not None

    @property
    def plain_query(self) -> bool:
        """Whether they do not."""
        return self.q_lora_rank is None

    @property
    def sparse(self) -> bool:
        """Whether this layer has experts."""
        index = self.layer_index or 0
        return index >= self.first_k_dense_replace and index % self.moe_layer_freq == 0


@dataclass(frozen=True, kw_only=True)
class DeepseekV2Config(DeepseekConfig):
    """`config.json` of a DeepSeek V2."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.topk_method not in ("greedy", "group_limited_greedy") or self.scoring_func != "softmax":
            found = f"topk_method {self.topk_method!r}, scoring_func {self.scoring_func!r}"
            raise ConfigError(f"config.json: {found} are not supported for a DeepSeek V2")
        if self.norm_topk_prob:
            raise ConfigError("config.json: norm_topk_prob is not supported for a DeepSeek V2")
        if self.topk_method == "greedy":
            object.__setattr__(self, "n_group", 1)
            object.__setattr__(self, "topk_group", 1)


@dataclass
class Attention:
    """Multi-head latent attention; the cache holds `kv_lora_rank + qk_rope_head_dim` numbers a token, for all heads."""

    rope: RoPE
    attend: Attend
    kv_a_proj: Linear = weight("kv_a_proj_with_mqa", "latent_width", HIDDEN, bias="attention_bias")
    kv_a_layernorm: RMSNorm = weight("kv_a_layernorm", LATENT)
    kv_b_proj: Linear = weight("kv_b_proj", "expanded_width", LATENT)
    o_proj: Linear = weight("o_proj", HIDDEN, "num_attention_heads*v_head_dim", bias="attention_bias")
    q_proj: Linear | None = weight("q_proj", QUERIES, HIDDEN, when="plain_query")
    q_a_proj: Linear | None = weight("q_a_proj", "q_lora_rank", HIDDEN, bias="attention_bias", when="compressed_query")
    q_a_layernorm: RMSNorm | None = weight("q_a_layernorm", "q_lora_rank", when="compressed_query")
    q_b_proj: Linear | None = weight("q_b_proj", QUERIES, "q_lora_rank", when="compressed_query")
    kv_lora_rank: int = setting()
    qk_nope_head_dim: int = setting()
    qk_head_dim: int = setting()
    v_head_dim: int = setting()

    def __call__(self, x: mx.array, batch: Batch, cache: KVCache) -> mx.array:
        q, turned = mx.split(split_heads(self.queries(x), self.qk_head_dim), [self.qk_nope_head_dim], axis=-1)
        q = mx.concatenate([q, self.rope(turned, batch.offset, batch.length)], axis=-1)
        latent, key = mx.split(self.kv_a_proj(x)[:, None], [self.kv_lora_rank], axis=-1)  # [B, 1, L, ...]
        key = self.rope(key, batch.offset, batch.length)
        stored = cache.append(self.kv_a_layernorm(latent, NORM_EPS), key)
        expanded = split_heads(self.kv_b_proj(stored.keys[:, 0]), self.qk_nope_head_dim + self.v_head_dim)
        k, v = mx.split(expanded, [self.qk_nope_head_dim], axis=-1)
        shared = mx.broadcast_to(stored.values, (*k.shape[:3], stored.values.shape[-1]))
        history = History(mx.concatenate([k, shared], axis=-1), v, stored.length)
        return self.o_proj(merge_heads(self.attend(q, history, batch.mask)))

    def queries(self, x: mx.array) -> mx.array:
        """`[B, L, heads * qk_head_dim]`."""
        if self.q_proj is not None:
            return self.q_proj(x)
        assert self.q_a_proj is not None and self.q_a_layernorm is not None and self.q_b_proj is not None
        return self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x), NORM_EPS))


@dataclass
class SharedExperts:
    """The feed-forward layer of all tokens."""

    glu: GLU
    gate_up_proj: Linear = weight("{gate,up}_proj", (SHARED, SHARED), HIDDEN)
    down_proj: Linear = weight("down_proj", HIDDEN, SHARED)


@dataclass
class MoE(moe.MoE):
    """Experts of the best groups by their best member, and the shared ones."""

    router: Linear = weight("gate", EXPERTS, HIDDEN)
    gate_up_proj: ExpertLinear = weight(
        "experts.{n_routed_experts}.{gate,up}_proj|switch_mlp.{gate,up}_proj[n_routed_experts]",
        (EXPERT, EXPERT),
        HIDDEN,
    )
    down_proj: ExpertLinear = weight(
        "experts.{n_routed_experts}.down_proj|switch_mlp.down_proj[n_routed_experts]", HIDDEN, EXPERT
    )
    shared: SharedExperts = weight("shared_experts")
    n_group: int = setting()
    topk_group: int = setting()
    routed_scaling_factor: float = setting()

    def route(self, x: mx.array) -> tuple[mx.array, mx.array]:
        scores = mx.softmax(self.scores(x), axis=-1)
        experts = moe.best(
            moe.in_best_groups(scores, self.n_group, self.topk_group, members=1), self.num_experts_per_tok
        )
        return experts, mx.take_along_axis(scores, experts, axis=-1) * self.routed_scaling_factor

    def __call__(self, x: mx.array) -> mx.array:
        return super().__call__(x) + self.shared.down_proj(self.shared.glu(self.shared.gate_up_proj(x)))


class FeedForward(Chooses):
    """Experts or one dense layer."""

    def __call__(self, x: mx.array) -> mx.array:
        raise NotImplementedError

    @classmethod
    def choose(cls, tree: Tree, shape: tuple[Size, ...], headers: Mapping[str, Header], config: Config) -> Choice:
        assert isinstance(config, DeepseekConfig)
        return Choice(cls.experts() if config.sparse else llama.MLP, {})

    @classmethod
    def experts(cls) -> type:
        """What a sparse layer is."""
        return MoE


@dataclass
class Block(blocks.PreNorm):
    """Llama's frame, with those."""

    self_attn: Attention = weight("self_attn")
    mlp: FeedForward = weight("mlp")


@dataclass
class DeepseekV2(blocks.Decoder):
    """Llama's frame with those blocks."""

    layers: Sequence[Block] = weight("model.layers", length="num_hidden_layers")
