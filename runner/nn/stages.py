"""A pipeline: the layers of a model shared out over ranks, each of which passes on what its own have made.

Rank 0 has the embeddings, the first layers, the final norm and the head. Every rank runs the whole model's `__call__`:
where another rank's layers stand there is a module that sends, receives or does nothing, so that what a family does
around its layers (masks, streams, inputs of each layer) is done everywhere, by the family's own code.

    rank 0:   embed, layers 0-3, [send ....................................... receive], norm, head
    rank 1:                      [receive, layers 4-7, send]
    rank 2:                                                 [receive, layers 8-11, send]
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from runner.config.memory import Memory, Shared
from runner.errors import UsageError
from runner.nn.batch import Batch
from runner.nn.blocks import Layer
from runner.nn.linear import Embedding, Linear
from runner.ops.exchange import Exchange
from runner.weights.module import Module
from runner.weights.plan import ArrayPlan, ModulePlan, Value
from runner.weights.tags import setting

LAYERS, TABLE, NORM, HEAD = "layers", "embed_tokens", "norm", "lm_head"
"""Fields of `blocks.BaseDecoder`, which every family's model has."""


@dataclass
class Skipped(Module):
    """In the place of a layer that another rank computes: returns its input."""

    def __call__(self, x: mx.array, batch: Batch, cache: Any, *given: Any) -> mx.array:
        return x


@dataclass
class Arrival(Module):
    """In the place of the layer before a rank's own: what the rank before has made of the hidden state."""

    exchange: Exchange = setting()

    def __call__(self, x: mx.array, batch: Batch, cache: Any, *given: Any) -> mx.array:
        return self.exchange.arriving(x)


@dataclass
class Leaving(Module):
    """The last layer of a rank, and its way to the next one."""

    layer: Layer
    exchange: Exchange = setting()

    def __call__(self, x: mx.array, batch: Batch, cache: Any, *given: Any) -> mx.array:
        return self.exchange.onward(self.layer(x, batch, cache, *given))


@dataclass
class Elsewhere(Module):
    """On rank 0, in the place of the first layer that another rank has: what all other ranks make of its input."""

    exchange: Exchange = setting()

    def __call__(self, x: mx.array, batch: Batch, cache: Any, *given: Any) -> mx.array:
        self.exchange.onward(x)
        return self.exchange.arriving(x)


@dataclass
class NoTable(Embedding):
    """On a rank without embeddings: zeros `[..., width]` of the same dtype, for what a family does with them."""

    width: int = setting()
    activations: mx.Dtype = setting()

    def __call__(self, ids: mx.array) -> mx.array:
        return mx.zeros((*ids.shape, self.width), self.activations)


@dataclass
class NoNorm(Module):
    """On a rank without the final norm: returns its input."""

    def __call__(self, x: mx.array, eps: float) -> mx.array:
        return x


@dataclass
class NoHead(Linear):
    """On a rank without the head, which nobody asks for logits."""


def staged(plan: ModulePlan, span: range, exchange: Exchange, activations: mx.Dtype) -> ModulePlan:
    """The part of a model's `plan` that a rank holds whose own layers are those of `span`."""

    def stand_in(cls: type, path: str, **values: Any) -> ModulePlan:
        return ModulePlan(path, cls, {name: Value(value) for name, value in values.items()})

    layers = plan.fields[LAYERS]
    assert isinstance(layers, list)
    own: list[ModulePlan] = []
    for index, layer in enumerate(layers):
        if index in span:
            leaves = exchange.rank > 0 and index == span[-1]
            own.append(
                ModulePlan(layer.path, Leaving, {"layer": layer, "exchange": Value(exchange)}) if leaves else layer
            )
        elif exchange.rank > 0 and index == span[0] - 1:
            own.append(stand_in(Arrival, layer.path, exchange=exchange))
        elif exchange.rank == 0 and index == span[-1] + 1:
            own.append(stand_in(Elsewhere, layer.path, exchange=exchange))
        else:
            own.append(stand_in(Skipped, layer.path))
    fields = {**plan.fields, LAYERS: own}
    if exchange.rank > 0:
        table = plan.fields[TABLE]
        assert isinstance(table, ModulePlan)
        if not reads_ids(plan):
            fields[TABLE] = stand_in(NoTable, table.path, width=_width(table), activations=activations)
        fields[HEAD] = stand_in(NoHead, HEAD)
        if isinstance(plan.fields.get(NORM), ModulePlan):
            fields[NORM] = stand_in(NoNorm, NORM)
    return dataclasses.replace(plan, fields=fields)


def reads_ids(plan: ModulePlan) -> bool:
    """Whether all ranks need the ids and their embeddings: layers have inputs that tables of their own give."""
    below = (item for name, item in plan.fields.items() if name not in (LAYERS, TABLE, HEAD))
    return any(isinstance(item, ModulePlan) and _has_table(item) for item in below)


def _has_table(plan: ModulePlan) -> bool:
    if issubclass(plan.cls, Embedding):
        return True
    return any(isinstance(item, ModulePlan) and _has_table(item) for item in plan.fields.values())


def _width(table: ModulePlan) -> int:
    """Numbers in a row of an embedding table, packed or not."""
    weight, bits = table.fields["weight"], table.fields.get("bits")
    assert isinstance(weight, ArrayPlan)
    return weight.shape[-1] * 32 // bits.value if isinstance(bits, Value) else weight.shape[-1]


def shared_out(
    layers: Sequence[int], memories: Sequence[Sequence[Memory]], first: int, every: int, shares: Sequence[float]
) -> list[range]:
    """Which layers each rank has: those with which the fullest, measured by its share, is as empty as it can be.

    Args:
        layers: bytes of each layer.
        memories: what each layer remembers. One that looks at another's keys stays with it, and each rank has some that
            remember, to count tokens by.
        first: bytes that rank 0 holds besides.
        every: bytes that each other rank holds besides.
        shares: how much each rank may hold, in any unit.

    Raises:
        UsageError: there are too few layers.
    """
    count = len(layers)
    looks = [min([index, *(m.layer for m in own if isinstance(m, Shared))]) for index, own in enumerate(memories)]
    remembers = [any(not isinstance(m, Shared) for m in own) for own in memories]
    ends = [index for index in range(1, count) if min(looks[index:]) >= index] + [count]
    sums = [0, *itertools.accumulate(layers)]
    # best[end]: the least fullness of the ranks so far, if their layers end there, and how they are cut.
    best: dict[int, tuple[float, list[int]]] = {0: (0.0, [])}
    for rank, share in enumerate(shares):
        besides = every if rank else first
        following: dict[int, tuple[float, list[int]]] = {}
        for end in ends:
            options = [
                (max(full, (sums[end] - sums[start] + besides) / share), [*cuts, end])
                for start, (full, cuts) in best.items()
                if start < end and any(remembers[start:end])
            ]
            if options:
                following[end] = min(options)
        best = following
    if count not in best:
        raise UsageError(
            f"the {count} layers of this model cannot be shared out over {len(shares)} ranks: each needs one that "
            "remembers something, and those that look at another's keys stay with it"
        )
    cuts = best[count][1]
    return [range(start, end) for start, end in itertools.pairwise([0, *cuts])]
