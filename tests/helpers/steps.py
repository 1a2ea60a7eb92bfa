"""The graph of one decode step, of a model with random weights on a table of operations of one's choice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any
from unittest import mock

import mlx.core as mx
from operations import forget, one_kernel_each, operations

from runner.bench.models import random_weights
from runner.convert.quantize import QUANTIZATIONS
from runner.engine import loaded
from runner.nn.batch import Batch
from runner.ops.device import Device
from runner.ops.table import Ops
from runner.weights.tags import Source

PROMPT = 40
"""Tokens in the cache before the step: more than the windows of the fixtures hold."""


def decode_step(
    raw: Mapping[str, Any], ops: Ops, *, dtype: str = "bfloat16", quantize: str | None = None
) -> Counter[str]:
    """How often a decode step of a model with the config `raw` has each operation; nothing is computed."""
    form = None if quantize is None else QUANTIZATIONS[quantize]
    return step_of(raw, random_weights(raw, form=form, dtype=dtype), ops)


def step_of(raw: Mapping[str, Any], source: Source, ops: Ops) -> Counter[str]:
    """How often a decode step of the model that `raw` and `source` make up has each operation."""
    with mock.patch.object(loaded, "current", lambda: Device(ops.name, ops)):
        model = loaded.assemble(raw, source)
    caches = model.new_caches()
    model.model(Batch(mx.array([[1] * PROMPT], dtype=mx.int32)), caches)
    forget(caches)
    token = mx.array([[1]], dtype=mx.int32)
    with one_kernel_each():
        hidden = model.model(Batch(token, caches.offset), caches)
        return operations(model.model.logits(hidden)[:, -1])


def per_layer(raw: Mapping[str, Any], ops: Ops, **options: Any) -> float:
    """Operations that a further layer adds to a decode step: half of what two more layers do."""
    totals = [decode_step({**raw, "num_hidden_layers": layers}, ops, **options).total() for layers in (2, 4)]
    return (totals[1] - totals[0]) / 2
