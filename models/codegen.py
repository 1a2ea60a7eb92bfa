"""CodeGen: a GPT-J whose q, v and k lie in one matrix, in four blocks of the heads, as it was trained on four devices.

Source: arXiv:2203.13474, and `transformers.models.codegen`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from runner.config.base import Config
from runner.errors import ConfigError
from runner.models import gptj
from runner.models.gptj import GPTJConfig
from runner.nn.linear import HIDDEN, KV, Linear, Q
from runner.weights.tags import Choice, Header, weight
from runner.weights.transforms import permute_rows
from runner.weights.tree import Size, Tree

BLOCKS = 4


@dataclass(frozen=True, kw_only=True)
class CodeGenConfig(GPTJConfig):
    """`config.json` of a CodeGen: GPT-J's keys."""

    INERT: ClassVar[frozenset[str]] = frozenset({"n_ctx"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_attention_heads % BLOCKS:
            raise ConfigError(f"config.json: n_head = {self.num_attention_heads} must be a multiple of {BLOCKS}")


class BlockedQKV(Linear):
    """One matrix for q, k and v, stored in blocks that hold q, v and k of a quarter of the heads each."""

    @classmethod
    def choose(cls, tree: Tree, shape: tuple[Size, ...], headers: Mapping[str, Header], config: Config) -> Choice:
        choice = Linear.choose(tree, shape, headers, config)
        return Choice(choice.cls, {**choice.scope, "transform": permute_rows("blocks of q, v, k", blocked_rows)})


def blocked_rows(rows: int) -> list[int]:
    """The stored row of each row of q, then k, then v."""
    part = rows // (3 * BLOCKS)  # of q, of v or of k, in one block
    starts = [(3 * block + place) * part for place in (0, 2, 1) for block in range(BLOCKS)]
    return [start + i for start in starts for i in range(part)]


@dataclass
class Attention(gptj.Attention):
    """GPT-J's attention with a fused matrix."""

    qkv_proj: BlockedQKV = weight("qkv_proj", (Q, KV, KV), HIDDEN)


@dataclass
class Block(gptj.Block):
    """GPT-J's block with CodeGen's attention."""

    self_attn: Attention = weight("attn")


@dataclass
class CodeGen(gptj.GPTJ):
    """A GPT-J made of CodeGen blocks."""

    layers: Sequence[Block] = weight("transformer.h", length="num_hidden_layers")
