"""A sequence that one kernel takes through its steps, ahead of what is read, beside what others do meanwhile."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest
from places import TESTS

from runner.engine import compiled as module
from runner.engine import step_shape
from runner.engine.compiled import Compiled
from runner.engine.engine import Engine
from runner.engine.loaded import Loaded, open_loaded
from runner.engine.sampling import SamplingParams
from runner.engine.scheduler import Scheduler
from runner.engine.sharing import Sharing
from runner.engine.ticket import Mailbox, Order
from runner.errors import UsageError
from runner.nn.batch import Batch
from runner.ops.cuda.decoder import Picking, Said

PROMPT = [1 + index % 30 for index in range(40)]


class Twin:
    """`StepDecoder`, which computes what it is given at once, three steps a launch, and counts tokens in place."""

    def __init__(self, loaded: Loaded) -> None:
        self._loaded = loaded
        self.division = SimpleNamespace(blocks=16)
        self.ahead, self.closed, self.late = 3, False, 0
        self._said: list[tuple[Said, mx.array]] = []

    @property
    def pending(self) -> int:
        return len(self._said)

    @property
    def queued(self) -> bool:
        return len(self._said) <= 3

    def refresh(self) -> None: ...

    def settle(self) -> None: ...

    def close(self) -> None:
        self.closed = True

    def bind(self, rows: Any) -> None:
        self._caches = rows
        self.finish()

    def finish(self) -> None:
        self._said = []

    def launch(
        self, steps: int, position: int, token: int | None, picking: Picking, chances: Sequence[float], *, keep: bool
    ) -> None:
        self.late += self.closed
        for index in range(steps):
            caches = self._caches.ahead(position + index - self._caches.offset)
            fed = mx.array([[self._last if token is None or index else token]], mx.int32)
            model = self._loaded.model
            raw = logits = model.logits(model(Batch(fed, caches.offset), caches))[0, -1].astype(mx.float32)
            if (counts := picking.counts) is not None:
                seen = counts.reshape(-1)
                repeated = mx.where(logits > 0, logits / picking.repetition, logits * picking.repetition)
                logits = mx.where(seen > 0, repeated - picking.presence - seen * picking.frequency, logits)
            self._last = int(mx.argmax(logits).item())
            if counts is not None:
                counts[0, self._last] = counts[0, self._last] + 1
            mx.eval(self._caches.arrays)
            self._said.append((Said(self._last, float(mx.max(logits).item()), False), raw))

    def read(self) -> Said:
        self.late += self.closed
        said, self.logits = self._said.pop(0)
        return said


def opened() -> Loaded:
    loaded = open_loaded(TESTS / "fixtures" / "llama" / "llama-gqa", dtype="float32")
    # A prompt that takes several passes: beside it a row that decodes has passes of its own.
    return dataclasses.replace(loaded, device=dataclasses.replace(loaded.device, chunk=16))


def twinned(monkeypatch: pytest.MonkeyPatch) -> tuple[Loaded, Twin]:
    monkeypatch.setattr(module, "ROOM", 64)
    monkeypatch.setattr(step_shape, "rows_of", lambda caches: caches)
    loaded = opened()
    twin = Twin(loaded)
    loaded = dataclasses.replace(loaded, device=dataclasses.replace(loaded.device, compiles=True))
    loaded.compiled = Compiled(loaded.model, loaded.dtype, None)
    loaded.compiled._decoder = twin  # type: ignore[assignment]
    loaded.compiled.refused_rows = "there is no GPU"
    return loaded, twin


def answer(loaded: Loaded, params: SamplingParams, joined: int | None) -> list[int]:
    """Tokens of a request that another joins after so many of the scheduler's steps, or none does."""

    def job() -> list[int]:
        scheduler, mailbox, steps = Scheduler(loaded, Sharing(loaded, 0)), Mailbox(), 0
        scheduler.add(Order(ids=list(PROMPT), params=params, budget=40), mailbox)
        while True:
            if steps == joined:
                other = Order(ids=[2 + i % 25 for i in range(60)], params=SamplingParams(temperature=0), budget=3)
                scheduler.add(other, Mailbox())
            steps += 1
            if not scheduler.step():
                break
        events = [mailbox.events.get_nowait() for _ in range(mailbox.events.qsize())]
        return [event.id for event in events if hasattr(event, "id")]

    return loaded.run(job)


@pytest.mark.parametrize("joined", [None, 12, 20])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"repetition_penalty": 1.3, "frequency_penalty": 0.3},  # counted by the kernel
        {"repetition_penalty": 1.3, "frequency_penalty": 0.3, "logprobs": 0},  # by operations, from its logits
        {"repetition_penalty": 1.3, "frequency_penalty": 0.3, "penalty_window": 30},
    ],
)
def test_penalties_count_what_was_read_wherever_it_was_picked(
    options: dict[str, Any], joined: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel counts tokens ahead that nobody reads, if another request joins; then another sampler goes on."""
    params = SamplingParams(temperature=0, **options)
    wanted = answer(opened(), params, None)
    loaded, _ = twinned(monkeypatch)
    assert answer(loaded, params, joined) == wanted


def test_a_closed_model_is_not_asked_for_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernel's memory is gone."""
    loaded, twin = twinned(monkeypatch)
    with Engine(loaded) as engine:
        tokens = iter(engine.submit(PROMPT, SamplingParams(temperature=0), max_tokens=200))
        for _ in range(5):
            next(tokens)
        loaded.close()
        with pytest.raises(UsageError, match="was closed"):
            list(tokens)
    assert twin.closed and not twin.late
