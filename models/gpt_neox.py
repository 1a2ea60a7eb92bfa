"""GPT-NeoX and Pythia: attention and MLP in parallel, each behind its own LayerNorm; q, k, v stored head by head.

Source: arXiv:2204.06745, and `transformers.models.gpt_neox`. Files that mlx-lm wrote use other tensor names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from runner.config.base import fixed, key
from runner.config.decoder import LayerNormConfig
from runner.models import llama
from runner.nn import blocks
from runner.nn.blocks import ConfiguredBlock, LayerNormDecoder
from runner.nn.fast import LayerNorm
from runner.nn.layouts import FusedQKV
from runner.nn.linear import HIDDEN, INTERMEDIATE, KV, VOCAB, Embedding, Linear, Q
from runner.nn.mlp import PlainMLP
from runner.weights.tags import weight


@dataclass(frozen=True, kw_only=True)
class GPTNeoXConfig(LayerNormConfig):
    """`config.json` of a GPT-NeoX; defaults are those of `transformers.GPTNeoXConfig`."""

    hidden_act: str = "gelu"
    rope_theta: float = key(also="rotary_emb_base", default=10000.0)
    partial_rotary_factor: float = key(also="rotary_pct", default=0.25)
    attention_bias: bool = True
    mlp_bias: bool = fixed(True)
    use_parallel_residual: bool = True

    @property
    def block_class(self) -> type:
        return ParallelBlock if self.use_parallel_residual else Block


@dataclass
class Attention(llama.Attention):
    """Llama's attention; the stored matrix holds q, k and v of head 0, then of head 1, and so on."""

    qkv_proj: FusedQKV = weight("query_key_value", (Q, KV, KV), HIDDEN, bias="attention_bias")
    o_proj: Linear = weight("dense", HIDDEN, Q, bias="attention_bias")


@dataclass
class MLP(PlainMLP):
    """An MLP without a gate, stored as `dense_h_to_4h` (up) and `dense_4h_to_h` (down)."""

    up_proj: Linear = weight("dense_h_to_4h", INTERMEDIATE, HIDDEN, bias="mlp_bias")
    down_proj: Linear = weight("dense_4h_to_h", HIDDEN, INTERMEDIATE, bias="mlp_bias")


@dataclass
class Block(blocks.Sequential):
    """The sequential variant: pre-norm attention, then pre-norm MLP."""

    input_layernorm: LayerNorm = weight("input_layernorm", HIDDEN)
    self_attn: Attention = weight("attention")
    post_attention_layernorm: LayerNorm = weight("post_attention_layernorm", HIDDEN)
    mlp: MLP = weight("mlp")


@dataclass
class ParallelBlock(Block, blocks.ParallelNorms):
    """The parallel variant (the usual one): both sublayers read the block's input, each through its own LayerNorm."""

    __call__ = blocks.ParallelNorms.__call__


@dataclass
class GPTNeoX(LayerNormDecoder):
    """The model: embeddings, blocks of the variant that `use_parallel_residual` names, norm, head."""

    embed_tokens: Embedding = weight("gpt_neox.embed_in|model.embed_in", VOCAB, HIDDEN)
    layers: Sequence[ConfiguredBlock] = weight("gpt_neox.layers|model.h", length="num_hidden_layers")
    norm: LayerNorm = weight("gpt_neox.final_layer_norm|model.final_layer_norm", HIDDEN)
    lm_head: Linear = weight(
        "embed_out|model.embed_out||gpt_neox.embed_in|model.embed_in", VOCAB, HIDDEN, otherwise="tie_word_embeddings"
    )
