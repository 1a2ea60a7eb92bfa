"""What a buffer holds before rows are written into it changes nothing: devices need not clear the memory they take."""

from __future__ import annotations

import dataclasses

import mlx.core as mx
import numpy as np
import pytest
from decoding import decode
from places import TESTS

from runner.cache.storage import Storage
from runner.engine.loaded import open_loaded
from runner.engine.prefill import new_caches, prefill
from runner.ops.device import current

FAMILIES = TESTS / "fixtures" / "families"
FIXTURES = {
    "rows": TESTS / "fixtures" / "llama" / "llama-gqa",
    "window": TESTS / "fixtures" / "llama" / "mistral-window",
    "capped": FAMILIES / "gemma2-base",
    "latent": FAMILIES / "deepseek_v2-grouped",
    "sinks": FAMILIES / "gpt_oss-base",
}


def dirty(storage: Storage) -> Storage:
    """`storage` whose buffers are full of NaN, or of codes and scales that are none."""

    def empty(rows: mx.array, capacity: int, powers: mx.array | None = None) -> mx.array:
        made = storage.empty(rows, capacity, powers)
        if made.dtype != mx.int16:
            return mx.full(made.shape, mx.nan, dtype=made.dtype)
        made[..., :capacity, :] = -1  # the powers stay
        return made

    return dataclasses.replace(storage, empty=empty)


@pytest.mark.parametrize("kind", FIXTURES)
@pytest.mark.parametrize("dense", [False, True])
def test_answers_over_buffers_full_of_nan(kind: str, dense: bool) -> None:
    engine = open_loaded(FIXTURES[kind])
    ops = current().ops
    stored = current().storage if dense else ops.storage
    prompt = [1 + i % 30 for i in range(11)]

    def logits(storage: Storage) -> list[np.ndarray]:
        caches = new_caches(engine.config, storage)
        first = prefill(engine.model, prompt, caches)
        steps = decode(engine.model, first, caches, lambda row: (ops.argmax(row), row), 40, ops)
        return [np.array(row.astype(mx.float32)) for _, row in steps]

    clean, unclean = logits(stored), logits(dirty(stored))
    assert all(np.isfinite(row).all() for row in clean)
    assert all(np.array_equal(a, b) for a, b in zip(clean, unclean, strict=True))
