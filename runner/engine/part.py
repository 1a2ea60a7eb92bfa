"""What loading a model asks of the run of several processes that it is shared out over; `runner.ranks` answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import mlx.core as mx

from runner.cache.caches import Caches
from runner.config.base import Config
from runner.config.memory import Memory
from runner.families import Model
from runner.ops.device import Device
from runner.weights.plan import ModulePlan
from runner.weights.tags import Header

Memories = Sequence[tuple[Memory, ...]]
"""What each layer of a model remembers."""


class Part(Protocol):
    """One process's part of a model."""

    @property
    def elsewhere(self) -> int:
        """Bytes of weights that other processes hold."""

    @property
    def whole(self) -> ModulePlan | None:
        """The plan of the whole model, once `own` was asked."""

    def own(
        self,
        layout: ModulePlan,
        config: Config,
        headers: Mapping[str, Header],
        activations: mx.Dtype,
        weights: mx.Dtype | None,
    ) -> tuple[ModulePlan, Memories]:
        """What of a whole model's `layout` is held here, and what the layers here remember."""

    def suited(self, device: Device) -> Device:
        """The device without what only works for a whole model."""

    def agree(self, raw: Mapping[str, Any], headers: Mapping[str, Header], needed: int, available: int | None) -> None:
        """Wait until all processes are ready to read: the same model, and enough memory in each.

        Raises:
            UsageError: a process has another model or too little memory.
        """

    def led(self, model: Model) -> Model:
        """The model as this process's callers see it: calling it makes the others compute their parts."""

    def caches(self, caches: Caches, memories: Memories) -> Caches:
        """Caches of this process's layers, as its callers see them: the others' follow them.

        Args:
            memories: what each layer of the whole model remembers.
        """
