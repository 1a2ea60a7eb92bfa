"""Answers by one kernel a step: on an NVIDIA GPU against operations; anywhere, how an answer goes through launches."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from places import TESTS

from runner.cache import kv
from runner.cache.caches import Caches
from runner.engine import compiled as module
from runner.engine.compiled import Broken, Compiled, SingleSteps
from runner.engine.engine import Engine
from runner.engine.loaded import Loaded, open_loaded
from runner.engine.prompt_cache import PromptCache
from runner.engine.replay import Steps
from runner.engine.request import Run
from runner.engine.sampling import SamplingParams
from runner.engine.ticket import Order
from runner.errors import BackendError
from runner.nn.batch import Batch
from runner.ops.cuda.decoder import Picking, Said
from runner.ops.cuda.driver import Driver
from runner.ops.device import current

GQA = TESTS / "fixtures/llama/llama-gqa"
PROMPT = [1 + index % 30 for index in range(40)]
FIXTURES = sorted(path.parent for path in TESTS.glob("fixtures/*/**/config.json"))
needs_gpu = pytest.mark.skipif(not current().compiles, reason="there is no kernel for this device")
OPTIONS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 1.0, "seed": 3},
    {"temperature": 0.8, "seed": 3, "top_k": 5},
    {"temperature": 0.8, "seed": 3, "top_p": 0.9},
    {"temperature": 1.3, "seed": 4, "top_k": 20, "top_p": 0.8, "min_p": 0.02},
    {"temperature": 1.3, "seed": 4, "min_p": 0.05},
    {"temperature": 0.9, "seed": 5, "top_k": 30, "repetition_penalty": 1.2, "presence_penalty": 0.3},
    {"temperature": 1, "seed": 5, "logit_bias": {5: 3.0, 7: -4.0}},
    {"temperature": 0.7, "seed": 9, "logprobs": 2},
    {"temperature": 1, "seed": 2, "repetition_penalty": 1.3, "penalty_window": 8},
    {"temperature": 2.0, "seed": 2, "top_p": 0.99},
]


def answer(loaded: Loaded, count: int = 60, kept: PromptCache | None = None, **options: Any) -> list[int]:
    order = Order(ids=list(PROMPT), params=SamplingParams(**options), budget=count)
    return [token.id for token in Run(loaded, kept or PromptCache(loaded), order) if token is not None]


def by_operations(loaded: Loaded) -> Loaded:
    """The same model without a kernel."""
    return dataclasses.replace(loaded, device=dataclasses.replace(loaded.device, compiles=False))


class Twin:
    """What `StepDecoder` does, from the model's logits over all ids, one launch after another."""

    def __init__(self, loaded: Loaded, *, fails_at: int = 10**9, unresolved: Sequence[int] = ()) -> None:
        self.loaded = loaded
        self.division = SimpleNamespace(blocks=16)
        self.ahead, self.pending, self.steps, self.launches, self.bound = 3, 0, 0, 0, 0
        self.logits = mx.zeros((loaded.config.vocab_size,))
        self._fails_at, self._unresolved = fails_at, unresolved
        self._ids: list[int] = []
        self._plan: list[tuple[int, int | None, Picking]] = []

    @property
    def queued(self) -> bool:
        return len(self._plan) < 6

    def refresh(self) -> None: ...

    def settle(self) -> None: ...

    def bind(self, rows: Sequence[Any]) -> None:
        self.bound += 1
        self.finish()

    def finish(self) -> None:
        self._plan, self.pending = [], 0

    def launch(
        self, steps: int, position: int, token: int | None, picking: Picking, chances: Sequence[float], *, keep: bool
    ) -> None:
        assert 0 < steps <= self.ahead or keep
        self.launches += 1
        for index in range(steps):
            self._plan.append((position + index, token if index == 0 else None, picking))
        self.pending += steps

    def read(self) -> Said:
        position, token, _ = self._plan.pop(0)
        self.pending -= 1
        self.steps += 1
        if self.steps == self._fails_at:
            raise BackendError("a block waited in vain for another")
        self._ids = self._ids[: position - len(PROMPT)]
        self._ids.append(self._next if token is None else token)
        assert len(self._ids) == position + 1 - len(PROMPT)
        self.logits = self.loaded.logits([*PROMPT, *self._ids])[-1]
        self._next = int(mx.argmax(self.logits).item())
        return Said(self._next, float(mx.max(self.logits).item()), self.steps in self._unresolved)


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> Loaded:
    """A model whose rows are kept as a kernel reads them; the twin has no rows to write."""
    monkeypatch.setattr(module, "ROOM", 8)
    monkeypatch.setattr(kv, "STEP", 8)  # so that rows need room again within a short answer
    return open_loaded(GQA, dtype="float32")


