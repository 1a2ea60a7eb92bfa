"""Requests with different adapters share passes, and each is bit for bit what it is alone."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import json
from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx
import pytest
from engine_requests import idle
from places import TESTS
from plain_path import PLAIN

from runner.adapters import AdapterFiles
from runner.adapters.layers import AdaptedExperts
from runner.adapters.used import Used
from runner.engine.engine import Engine
from runner.engine.loaded import Loaded, open_loaded
from runner.engine.lookup import PromptLookup
from runner.engine.sampler import Token
from runner.engine.sampling import SamplingParams
from runner.nn.batch import Apart, Batch
from runner.nn.mla import LatentAttention
from runner.ops.device import current

ADAPTERS = TESTS / "fixtures" / "adapters"
SHARED = [
    "llama-two",
    "llama-two-doras",
    "llama-tokens",
    "llama-tokens-tied",
    "llama-mlx-4bit",
    "gpt2",
    "mlxlm-embeddings",
    "mixtral",
    "gpt_oss",
    "deepseek_v2",
    "deepseek_v2-dora",
]


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


def sets_of(loaded: Loaded) -> list[Mapping[str, float]]:
    names = [*loaded.adapter_weights]
    return [dict(zip(names, each, strict=True)) for each in itertools.product((0.0, 1.0), repeat=len(names))]


@pytest.mark.parametrize("name", SHARED)
def test_each_is_as_it_is_alone(name: str) -> None:
    loaded = opened(ADAPTERS / name)
    sets = sets_of(loaded)
    alone, beside = answers(loaded, sets, False), answers(loaded, sets, True)
    assert [[token.id for token in one] for one in beside] == [[token.id for token in one] for one in alone]
    if current().ops.one_form:
        assert beside == alone  # their log-probabilities too
    assert len({tuple(token.id for token in one) for one in alone}) > len(sets)
    assert loaded.mixes


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v2"])
def test_without_kernels(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where tokens would be sorted by expert, and where keys and values may be made of what a request has left."""
    monkeypatch.setattr("runner.engine.loaded.current", lambda: PLAIN)
    monkeypatch.setattr("runner.nn.moe.SORTED_FROM", 8)
    loaded, forms = opened(ADAPTERS / name), set[str]()
    for form in ("expanded", "absorbed"):
        real = getattr(LatentAttention, form)
        seen = lambda self, *rest, real=real, form=form: (forms.add(form), real(self, *rest))[1]  # noqa: E731
        monkeypatch.setattr(LatentAttention, form, seen)
    alone, beside = answers(loaded, sets_of(loaded), False), answers(loaded, sets_of(loaded), True)
    assert [[token.id for token in one] for one in beside] == [[token.id for token in one] for one in alone]
    assert loaded.mixes and len(forms) == 2 * (name == "deepseek_v2")


@pytest.mark.parametrize("name", ["llama-two", "mixtral", "gpt_oss", "deepseek_v2"])
def test_passes_are_shared(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = opened(ADAPTERS / name)
    model, passes = type(loaded.model), list[int]()
    called = model.__call__

    def counted(self: object, batch: Batch, caches: object) -> object:
        passes.append(len(batch.segments))
        return called(self, batch, caches)

    monkeypatch.setattr(model, "__call__", counted)
    with Engine(loaded, prefixes=0) as engine:
        for weights in sets_of(loaded):  # let go of at once
            engine.submit([1, 5, 6], max_tokens=60, adapters=weights)
        tickets = [engine.submit([1, 5, 6], max_tokens=30, adapters=weights) for weights in sets_of(loaded)]
        assert all(len(list(ticket)) == 30 for ticket in tickets)
    assert len(passes) < 60 and max(passes) >= len(tickets)


@pytest.mark.skipif(current().ops.recorder is None, reason="this device records nothing")
def test_steps_of_each_set_are_compared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Others' adapters make nothing forgotten; and nothing of a model that is closed stays in memory."""
    gc.collect()  # of earlier tests' models, so that none goes meanwhile
    before, compared = mx.get_active_memory(), list[int]()
    loaded = opened(ADAPTERS / "llama-two")
    recorder = loaded.device.ops.recorder
    assert recorder is not None
    counting = dataclasses.replace(recorder, record=lambda *rest: (compared.append(1), recorder.record(*rest))[1])
    ops = dataclasses.replace(loaded.device.ops, recorder=counting)
    loaded.device = dataclasses.replace(loaded.device, ops=ops)
    sets, held = sets_of(loaded), list[int]()
    with Engine(loaded, prefixes=0) as engine:
        for _ in range(3):
            for weights in sets:
                assert len(list(engine.submit([1, 5, 6], max_tokens=20, adapters=weights))) == 20
            for ticket in [engine.submit([1, 5, 6], max_tokens=30, adapters=weights) for weights in sets]:
                assert len(list(ticket)) == 30
            idle(engine)
            held.append(loaded.run(mx.get_active_memory))
    assert len(sets) < len(compared) < 3 * len(sets) and held[0] == held[2]
    loaded.close()
    assert mx.get_active_memory() == before


def test_a_layer_that_cannot_tell_them_apart_gives_each_set_a_pass_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = opened(ADAPTERS / "mixtral")
    sets = sets_of(loaded)
    alone = answers(loaded, sets, False)
    monkeypatch.setattr(AdaptedExperts, "__call__", refusing)
    beside = answers(loaded, sets, True)
    assert [[token.id for token in one] for one in beside] == [[token.id for token in one] for one in alone]
    assert not loaded.mixes


def refusing(self: AdaptedExperts, x: mx.array, experts: mx.array, *, sorted_indices: bool = False) -> mx.array:
    return self._added(self.used.same(["adapter"]), x, self.base(x, experts), experts, False)


def test_what_a_layer_cannot_tell_apart_is_said() -> None:
    used = Used({"a": 1.0, "b": 0.0})
    assert used.same(["a"]) == {"a": 1.0, "b": 0.0}
    used.set([(3, {"a": 1.0, "b": 0.0}), (2, {"a": 1.0, "b": 2.0})])
    assert used.same(["a"])["a"] == 1.0  # as far as a layer with this one is concerned
    with pytest.raises(Apart):
        used.same(["a", "b"])
    used.set([(1, {"a": 0.0, "b": 0.0})])
    assert used.same(["a", "b"]) == {"a": 0.0, "b": 0.0}
