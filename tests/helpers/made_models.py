"""Models of published shapes with random weights, made small."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import numpy as np

from runner import resources
from runner.bench.models import random_weights
from runner.convert.quantize import QUANTIZATIONS
from runner.engine.loaded import Loaded, assemble
from runner.engine.part import Part


class Jittered:
    """A source of random weights, whose groups have scales of their own."""

    def __init__(self, source: Any) -> None:
        self._source, self.headers = source, source.headers

    def read(self, name: str) -> mx.array:
        array: mx.array = self._source.read(name)
        if not name.endswith((".scales", ".biases")):
            return array
        if array.dtype == mx.uint8:  # exponents, or numbers of few bits
            steps = np.random.default_rng(len(name)).integers(-1, 2, array.shape)
            return (array.astype(mx.int32) + mx.array(steps.astype(np.int32))).astype(mx.uint8)
        numbers = np.random.default_rng(len(name)).uniform(0.5, 1.5, array.shape).astype(np.float32)
        return (array.astype(mx.float32) * mx.array(numbers)).astype(array.dtype)


def made(shape: str, quantize: str | None, run: str, changes: Mapping[str, Any], part: Part | None = None) -> Loaded:
    """Two layers of a published shape with random weights in bfloat16, computed in `run`."""
    raw = {**resources.read("shapes", shape), "num_hidden_layers": 2, **changes}
    form = None if quantize is None else QUANTIZATIONS[quantize]
    return assemble(raw, Jittered(random_weights(raw, form=form, dtype="bfloat16")), dtype=run, part=part)