def twinned(loaded: Loaded, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> Twin:
    from runner.engine import step_shape

    twin = Twin(loaded, **settings)
    twin_ids = twin._ids

    monkeypatch.setattr(step_shape, "rows_of", lambda caches: twin_ids)
    loaded.compiled = Compiled(loaded.model, loaded.dtype, None)
    loaded.compiled._decoder = twin  # type: ignore[assignment]
    return twin


def test_rows_that_others_have_moved_are_looked_up_again(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    """As kernels for several sequences move those of one that was alone before, and is again."""
    twin = twinned(loaded, monkeypatch)
    caches = loaded.new_caches()
    mx.eval(loaded.model(Batch(mx.array([PROMPT])), caches))
    caches.make_room(30)
    steps = SingleSteps(loaded.compiled, caches, Steps(loaded.model, caches, loaded.device.ops))
    for bound, room in enumerate((0, 50), start=1):
        caches.make_room(room)
        for _ in range(2):
            mx.eval(steps(mx.array([[3]])))
            assert twin.bound == bound


def test_an_answer_in_launches(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = answer(loaded, 30, temperature=0)
    twin = twinned(loaded, monkeypatch)
    kept = PromptCache(loaded)
    assert answer(loaded, 30, kept, temperature=0) == expected
    assert twin.steps == 29 and twin.bound > 1 and twin.pending == 0
    assert twin.launches < twin.steps / 2
    assert kept.caches.offset == len(PROMPT) + 29  # the last token was not fed back


@pytest.mark.parametrize("options", [{"temperature": 0, "logprobs": 1}, {"temperature": 0.8, "seed": 1, "logprobs": 0}])
def test_what_the_kernel_cannot_pick_is_picked_from_its_logits(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    expected = answer(loaded, 20, **options)
    twin = twinned(loaded, monkeypatch)
    assert answer(loaded, 20, **options) == expected
    assert twin.launches == twin.steps == 19


def test_a_token_that_the_kernel_leaves_to_the_host(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = answer(loaded, 20, temperature=0)
    twin = twinned(loaded, monkeypatch, unresolved=(4, 5, 11))
    assert answer(loaded, 20, temperature=0) == expected
    assert twin.bound >= 4


def test_a_kernel_that_fails_is_not_asked_again(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = answer(loaded, 20, temperature=0)
    twin = twinned(loaded, monkeypatch, fails_at=6)
    got = answer(loaded, 20, temperature=0)
    assert len(got) == 20 and got[:6] == expected[:6] and twin.steps == 6
    assert loaded.compiled.refused == "a block waited in vain for another" and "in vain" in loaded.compiled.way
    assert answer(loaded, 20, temperature=0) == expected


def test_one_answer_at_a_time(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = answer(loaded, 12, temperature=0)
    twin = twinned(loaded, monkeypatch)
    order = Order(ids=list(PROMPT), params=SamplingParams(temperature=0), budget=12)
    first = iter(Run(loaded, PromptCache(loaded), order))
    began = [token.id for token in (next(first) for _ in range(4)) if token is not None]
    assert answer(loaded, 12, temperature=0) == expected and twin.steps == len(began) - 1
    first.close()
    assert not loaded.run(lambda: loaded.compiled._busy)
    assert answer(loaded, 12, temperature=0) == expected and twin.steps > len(began)


def test_a_request_that_is_alone_on_a_server(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    options = SamplingParams(temperature=0)

    def answers(count: int) -> list[list[int]]:
        with Engine(dataclasses.replace(loaded, device=device)) as engine:
            tickets = [engine.submit(PROMPT, options, max_tokens=16, choice=choice) for choice in range(count)]
            return [[token.id for token in ticket] for ticket in tickets]

    device = dataclasses.replace(loaded.device, compiles=False)
    expected = answers(2)
    twin = twinned(loaded, monkeypatch)
    kernel, device = loaded.compiled, dataclasses.replace(loaded.device, compiles=True)
    monkeypatch.setattr("runner.engine.loaded.Compiled", lambda *arguments: kernel)
    assert answers(1) == expected[:1]
    assert twin.steps == 15 and twin.launches < twin.steps and not kernel._busy


def test_no_kernel_without_a_device_for_it() -> None:
    loaded = by_operations(open_loaded(GQA))
    assert not loaded.run(loaded.compiled.prepare) and "operations" in loaded.compiled.way
    with pytest.raises(Broken):
        next(loaded.compiled.decode(loaded.new_caches(), 1, 2, None))


@needs_gpu
@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.name)
def test_every_family_that_fits(path: Any) -> None:
    loaded = open_loaded(path, dtype="float32")
    if not loaded.run(loaded.compiled.prepare):
        pytest.skip(loaded.compiled.way)
    assert answer(loaded, temperature=0) == answer(by_operations(loaded), temperature=0)


@needs_gpu
@pytest.mark.parametrize("options", OPTIONS)
def test_tokens_are_picked_as_by_operations(options: dict[str, Any]) -> None:
    loaded = open_loaded(GQA, dtype="float32")
    first = answer(loaded, **options)
    assert first == answer(loaded, **options) == answer(by_operations(loaded), **options)
    assert loaded.compiled.refused is None


@needs_gpu
@pytest.mark.parametrize("path", ["llama/llama-gqa", "llama/llama-mlx-4bit", "llama/llama-mlx-tied"])
def test_a_ring_that_lanes_fill(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As GPUs without bulk copies have it."""
    expected = answer(open_loaded(TESTS / "fixtures" / path), temperature=0)
    monkeypatch.setattr(Driver, "bulk", False)
    loaded = open_loaded(TESTS / "fixtures" / path)
    assert answer(loaded, temperature=0) == expected
    assert loaded.compiled.refused is None and loaded.compiled.decoder.division.copies


@needs_gpu
def test_logits_are_nearer_to_float32_than_those_of_operations() -> None:
    """By the same weights, over the same rows."""
    loaded, exact = open_loaded(GQA), by_operations(open_loaded(GQA, dtype="float32"))
    token = mx.array([[5]], mx.int32)

    def filled(one: Loaded) -> Caches:
        caches = one.new_caches()
        loaded.model(Batch(mx.array([PROMPT], mx.int32)), rounded := loaded.new_caches())
        for mine, other in zip(caches, rounded, strict=True):
            mine.append(other.history.keys.astype(one.dtype), other.history.values.astype(one.dtype))
        mx.eval(caches.arrays)
        return caches

    def operations(one: Loaded) -> np.ndarray:
        return np.array(Steps(one.model, filled(one), one.device.ops)(token)[0].astype(mx.float32))

    def kernel() -> np.ndarray:
        caches = filled(loaded)
        return np.array(SingleSteps(loaded.compiled, caches, Steps(loaded.model, caches, loaded.device.ops))(token)[0])

    want, mine, others = (loaded.run(job) for job in (lambda: operations(exact), kernel, lambda: operations(loaded)))
    assert np.abs(mine - want).max() < 0.5 * np.abs(others - want).max()
    assert loaded.compiled.refused is None


@needs_gpu
def test_a_block_that_says_nothing_ends_the_kernel_and_not_the_process() -> None:
    loaded = open_loaded(GQA, dtype="float32")
    expected = answer(loaded, temperature=0)
    assert loaded.compiled._decoder is not None
    loaded.compiled._decoder._fault, loaded.compiled._decoder._limit = True, 0.05
    assert answer(loaded, temperature=0) == expected
    assert loaded.compiled.refused is not None and "in vain" in loaded.compiled.refused
    assert answer(loaded, temperature=0) == expected


@needs_gpu
def test_requests_of_a_server_alone_and_together() -> None:
    loaded = open_loaded(GQA, dtype="float32")

    def answers(one: Loaded, delays: Sequence[int]) -> list[list[int]]:
        options = SamplingParams(temperature=0.9, seed=4, top_k=8)
        with Engine(one) as engine:
            tickets, found = [], []
            for choice in range(3):
                tickets.append(engine.submit(PROMPT, options, max_tokens=40, choice=choice))
                found.append([token.id for _, token in zip(range(delays[choice]), tickets[-1], strict=False)])
            return [began + [token.id for token in ticket] for began, ticket in zip(found, tickets, strict=True)]

    want = answers(by_operations(loaded), [0, 0, 0])
    assert answers(loaded, [0, 0, 0]) == answers(loaded, [10, 5, 20]) == answers(loaded, [40, 40, 40]) == want
    assert loaded.compiled.refused is None


@needs_gpu
def test_many_answers_hold_no_more_memory() -> None:
    loaded = open_loaded(GQA)
    for _ in range(50):
        answer(loaded, 8, temperature=0)
    before = loaded.run(mx.get_active_memory)
    for _ in range(2000):
        answer(loaded, 8, temperature=0)
    assert loaded.run(mx.get_active_memory) <= before + (1 << 20)
