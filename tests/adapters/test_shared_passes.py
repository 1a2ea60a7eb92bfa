"""Requests with different adapters share passes, and each is bit for bit what it is alone."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from pathlib import Path

import pytest
from places import TESTS

from runner.adapters import AdapterFiles
from runner.adapters.used import Used
from runner.engine.engine import Engine
from runner.engine.loaded import Loaded, open_loaded
from runner.engine.lookup import PromptLookup
from runner.engine.sampler import Token
from runner.engine.sampling import SamplingParams
from runner.nn.batch import Apart
from runner.ops import cpu as kernels

ADAPTERS = TESTS / "fixtures" / "adapters"
SHARED = [
    "llama-two",
    "llama-two-doras",
    "llama-tokens",
    "llama-tokens-tied",
    "llama-mlx-4bit",
    "gpt2",
    "mlxlm-embeddings",
]
APART = ["mixtral", "gpt_oss"]
"""Experts see tokens in an order of their own: each set of adapters has a pass of its own."""


def opened(case: Path) -> Loaded:
    told = json.loads((case / "expected.json").read_text())
    found = [AdapterFiles.open(case / name, name, weight) for name, weight in told["adapters"].items()]
    return open_loaded(TESTS / told["base"], dtype="float32", adapters=found)


def answers(loaded: Loaded, sets: list[Mapping[str, float]], together: bool) -> list[list[Token]]:
    """Answers to prompts of several lengths with each set in turn, some of them with guesses."""
    with Engine(loaded, prefixes=0) as engine:
        found = []
        for index, weights in enumerate(sets * 2):
            params = SamplingParams(temperature=0.8 * (index % 2), seed=index, logprobs=1)
            prompt = [1, *(3 + i % 40 for i in range(5 + 5 * index)), *range(3, 9)]
            guesses = PromptLookup if index % 3 == 0 else None
            ticket = engine.submit(prompt, params, max_tokens=24, adapters=weights, proposer=guesses)
            found.append(ticket if together else list(ticket))
        return [list(answer) for answer in found]


@pytest.mark.parametrize("name", [*SHARED, *APART])
def test_each_is_as_it_is_alone(name: str) -> None:
    loaded = opened(ADAPTERS / name)
    names = [*loaded.adapter_weights]
    sets = [dict(zip(names, each, strict=True)) for each in itertools.product((0.0, 1.0), repeat=len(names))]
    alone, beside = answers(loaded, sets, False), answers(loaded, sets, True)
    assert [[token.id for token in one] for one in beside] == [[token.id for token in one] for one in alone]
    if kernels.unavailable() is None:
        assert beside == alone  # their log-probabilities too
    assert len({tuple(token.id for token in one) for one in alone}) > len(sets)
    assert loaded.mixes == (name in SHARED)


def test_passes_are_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = opened(ADAPTERS / "llama-two")
    model, passes = type(loaded.model), []
    called = model.__call__

    def counted(self: object, batch: object, caches: object) -> object:
        passes.append(1)
        return called(self, batch, caches)

    monkeypatch.setattr(model, "__call__", counted)
    with Engine(loaded, prefixes=0) as engine:
        for weights in ({}, {"first": 1.0}, {"second": 0.5}, {"first": 1.0, "second": 1.0}):
            engine.submit([1, 5, 6], max_tokens=60, adapters=weights)
        tickets = [engine.submit([1, 5, 6], max_tokens=30, adapters=w) for w in ({}, {"first": 1.0}, {"second": 0.5})]
        assert all(len(list(ticket)) == 30 for ticket in tickets)
    assert len(passes) < 60


def test_what_a_layer_cannot_tell_apart_is_said() -> None:
    used = Used({"a": 1.0, "b": 0.0})
    assert used.same(["a"]) == {"a": 1.0, "b": 0.0}
    used.set([(3, {"a": 1.0, "b": 0.0}), (2, {"a": 1.0, "b": 2.0})])
    assert used.same(["a"])["a"] == 1.0  # as far as a layer with this one is concerned
    with pytest.raises(Apart):
        used.same(["a", "b"])
    used.set([(1, {"a": 0.0, "b": 0.0})])
    assert used.same(["a", "b"]) == {"a": 0.0, "b": 0.0}
