"""The message of all problems: grouped by layer, bounded in lines and memory, whatever names a file has."""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sources import Info

from runner.config.base import Config
from runner.errors import WeightsError
from runner.nn.fast import RMSNorm
from runner.weights.plan import Planner, plan
from runner.weights.problems import MAX_LINES, Problems
from runner.weights.tags import weight
from runner.weights.tree import Leaf

CONFIG = Config(model_type="t", vocab_size=3, hidden_size=64, num_hidden_layers=2, num_attention_heads=2)


@dataclass
class Layer:
    norm: RMSNorm = weight("norm", "hidden_size")
    other: RMSNorm = weight("other", "hidden_size")


@dataclass
class Model:
    layers: list[Layer] = weight("layers", length="num_hidden_layers")


def headers(names: list[str]) -> dict[str, Info]:
    return {name: Info("U8", (0,), 0) for name in names}


def refusal(names: list[str], layers: int = 2) -> tuple[str, int]:
    """The message for a checkpoint of empty tensors with these names, and the peak of Python's memory."""
    config = Config(**{**vars(CONFIG), "num_hidden_layers": layers})
    found = headers(names)
    tracemalloc.start()
    try:
        with pytest.raises(WeightsError) as caught:
            plan(Model, config, found)
        return str(caught.value), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


HUGE: dict[str, Callable[[int], str]] = {
    "dots": lambda size: "." * size,
    "one letter between dots": lambda size: "a." * (size // 2),
    "layer numbers": lambda size: ".1" * (size // 2),
    "no dots": lambda size: "a" * size,
    "an inert table": lambda size: "attention." * (size // 10) + "bias_",
    "line ends": lambda size: "\n" * size,
}


@pytest.mark.parametrize("kind", HUGE)
def test_a_huge_name_takes_memory_and_time_in_proportion(kind: str) -> None:
    size = 200_000
    begin = time.monotonic()
    text, peak = refusal([HUGE[kind](size), HUGE[kind](size) + "b"])
    assert time.monotonic() - begin < 5
    assert peak < 10 * size
    assert len(text) < 4000 and text.count("\n") < 10 and "unused" in text


def test_many_small_tensors_make_a_short_message() -> None:
    names = [f"{i}" for i in range(50_000)]
    text, peak = refusal(names)
    assert peak < 20 * 50 * len(names)  # an entry of a header has 50 bytes or more
    assert text.count("\n") <= MAX_LINES + 1 and text.splitlines()[0].endswith("(50004 problems)")
    # The four missing tensors are two lines, so 98 of the unused ones have a line.
    assert text.splitlines()[-1] == f"  and {50_000 - (MAX_LINES - 2)} more"


def test_as_many_layers_as_there_are_tensors_are_not_all_looked_for() -> None:
    names = [f"layers.{i}.z" for i in range(20_000)]
    text, peak = refusal(names, layers=20_000)
    assert peak < 20 * 60 * len(names)
    assert "missing: layers.*.norm.weight" in text and "no more was looked for (10001 problems)" in text


def test_similar_names_are_looked_for_among_thousands_in_a_moment() -> None:
    begin = time.monotonic()
    text, _ = refusal([f"layers.{i}x.norm.weight" for i in range(30_000)])
    assert time.monotonic() - begin < 5
    assert "missing: layers.*.norm.weight (2 tensors): expected [64]; nearest name here: layers." in text


def test_a_similar_name_is_shown_for_all_layers_at_once() -> None:
    problems = Problems()
    for index in range(30):
        problems.missing(f"layers.{index}.norm.weight", (64,))
    text = problems.message(f"layers.{index}.nrom.weight" for index in range(30))
    assert text.splitlines()[1:] == [
        "  missing: layers.*.norm.weight (30 tensors): expected [64]; nearest name here: layers.*.nrom.weight"
    ]


def test_names_cannot_move_the_cursor() -> None:
    problems = Problems()
    problems.unused("a\x1b[2J\nb", (1,))
    assert problems.message([]).splitlines()[1:] == ["  unused: a\\x1b[2J\\nb: [1] is not part of this model"]


PARTS = st.text("ab.0", max_size=8)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.sets(PARTS, max_size=12), PARTS)
def test_what_is_present_equals_a_search_of_every_name(names: set[str], name: str) -> None:
    planner = Planner(headers(sorted(names)), {})
    naive = [item for item in sorted(names) if item.startswith(f"{name}.")]
    assert list(planner.below(name)) == naive
    assert planner.present(Leaf(name)) == (name in names or bool(naive))
