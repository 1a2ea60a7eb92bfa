"""GPT-BigCode (StarCoder, SantaCoder): a GPT-2 whose query heads share one key and one value, in matrices `[out, in]`.

Source: arXiv:2301.03988, and `transformers.models.gpt_bigcode`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from runner.config.base import fixed, key
from runner.models import gpt2, llama
from runner.models.gpt2 import GPT2Config
from runner.nn.layouts import FusedQKV
from runner.nn.linear import HIDDEN, INTERMEDIATE, KV, Linear, Q
from runner.nn.mlp import PlainMLP
from runner.weights.tags import weight


@dataclass(frozen=True, kw_only=True)
class GPTBigCodeConfig(GPT2Config):
    """`config.json` of a GPT-BigCode; the inert keys are about how the authors' kernels compute."""

    INERT: ClassVar = GPT2Config.INERT | {
        "attention_softmax_in_fp32", "inference_runner", "max_batch_size", "max_sequence_length", "num_key_value_heads",
        "pad_key_length", "pre_allocate_kv_cache", "scale_attention_softmax_in_fp32", "validate_runner_input",
    }  # fmt: skip
    hidden_act: str = key("activation_function", default="gelu_pytorch_tanh")
    scale_attn_by_inverse_layer_idx: bool = fixed(False)
    multi_query: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_key_value_heads", 1 if self.multi_query else self.num_attention_heads)
        super().__post_init__()


@dataclass
class Attention(llama.Attention):
    """Llama's attention without rotation; `c_attn` holds all queries, then a key and a value, or head by head."""

    qkv_proj: FusedQKV = weight("c_attn", (Q, KV, KV), HIDDEN, bias=True)
    o_proj: Linear = weight("c_proj", HIDDEN, Q, bias=True)


@dataclass
class MLP(PlainMLP):
    """An MLP without a gate, stored as `c_fc` (up) and `c_proj` (down)."""

    up_proj: Linear = weight("c_fc", INTERMEDIATE, HIDDEN, bias=True)
    down_proj: Linear = weight("c_proj", HIDDEN, INTERMEDIATE, bias=True)


@dataclass
class Block(gpt2.NormedBlock):
    """GPT-2's block with GPT-BigCode's attention and MLP."""

    self_attn: Attention = weight("attn")
    mlp: MLP = weight("mlp")


@dataclass
class GPTBigCode(gpt2.PositionedDecoder):
    """The model: token plus position embeddings, GPT-BigCode blocks, norm, head."""

    layers: Sequence[Block] = weight("transformer.h|h|model.h", length="num_hidden_layers")
