"""The frame around the layers: when they are begun, where a device would wait for the host."""

from __future__ import annotations

import dataclasses

import mlx.core as mx
import pytest
from places import TESTS

from runner.engine.loaded import open_loaded
from runner.nn.batch import Batch

FAMILIES = TESTS / "fixtures" / "families"


@pytest.mark.parametrize(
    "name", ["bloom-base", "gemma3n_text-base", "gemma4_text-base", "qwen3_moe-base", "jamba-base"]
)
def test_a_long_pass_is_begun_while_it_is_built(name: str) -> None:
    """Every second layer, from the first one on, but none behind which nothing is kept; the numbers are the same."""
    loaded, begun = open_loaded(FAMILIES / name, dtype="float32"), 0
    ids = mx.array([[3, 1, 4, 1, 5, 9, 2, 6]])

    def schedule(*arrays: mx.array) -> None:
        nonlocal begun
        begun += 1
        mx.async_eval(*arrays)

    def hidden(count: int, eager: int | None) -> mx.array:
        nonlocal begun
        begun, model = 0, loaded.model
        model.ops = dataclasses.replace(model.ops, eager=eager, schedule=schedule)  # type: ignore[attr-defined]
        found = model(Batch(ids[:, :count]), loaded.new_caches())
        mx.eval(found)
        return found

    shared, last = name.startswith("gemma"), loaded.new_caches().last
    assert (last < loaded.config.num_hidden_layers - 1) == shared
    assert mx.array_equal(hidden(8, None), hidden(8, 8)) and begun == -(-last // 2) > 0
    assert mx.array_equal(hidden(7, None), hidden(7, 8)) and begun == 0
