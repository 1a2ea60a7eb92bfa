"""Config of hybrids: decoders in which some layers attend and the others carry a state from token to token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from runner.config import layer_types
from runner.config.decoder import DecoderConfig
from runner.config.layer_types import FULL, LINEAR
from runner.config.memory import Memory, State


@dataclass(frozen=True, kw_only=True)
class HybridConfig(DecoderConfig):
    """Config of a decoder whose `layer_types` say which layers attend to all earlier tokens."""

    OTHER: ClassVar[str] = LINEAR
    """The type of the layers that have a state instead."""
    OTHER_NAME: ClassVar[str] = "mamba"
    """What files call that which stands in attention's place in these layers."""
    layer_types: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.kinds  # checked now, not when the first layer is built

    @property
    def usual_layer_types(self) -> Sequence[str]:
        """The `layer_types` of a `config.json` that does not list them."""
        raise NotImplementedError

    @property
    def state(self) -> State:
        """What a layer without attention remembers."""
        raise NotImplementedError

    @property
    def kinds(self) -> Sequence[str]:
        """The type of each layer: `FULL`, or the other one."""
        usual = () if self.layer_types is not None else self.usual_layer_types
        return layer_types.checked(self.layer_types, self.num_hidden_layers, usual, (FULL, self.OTHER))

    @property
    def attends(self) -> bool:
        """Whether the layer that this copy of the config describes attends."""
        return self.kinds[self.layer_index or 0] == FULL

    @property
    def mixer(self) -> str:
        return super().mixer if self.attends else self.OTHER_NAME

    def memory(self, index: int) -> tuple[Memory, ...]:
        return super().memory(index) if self.kinds[index] == FULL else (self.state,)
