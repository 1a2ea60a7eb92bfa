"""GPT-Neo: a GPT-2 in matrices `[out, in]`, with scores that nothing scales and a window in every other layer.

Source: `transformers.models.gpt_neo`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from runner.config.base import fixed, key
from runner.config.problems import short
from runner.errors import ConfigError
from runner.models import gpt2, llama
from runner.models.gpt2 import GPT2Config
from runner.models.gpt_bigcode import MLP
from runner.nn.linear import HIDDEN, Linear, Q
from runner.weights.tags import weight


@dataclass(frozen=True, kw_only=True)
class GPTNeoConfig(GPT2Config):
    """`config.json` of a GPT-Neo. `attention_types` is a list of pairs, names of layers and how often to repeat them;
    `attention_layers`, where it is given, is what they expand to.
    """

    INERT: ClassVar[frozenset[str]] = frozenset({"embed_dropout", "resid_dropout"})
    hidden_size: int = 2048
    num_hidden_layers: int = key("num_layers", also="num_hidden_layers", default=24)
    num_attention_heads: int = key("num_heads", also="num_attention_heads", default=16)
    max_position_embeddings: int = 2048
    intermediate_size: int = key(default=0, minimum=0)
    scale_attn_weights: bool = fixed(False)
    scale_attn_by_inverse_layer_idx: bool = fixed(False)
    window_size: int = 256
    attention_layers: tuple[str, ...] = ("global", "local") * 12

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Self:
        pairs, values = raw.get("attention_types"), {k: v for k, v in raw.items() if k != "attention_types"}
        if pairs is None or values.get("attention_layers") is not None:
            return super().from_dict(values)
        try:
            # Cut off where there are more than any model has layers.
            layers = [name for names, count in pairs for _ in range(min(count, 1024)) for name in names][:4096]
        except (TypeError, ValueError):
            message = f"config.json: attention_types must be pairs of names and a count, not {short(pairs)}"
            raise ConfigError(message) from None
        return super().from_dict({**values, "attention_layers": layers})

    def __post_init__(self) -> None:
        super().__post_init__()
        layers = self.attention_layers
        if len(layers) != self.num_hidden_layers or set(layers) - {"global", "local"}:
            raise ConfigError(
                f"config.json: attention_layers must have global or local for each of {self.num_hidden_layers} layers, "
                f"not {short(list(layers))}"
            )

    def cache_window(self, index: int) -> int | None:
        return self.window_size if self.attention_layers[index] == "local" else None


@dataclass
class Attention(llama.Attention):
    """Llama's attention without rotation; only the output projection has a bias."""

    o_proj: Linear = weight("out_proj", HIDDEN, Q, bias=True)


@dataclass
class Block(gpt2.NormedBlock):
    """GPT-2's block with GPT-Neo's attention and an MLP of plain matrices."""

    self_attn: Attention = weight("attn.attention")
    mlp: MLP = weight("mlp")


@dataclass
class GPTNeo(gpt2.PositionedDecoder):
    """The model: token plus position embeddings, GPT-Neo blocks, norm, head."""

    layers: Sequence[Block] = weight("transformer.h|h", length="num_hidden_layers")
