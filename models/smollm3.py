"""SmolLM3: a Llama without RoPE in every fourth layer (NoPE), and in some checkpoints with a sliding window there.

Source: the model's report (huggingface.co/blog/smollm3), and `transformers.models.smollm3`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from runner.config.decoder import WindowedConfig
from runner.config.layer_types import FULL, SLIDING
from runner.errors import ConfigError
from runner.models.llama import Llama as Llama


@dataclass(frozen=True, kw_only=True)
class SmolLM3Config(WindowedConfig):
    """`config.json` of a SmolLM3; `no_rope_layers` holds 1 for a layer WITH RoPE, 0 for one without, despite its name.

    `max_window_layers` is left over from Qwen 2, whose code SmolLM3's started from.
    """

    INERT: ClassVar[frozenset[str]] = frozenset({"max_window_layers"})
    num_key_value_heads: int = 4
    max_position_embeddings: int = 32768
    rope_theta: float = 2000000.0
    tie_word_embeddings: bool = True
    use_sliding_window: bool = False
    sliding_window: int | None = None
    no_rope_layer_interval: int = 4
    no_rope_layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        rotates = self.no_rope_layers
        if rotates is None:
            rotates = tuple(int((i + 1) % self.no_rope_layer_interval != 0) for i in range(self.num_hidden_layers))
        if len(rotates) < self.num_hidden_layers:
            raise ConfigError(f"config.json: {len(rotates)} no_rope_layers for {self.num_hidden_layers} layers")
        rotates = rotates[: self.num_hidden_layers]  # entries past the last layer are unused
        object.__setattr__(self, "no_rope_layers", rotates)

    @property
    def rotary_dim(self) -> int:
        rotates = self.no_rope_layers or ()
        return self.head_dim if self.layer_index is None or rotates[self.layer_index] else 0

    @property
    def usual_layer_types(self) -> Sequence[str]:
        windowed = self.use_sliding_window and self.sliding_window is not None
        return [SLIDING if windowed and not rotates else FULL for rotates in self.no_rope_layers or ()]
