"""What one rank holds of a model, for loading it and for `inspect`, which loads nothing."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from runner.config.memory import Memory
from runner.engine.budget import SHARE, Footprint
from runner.engine.part import Own, Whole
from runner.errors import UsageError
from runner.nn.stages import HEAD, LAYERS, NORM, TABLE, reads_ids, shared_out, staged
from runner.nn.tensor import divided, gathers, shared, sums
from runner.ops.device import Device
from runner.ops.exchange import Exchange, ring_bytes
from runner.ranks.settings import NCCL, PIPELINE, TENSOR, Settings
from runner.weights.division import Divider, Parts
from runner.weights.loading import planned_nbytes, twin_nbytes
from runner.weights.plan import ModulePlan, plan
from runner.weights.tags import Header

LENGTHS = (1, 1 << 12, 1 << 16)
"""Tokens of the sequences whose caches ranks compare."""

IDS = 4
"""Bytes of a token's id, as it is sent."""


@dataclass(frozen=True)
class Held:
    """What one rank holds and sends.

    Attributes:
        own: which tensors it reads, and what its layers remember.
        layers: the layers that it computes.
        nbytes: bytes of its weights.
        sends: bytes that it sends for each token.
        draws: bytes that it sends besides for each token that is drawn.
        reads_ids: whether ranks other than 0 need the ids of tokens.
        gathers: whether logits are gathered from all ranks.
        notes: what stays whole on every rank, and why.
        twins: bytes that it holds besides, where a head that is stored beside the table turns out to be another matrix.
    """

    own: Own
    layers: range
    nbytes: int
    sends: int
    draws: int
    reads_ids: bool
    gathers: bool = False
    notes: tuple[str, ...] = ()
    twins: int = 0


def held(whole: Whole, settings: Settings, exchange: Exchange) -> Held:
    """What the rank of `exchange` holds of a model, and sends.

    Raises:
        UsageError: the model cannot be shared out so.
    """
    found = (_stage if settings.mode == PIPELINE else _share)(whole, settings, exchange)
    twins = twin_nbytes(found.own.layout, found.own.source.headers, whole.weights)
    return dataclasses.replace(found, twins=twins)


def _stage(whole: Whole, settings: Settings, exchange: Exchange) -> Held:
    """A rank of a pipeline: some of the layers."""
    layout, headers = whole.layout, whole.source.headers

    def size(plan: ModulePlan) -> int:
        return planned_nbytes(plan, headers, whole.weights)

    layers = layout.fields[LAYERS]
    assert isinstance(layers, list)
    memories = [whole.config.memory(index) for index in range(len(layers))]
    frame = dataclasses.replace(layout, fields={**layout.fields, LAYERS: []})
    ids = reads_ids(layout)
    own = {NORM, HEAD, LAYERS} if ids else {TABLE, NORM, HEAD, LAYERS}
    everywhere = dataclasses.replace(layout, fields={n: item for n, item in layout.fields.items() if n not in own})
    shares = settings.share or (1.0,) * settings.size
    spans = shared_out([size(layer) for layer in layers], memories, size(frame), size(everywhere), shares)
    span = spans[exchange.rank]
    layout = staged(layout, span, exchange, whole.activations)
    state = whole.config.stream_width * whole.activations.size
    return Held(
        Own(layout, whole.source, [own if index in span else () for index, own in enumerate(memories)]),
        span,
        size(layout),
        # Without sends, all ranks take part in each.
        (state if settings.sends else settings.size * ring_bytes(state, settings.size))
        + (ring_bytes(IDS, settings.size) if ids else 0),
        0,
        ids,
    )


def _share(whole: Whole, settings: Settings, exchange: Exchange) -> Held:
    """A rank that has a part of every layer."""
    if settings.share:
        raise UsageError("--share is for a pipeline: tensors are shared out evenly")
    divider = Divider(whole.cls, whole.config, whole.source.headers, whole.provided)
    found = divided(divider, whole.config, exchange.rank, settings.size)
    division = found.division
    source = Parts(whole.source, whole.source.headers, division.cuts)
    # Planned and checked as any model is: its tensors are the parts.
    layout = shared(plan(whole.cls, division.config, source.headers, whole.provided), division, exchange)
    count = whole.config.num_hidden_layers
    width = whole.activations.size
    # Which rows are wanted is said by sending them; then each rank sends its share of the logits to all others.
    row = ring_bytes(whole.config.hidden_size * width, settings.size)
    drawn = row + (settings.size - 1) * division.config.vocab_size * width
    sent = [IDS, *(each * width for each in sums(layout))]
    return Held(
        Own(layout, source, [division.config.memory(index) for index in range(count)]),
        range(count),
        planned_nbytes(layout, source.headers, whole.weights),
        sum(ring_bytes(nbytes, settings.size) for nbytes in sent),
        drawn if gathers(division) else 0,
        True,
        gathers(division),
        found.whole,
    )


def fingerprint(raw: Mapping[str, Any], headers: Mapping[str, Header], **options: object) -> dict[str, str]:
    """What must be the same in all ranks, by what to call it: short hashes, and `options` as they are."""
    shapes = sorted((name, header.dtype, list(header.shape)) for name, header in headers.items())
    return {
        "config.json": _hash(raw),
        "weights (names, types and shapes)": _hash(shapes),
        **{name: str(value) for name, value in options.items()},
    }


def _hash(value: object) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def difference(mine: Mapping[str, str], other: Mapping[str, str]) -> str | None:
    """The first thing that differs, in words that fit behind the other's name; None: nothing does."""
    for name, value in mine.items():
        if other.get(name) != value:
            return f"its {name} differs from rank 0's: {other.get(name)}, not {value}"
    return None


def sizes(footprint: Footprint) -> list[int]:
    """Bytes that the caches of a sequence take in one rank, for some lengths."""
    return [footprint.of(tokens) for tokens in LENGTHS]


def room_beside(limit: int, ready: Mapping[str, Any], own: Sequence[int]) -> int:
    """Bytes that rank 0's caches may take, so that another rank's have room beside its weights.

    Args:
        limit: bytes that a process may take at most.
        ready: what the other rank has said when it was ready.
        own: the `sizes` of rank 0.
    """
    memory = ready["available"]
    most = limit if memory is None else min(limit, int(memory * SHARE))
    ratio = max(there / here for there, here in zip(ready["caches"], own, strict=True))
    return int((most - ready["loaded"]) / ratio)


def least_room(limit: int, room: int, own: Sequence[int], others: Iterable[tuple[str, Mapping[str, Any]]]) -> int:
    """Bytes that rank 0's caches may take, `room` at most, so that those of every other rank have room as well.

    Args:
        limit: as for `room_beside`, and `own`, too.
        others: what to call each other rank, and what it has said when it was ready.

    Raises:
        UsageError: one has no room at all; the message names it.
    """
    for name, ready in others:
        found = room_beside(limit, ready, own)
        if found <= 0:
            raise UsageError(f"{name} has no memory beside its weights for what requests need")
        room = min(room, found)
    return room


def suited(device: Device, settings: Settings) -> Device:
    """The device without what replays a step's graph, or computes it by kernels, where those cannot hold an exchange.

    By tensors over NCCL, kernels for steps of several sequences can.
    """
    ops = device.shared_out or device.ops
    compiles = device.compiles and settings.mode == TENSOR and settings.backend == NCCL
    return dataclasses.replace(device, ops=dataclasses.replace(ops, recorder=None), compiles=compiles)


def flat(memories: Sequence[Sequence[Memory]]) -> list[Memory]:
    """All that a model's layers remember."""
    return [memory for layer in memories for memory in layer]
