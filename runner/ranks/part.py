"""What one rank holds of a model, for loading it and for `inspect`, which loads nothing."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from runner.config.base import Config
from runner.config.memory import Memory
from runner.engine.part import Memories
from runner.nn.stages import HEAD, LAYERS, NORM, TABLE, reads_ids, shared_out, staged
from runner.ops.device import Device
from runner.ops.exchange import Exchange, ring_bytes
from runner.ranks.settings import Settings
from runner.weights.loading import planned_nbytes
from runner.weights.plan import ModulePlan
from runner.weights.tags import Header

IDS = 4
"""Bytes of a token's id, as it is sent."""


@dataclass(frozen=True)
class Held:
    """What one rank holds and sends.

    Attributes:
        plan: which tensors it reads.
        layers: the layers that it computes.
        memories: what those remember, layer by layer; () for those that are elsewhere.
        nbytes: bytes of its weights.
        sends: bytes that it sends for each token.
        reads_ids: whether ranks other than 0 need the ids of tokens.
    """

    plan: ModulePlan
    layers: range
    memories: Memories
    nbytes: int
    sends: int
    reads_ids: bool


def held(
    layout: ModulePlan,
    config: Config,
    headers: Mapping[str, Header],
    settings: Settings,
    exchange: Exchange,
    *,
    activations: mx.Dtype,
    weights: mx.Dtype | None,
) -> Held:
    """What the rank of `exchange` holds of the model that `layout` plans, and sends where hidden states are of the
    dtype `activations`.

    Args:
        weights: the dtype that tensors are brought to; None: as they are stored.

    Raises:
        UsageError: the model cannot be shared out so.
    """

    def size(plan: ModulePlan) -> int:
        return planned_nbytes(plan, headers, weights)

    layers = layout.fields[LAYERS]
    assert isinstance(layers, list)
    memories = [config.memory(index) for index in range(len(layers))]
    frame = dataclasses.replace(layout, fields={**layout.fields, LAYERS: []})
    ids = reads_ids(layout)
    own = {NORM, HEAD, LAYERS} if ids else {TABLE, NORM, HEAD, LAYERS}
    everywhere = dataclasses.replace(layout, fields={n: item for n, item in layout.fields.items() if n not in own})
    shares = settings.share or (1.0,) * settings.size
    spans = shared_out([size(layer) for layer in layers], memories, size(frame), size(everywhere), shares)
    span = spans[exchange.rank]
    plan = staged(layout, span, exchange, activations)
    return Held(
        plan,
        span,
        [own if index in span else () for index, own in enumerate(memories)],
        size(plan),
        config.stream_width * activations.size + (ring_bytes(IDS, settings.size) if ids else 0),
        ids,
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


def without_recording(device: Device) -> Device:
    """The device without what replays a step's graph, or computes it by one kernel: neither can hold an exchange."""
    return dataclasses.replace(device, ops=dataclasses.replace(device.ops, recorder=None), compiles=False)


def flat(memories: Sequence[Sequence[Memory]]) -> list[Memory]:
    """All that a model's layers remember."""
    return [memory for layer in memories for memory in layer]
