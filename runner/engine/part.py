"""What loading a model asks of the run of several processes that it is shared out over; `runner.ranks` answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import mlx.core as mx

from runner.cache.caches import Caches
from runner.config.base import Config
from runner.config.memory import Memory
from runner.engine.budget import Footprint
from runner.families import Model
from runner.ops.device import Device
from runner.ops.exchange import Exchange
from runner.weights.plan import ModulePlan
from runner.weights.tags import Header, Source

Memories = Sequence[tuple[Memory, ...]]
"""What each layer of a model remembers."""


@dataclass(frozen=True)
class Whole:
    """A model that is to be shared out, before anything of it is read.

    Attributes:
        cls: its class.
        layout: the plan of all of it.
        provided: what that was planned with; see `plan`.
        weights: the dtype that tensors are brought to; None: as they are stored.
    """

    cls: type
    layout: ModulePlan
    config: Config
    source: Source
    provided: Mapping[str, Any]
    weights: mx.Dtype | None

    @property
    def activations(self) -> mx.Dtype:
        """The dtype of hidden states."""
        found = self.provided["activations"]
        assert isinstance(found, mx.Dtype)
        return found


@dataclass(frozen=True)
class Own:
    """What one process holds of a model.

    Attributes:
        layout: the plan of it, over the tensors of `source`.
        memories: what its layers remember; () for those that are elsewhere.
    """

    layout: ModulePlan
    source: Source
    memories: Memories


class Part(Protocol):
    """One process's part of a model.

    Attributes:
        exchange: what it sends and receives by.
    """

    exchange: Exchange

    @property
    def elsewhere(self) -> int:
        """Bytes of weights that other processes hold."""

    @property
    def over(self) -> bool:
        """Whether another process was lost: what MLX still computes may wait for it for ever."""

    @property
    def whole(self) -> ModulePlan | None:
        """The plan of the whole model, once `own` was asked."""

    def own(self, whole: Whole) -> Own:
        """What of a whole model is held here.

        Raises:
            UsageError: the model can't be shared out so.
        """

    def suited(self, device: Device) -> Device:
        """The device without what only works for a whole model."""

    def agree(self, raw: Mapping[str, Any], headers: Mapping[str, Header], needed: int, available: int | None) -> None:
        """Wait until all processes are ready to read: the same model, and enough memory in each.

        Raises:
            UsageError: a process has another model or too little memory.
        """

    def led(self, model: Model) -> Model:
        """The model as this process's callers see it: calling it makes the others compute their parts."""

    def here(self, model: Model) -> Model:
        """What is in this process of the model that its callers see."""

    def ready(self, rest: Callable[[], None]) -> None:
        """Wait until all processes have read their parts.

        Args:
            rest: waits for the end of steps by kernels; to be called before anything is exchanged otherwise.
        """

    def step(self, caches: Sequence[Caches], tokens: Sequence[int]) -> None:
        """Make the others begin a step by kernels, as `RowSteps.begin`."""

    def caches(self, caches: Caches, memories: Memories) -> Caches:
        """Caches of this process's layers, as its callers see them: the others' follow them.

        Args:
            memories: what each layer of the whole model remembers.
        """

    def room(self, limit: int, room: int, footprint: Footprint) -> int:
        """Bytes for caches in this process, so that those that go with them in the others have room there.

        Args:
            limit: bytes that a process may take at most.
            room: bytes that this one has beside its weights.
            footprint: of this process's caches.

        Raises:
            UsageError: a process has no memory beside its weights.
        """
