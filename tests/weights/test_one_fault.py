"""One fault of a checkpoint is one line: what follows from it is not reported as a fault of its own."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import pytest
from places import TESTS
from sources import Arrays

from runner.checkpoint.model_files import open_files
from runner.engine.loaded import assemble
from runner.errors import WeightsError

Q = "model.layers.0.self_attn.q_proj"
EMBED = "model.embed_tokens"
Damage = Callable[[dict[str, mx.array]], object]


def drop(name: str) -> Damage:
    return lambda arrays: arrays.pop(name)


def change(name: str, made: Callable[[mx.array], mx.array]) -> Damage:
    return lambda arrays: arrays.update({name: made(arrays[name])})


def report(base: str, damage: Damage) -> list[str]:
    """The lines of the message, without its title."""
    files = open_files(TESTS / "fixtures" / base)
    arrays = {name: files.source.read(name) for name in files.source.headers}
    damage(arrays)
    with pytest.raises(WeightsError) as caught:
        assemble(files.config, Arrays(arrays))
    return str(caught.value).splitlines()[1:]


PACKED, TIED, PACKED_TIED = "llama/llama-mlx-4bit", "llama/llama-tied", "llama/llama-mlx-tied"


@pytest.mark.parametrize(
    ("base", "damage", "line"),
    [
        (PACKED, drop(f"{Q}.weight"), f"missing: {Q}.weight: expected [64, 8]"),
        (PACKED, drop(f"{Q}.scales"), f"missing: {Q}.scales: expected [64, 2]"),
        (PACKED, drop(f"{Q}.biases"), f"missing: {Q}.biases: expected [64, 2]"),
        (
            PACKED,
            change(f"{Q}.weight", lambda words: words.astype(mx.int32)),
            f"wrong dtype: {Q}.weight: expected U32, found I32",
        ),
        (
            PACKED,
            change(f"{Q}.weight", lambda words: words[:-1]),
            f"wrong shape: {Q}.weight: expected [64, 8], found [63, 8]",
        ),
        (PACKED, drop(f"{EMBED}.scales"), f"missing: {EMBED}.scales: expected [128, 2]"),
        (PACKED_TIED, drop(f"{EMBED}.biases"), f"missing: {EMBED}.biases: expected [128, 1]"),
        (TIED, drop(f"{EMBED}.weight"), f"missing: {EMBED}.weight: expected [128, 32]"),
        (
            TIED,
            change(f"{EMBED}.weight", lambda table: table[:-3]),
            f"wrong shape: {EMBED}.weight: expected [128, 32], found [125, 32]",
        ),
    ],
)  # fmt: skip
def test_one_fault_is_one_line(base: str, damage: Damage, line: str) -> None:
    assert report(base, damage) == [f"  {line}"]


def test_two_faults_are_two_lines() -> None:
    def both(arrays: dict[str, mx.array]) -> None:
        del arrays[f"{Q}.scales"], arrays[f"{Q}.biases"]

    lines = report(PACKED, both)
    assert lines == [f"  missing: {Q}.{part}: expected [64, 2]" for part in ("scales", "biases")]


def test_a_plain_matrix_with_scales_beside_it_still_has_them_reported() -> None:
    """Nothing is missing here: the scales themselves are the fault."""
    lines = report("llama/llama-gqa", lambda arrays: arrays.update({f"{Q}.scales": mx.zeros((32, 1))}))
    assert lines == [f"  unused: {Q}.scales: [32, 1] is not part of this model"]
