"""Many requests at once: each gets the tokens that it gets alone, and none holds up or takes down another for long."""

from __future__ import annotations

import asyncio
import dataclasses
import re
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from engine_requests import DRAWN, KINDS, chunked, idle, ids, naive, opened, prompts
from places import TESTS

import runner
from runner.cache.several import Memories
from runner.engine.draft import DraftModel
from runner.engine.engine import Engine
from runner.engine.loaded import Loaded, open_loaded
from runner.engine.rows import Row
from runner.engine.sampler import Sampled, Sampler, SamplingState
from runner.engine.sampling import SamplingParams
from runner.engine.scheduler import Scheduler
from runner.engine.ticket import Ticket
from runner.errors import BackendError, NumericsError, UsageError
from runner.nn.batch import Batch
from runner.ops.device import current


@pytest.fixture
def engine() -> Iterator[Engine]:
    with Engine(opened("rows")) as made:
        yield made


@pytest.mark.parametrize("kind", KINDS)
def test_each_answer_is_what_it_is_alone(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = opened(kind)
    chunked(monkeypatch, loaded, 24)
    asked = prompts(loaded, (3, 50, 1, 17, 30, 8))
    params = [None, DRAWN, None, DRAWN, DRAWN, None]
    with Engine(loaded, rows=4) as engine:
        tickets = [engine.submit(p, s, max_tokens=12) for p, s in zip(asked, params, strict=True)]
        found = [ids(ticket) for ticket in tickets]
    assert found == [naive(loaded, p, 12, s) for p, s in zip(asked, params, strict=True)]
    assert {ticket.finish_reason for ticket in tickets} == {"length"}


def test_an_end_token_ends(engine: Engine) -> None:
    wanted = naive(opened("rows"), [5, 6, 7], 20)
    end = wanted[7]
    ticket = engine.submit([5, 6, 7], max_tokens=20, ends=[end])
    assert ids(ticket) == wanted[: wanted.index(end) + 1]
    assert ticket.finish_reason == "stop"


class Gate:
    """Holds the engine's thread up before a pass, until it is opened."""

    def __init__(self, loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
        self.passes = 0
        self.fails: BaseException | None = None
        self.opened = threading.Event()
        self.seen: list[int] = []  # tokens of each pass
        inner = loaded.model

        class Slow:
            def __call__(_, batch: Batch, caches: Memories) -> mx.array:
                self.passes += 1
                self.seen.append(batch.ids.size)
                assert self.opened.wait(20)
                if self.fails is not None:
                    raise self.fails
                return inner(batch, caches)

            def logits(_, hidden: mx.array) -> mx.array:
                return inner.logits(hidden)

        monkeypatch.setattr(loaded, "model", Slow())

    def wait(self, passes: int) -> None:
        for _ in range(2000):
            if self.passes >= passes:
                return
            time.sleep(0.005)
        raise AssertionError("no pass began")


def test_cancelling_frees_a_row_in_the_middle_of_its_prompt(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = opened("rows")
    chunked(monkeypatch, loaded, 8)
    gate = Gate(loaded, monkeypatch)
    long, short = prompts(loaded, (80, 4))
    ticket = engine.submit(long, max_tokens=5)
    gate.wait(1)
    ticket.cancel()
    gate.opened.set()
    assert ids(ticket) == []
    assert ticket.finish_reason == "cancelled"
    assert gate.passes <= 2  # of ten
    assert len(ids(engine.submit(short, max_tokens=5))) == 5


def test_a_ticket_that_is_let_go_of_is_cancelled(engine: Engine) -> None:
    engine.submit([1, 2, 3], max_tokens=100_000)
    idle(engine)


def test_a_deadline_ends_what_waits_and_what_runs(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(opened("rows"), monkeypatch)
    tickets = [engine.submit([1, 2, 3], max_tokens=100_000, timeout=0.05) for _ in range(2)]
    gate.wait(1)
    time.sleep(0.1)
    gate.opened.set()
    for ticket in tickets:
        list(ticket)
        assert ticket.finish_reason == "timeout"


def test_who_is_urgent_goes_first_and_equals_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = opened("rows")
    gate = Gate(loaded, monkeypatch)
    order: list[str] = []
    with Engine(loaded, rows=1) as engine:
        first = engine.submit([1], max_tokens=1)
        gate.wait(1)
        asked = [("a", 0), ("b", 0), ("c", 2), ("d", 1)]
        tickets = [(name, engine.submit([2], max_tokens=1, priority=priority)) for name, priority in asked]

        def read(name: str, ticket: Ticket) -> None:
            list(ticket)
            order.append(name)

        threads = [threading.Thread(target=read, args=pair) for pair in tickets]
        ended: list[int] = []
        real = Row.end

        def end(row: Row, reason: str, error: BaseException | None = None) -> None:
            ended.append(row.order.priority * 100 - row.number)
            real(row, reason, error)

        monkeypatch.setattr(Row, "end", end)
        for thread in threads:
            thread.start()
        gate.opened.set()
        list(first)
        for thread in threads:
            thread.join()
    assert ended[1:] == sorted(ended[1:], reverse=True)
    assert sorted(order) == ["a", "b", "c", "d"]


def test_decoding_rows_go_on_while_a_long_prompt_is_read(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each pass has a token of theirs and a piece of the prompt."""
    loaded = opened("rows")
    chunked(monkeypatch, loaded, 16)
    gate = Gate(loaded, monkeypatch)
    decoding = engine.submit([3, 4], max_tokens=30)
    reading = engine.submit(prompts(loaded, (100,))[0], max_tokens=2)
    gate.opened.set()
    assert len(ids(decoding)) == 30
    assert len(ids(reading)) == 2
    assert max(gate.seen) <= 16
    assert gate.seen.count(16) >= 5


@pytest.mark.parametrize("error", [ZeroDivisionError("of a layer"), OSError("a device is gone")])
def test_an_exception_in_a_step_fails_everybody(
    error: Exception, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(opened("rows"), monkeypatch)
    gate.fails = error
    tickets = [engine.submit([1, 2, 3], max_tokens=5) for _ in range(3)]
    gate.opened.set()
    for ticket in tickets:
        with pytest.raises(type(error), match=re.escape(str(error))):
            list(ticket)
        assert ticket.finish_reason == "error"
    assert not engine.status().alive and engine.budget.used == 0
    with pytest.raises(BackendError, match=re.escape(str(error))):
        engine.submit([1], max_tokens=1)


@pytest.mark.parametrize("error", [RuntimeError("[malloc] Unable to allocate 12 bytes"), MemoryError("none")])
@pytest.mark.parametrize("place", ["built", "scheduled", "read"])
def test_out_of_memory_inside_a_step(error: Exception, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulated, as MLX and Python say so, in the middle of answers: as a pass is built, handed over or read.

    What the rows held is let go of, those that wait fail with the cause, and the model answers another engine.
    """
    loaded = opened("rows")
    asked, passes = prompts(loaded, (30, 4, 9, 12)), [0]
    wanted = [naive(loaded, prompt, 40) for prompt in asked]

    def held() -> int:
        mx.synchronize()
        return mx.get_active_memory()

    before = loaded.run(held)

    def failing(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            passes[0] += 1
            if passes[0] > 8:
                raise error
            return real(*arguments)

        return call

    engine = Engine(loaded, rows=3)
    with monkeypatch.context() as patch:
        if place == "built":
            patch.setattr(type(loaded.model), "__call__", failing(type(loaded.model).__call__))
        elif place == "scheduled":
            ops = dataclasses.replace(loaded.device.ops, schedule=failing(loaded.device.ops.schedule))
            patch.setattr(engine._workers[""]._scheduler._maker, "_ops", ops)
        else:
            patch.setattr(Sampled, "read", failing(Sampled.read))
        tickets = [engine.submit(prompt, max_tokens=40) for prompt in asked]
        for ticket, tokens in zip(tickets, wanted, strict=True):
            found: list[int] = []
            with pytest.raises(type(error), match=re.escape(str(error))):
                found += (token.id for token in ticket)
            assert found == tokens[: len(found)] and ticket.finish_reason == "error"
        assert any(ticket.read for ticket in tickets) and not all(ticket.read for ticket in tickets)  # one waited
        with pytest.raises(BackendError, match=re.escape(str(error))):
            engine.submit([1], max_tokens=1)
    assert not engine.status().alive and engine.budget.used == 0
    assert loaded.run(held) == before
    engine.close()
    with Engine(loaded) as another:
        assert ids(another.submit(asked[0], max_tokens=40)) == wanted[0]


def test_closing_ends_everybody(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = opened("rows")
    gate = Gate(loaded, monkeypatch)
    engine = Engine(loaded, rows=1)
    tickets = [engine.submit([1, 2, 3], max_tokens=5000) for _ in range(3)]
    gate.wait(1)
    gate.opened.set()
    engine.close()
    engine.close()
    for ticket in tickets:
        with pytest.raises(UsageError, match="closed"):
            list(ticket)
    with pytest.raises(UsageError, match="closed"):
        engine.submit([1], max_tokens=1)


def test_numbers_that_are_none_fail_one_request_alone(engine: Engine) -> None:
    good = engine.submit([1, 2], max_tokens=30)
    infinite = SamplingParams(temperature=0.0, logit_bias={1: 3.4e38}, repetition_penalty=0.01)
    with pytest.raises(NumericsError, match="position 2: the logits hold infinity"):
        list(engine.submit([1, 2], infinite, max_tokens=3))
    assert len(ids(good)) == 30
    with pytest.raises(UsageError, match="not in the vocabulary"):
        list(engine.submit([1], SamplingParams(logit_bias={99999: 1.0}), max_tokens=1))
    assert engine.status().alive


def test_what_can_never_fit_is_refused_with_both_numbers() -> None:
    loaded = opened("rows")
    with (
        Engine(loaded, memory=loaded.nbytes + 200_000) as engine,
        pytest.raises(UsageError, match=r"need .* MB, and .*0.2 MB"),
    ):
        engine.submit([1] * 10, max_tokens=100_000)


@pytest.mark.parametrize("kind", ["rows", "window", "Mamba"])
def test_what_does_not_fit_now_waits_and_what_has_grown_is_paused(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = opened(kind)
    monkeypatch.setattr("runner.engine.scheduler.WEIGHED_EVERY", 1)
    asked = prompts(loaded, (30, 30, 30, 30))
    pauses: list[Row] = []
    real = Scheduler._pause
    monkeypatch.setattr(Scheduler, "_pause", lambda self, row, **how: (pauses.append(row), real(self, row, **how))[1])
    with Engine(loaded) as probe:
        one = probe._workers[""].loaded.footprint.of(600)
    with Engine(loaded, memory=loaded.nbytes + 2 * one - 1) as engine:
        tickets = [engine.submit(p, DRAWN, max_tokens=400) for p in asked]
        found = [ids(ticket) for ticket in tickets]
    assert found == [naive(loaded, p, 400, DRAWN) for p in asked]
    assert pauses or kind != "rows"


def test_the_caches_of_a_draft_model_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """As bytes that a request needs, that are held, and that are let go of where it is paused."""
    loaded = opened("rows")
    monkeypatch.setattr("runner.engine.scheduler.WEIGHED_EVERY", 1)
    one, made, held = loaded.footprint.of(600), list[DraftModel](), list[int]()
    step = Scheduler.step
    monkeypatch.setattr(Scheduler, "step", lambda self: (held.append(self.nbytes), step(self))[1])

    def guesses() -> DraftModel:
        made.append(DraftModel(loaded, loaded.config.vocab_size))
        return made[-1]

    beside: dict[str, Any] = {"proposer": guesses, "beside": loaded.footprint}
    asked = prompts(loaded, (30, 30, 30))
    with Engine(loaded, memory=loaded.nbytes + one + one // 2) as engine:
        assert len(ids(engine.submit(asked[0], max_tokens=570))) == 570  # it fits, by itself
        with pytest.raises(UsageError, match="need"):
            engine.submit(asked[0], max_tokens=570, **beside)
    with Engine(loaded, memory=loaded.nbytes + 4 * one - 1) as engine:
        tickets = [engine.submit(p, DRAWN, max_tokens=400, **beside) for p in asked]
        assert [ids(ticket) for ticket in tickets] == [naive(loaded, p, 400, DRAWN) for p in asked]
    assert max(held) > 2.5 * loaded.footprint.of(200)
    assert all(one.nbytes == 0 for one in made)


def test_scores_of_a_prompt(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = opened("rows")
    chunked(monkeypatch, loaded, 16)
    monkeypatch.setattr("runner.engine.passes.SCORED", 5)
    (prompt,) = prompts(loaded, (40,))
    ticket = engine.submit(prompt, max_tokens=0, scores=3)
    assert ids(ticket) == []
    assert ticket.finish_reason == "length"

    def job() -> Any:
        logits = loaded.logits(prompt)
        return (logits - mx.logsumexp(logits, axis=-1, keepdims=True)).tolist()

    wanted = loaded.run(job)
    scores = ticket.scores
    assert [token.id for token in scores] == prompt
    assert scores[0].logprob is None
    for place, token in enumerate(scores[1:]):
        row = wanted[place]
        assert token.logprob == pytest.approx(row[token.id], abs=1e-4)
        best = sorted(range(len(row)), key=lambda i: -row[i])[:3]
        assert token.top_logprobs is not None
        assert [index for index, _ in token.top_logprobs] == best


def test_coroutines_take_turns(engine: Engine) -> None:
    loaded = opened("rows")
    asked = prompts(loaded, (5, 9, 2))

    async def answer(prompt: list[int]) -> list[int]:
        return [token.id async for token in engine.submit(prompt, max_tokens=15)]

    async def all_of_them() -> list[list[int]]:
        return list(await asyncio.gather(*map(answer, asked)))

    assert asyncio.run(all_of_them()) == [naive(loaded, p, 15) for p in asked]


def test_a_cancelled_task_cancels_its_request(engine: Engine) -> None:
    async def answer() -> None:
        async for _ in engine.submit([1, 2], max_tokens=100_000):
            pass

    async def main() -> None:
        task = asyncio.create_task(answer())
        await asyncio.sleep(0.1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    idle(engine)


def test_two_models(monkeypatch: pytest.MonkeyPatch) -> None:
    models = {name: opened(name) for name in ("rows", "Mamba")}
    with Engine(models) as engine:
        asked = {name: prompts(loaded, (4, 11)) for name, loaded in models.items()}
        tickets = {name: [engine.submit(p, max_tokens=9, model=name) for p in ps] for name, ps in asked.items()}
        for name, loaded in models.items():
            assert [ids(t) for t in tickets[name]] == [naive(loaded, p, 9) for p in asked[name]]
        with pytest.raises(UsageError, match="no model is called 'other'"):
            engine.submit([1], max_tokens=1, model="other")


def test_models_come_and_go() -> None:
    """Kept prefixes of others make way for a model's weights, loose weights for answers; none leaves a byte behind."""
    rows, other = opened("rows"), opened("Mamba")
    limit = rows.nbytes + other.nbytes + 1_000_000
    with Engine({}, memory=limit) as engine:
        engine.add("a", rows)
        (prompt,) = prompts(rows, (40,))
        assert ids(engine.submit(prompt, max_tokens=9, model="a")) == naive(rows, prompt, 9)
        idle(engine, "a")
        assert engine.status("a").prefixes.nbytes > 0
        with pytest.raises(UsageError, match="called 'a' already"):
            engine.add("a", other)
        engine.budget.limit = rows.nbytes + other.nbytes + 12_000
        engine.add("b", other, loose=True)
        assert engine.status("a").prefixes.nbytes == 0
        assert ids(engine.submit([5, 6], max_tokens=9, model="b")) == naive(other, [5, 6], 9)
        engine.budget.unload = lambda _nbytes: engine.remove("b")
        assert ids(engine.submit(prompt, max_tokens=9, model="a")) == naive(rows, prompt, 9)
        with pytest.raises(UsageError, match="no model is called 'b'"):
            engine.submit([1], max_tokens=1, model="b")
        with pytest.raises(UsageError, match=r"take .* MB, and .* MB of .* MB are free"):
            engine.budget.limit = rows.nbytes + other.nbytes
            engine.add("b", other)
        assert (engine.budget.weights, engine.budget.loose, len(engine.budget.holders)) == (rows.nbytes, 0, 2)
        engine.budget.limit = limit
        waiting = engine.submit(prompt, max_tokens=1000, model="a")
        engine.remove("a")
        with pytest.raises(UsageError, match="'a' was removed"):
            ids(waiting)
    assert engine.budget.used == engine.budget.weights == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ids": []}, "empty"),
        ({"ids": [1], "max_tokens": 0}, "max_tokens"),
        ({"ids": [1], "max_tokens": True}, "max_tokens"),
        ({"ids": [1], "timeout": float("nan")}, "timeout"),
        ({"ids": [1], "timeout": "1"}, "timeout"),
        ({"ids": [1], "choice": -1}, "choice"),
        ({"ids": [1], "choice": 1 << 64}, "choice"),
        ({"ids": [1], "choice": 1.0}, "choice"),
        ({"ids": [1], "priority": "high"}, "priority"),
        ({"ids": [1], "priority": None}, "priority"),
        ({"ids": [1], "scores": -1}, "scores"),
        ({"ids": [10**6]}, "vocab_size"),
    ],
)
def test_wrong_arguments(engine: Engine, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        engine.submit(**{"max_tokens": 1, **arguments})


def test_one_that_cannot_be_taken_in_is_told_so(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """No list holds it yet when the scheduler fails: it would be waited for without end."""

    def add(*arguments: object) -> None:
        raise TypeError("no order")

    monkeypatch.setattr(Scheduler, "add", add)
    with pytest.raises(TypeError, match="no order"):
        list(engine.submit([1, 2], max_tokens=1))


def test_a_window_that_is_never_full_takes_no_room(engine: Engine) -> None:
    """Of 16 million tokens each row would hold 67 MB, and copy it for each token of any of them."""
    penalty: dict[str, Any] = {"temperature": 0.0, "frequency_penalty": 5.0}
    wide, none, narrow = (SamplingParams(**penalty, penalty_window=window) for window in (1 << 24, 0, 1))
    asked = [engine.submit([5, 6, 7], params, max_tokens=20) for params in (wide, none, narrow)]
    found = [ids(ticket) for ticket in asked]
    assert found[0] == found[1] == naive(opened("rows"), [5, 6, 7], 20, none) != found[2]
    peak = mx.get_peak_memory()
    ids(engine.submit([5, 6, 7], wide, max_tokens=4))
    assert mx.get_peak_memory() - peak < 1 << 24


@pytest.mark.skipif(current().ops.recorder is None, reason="this device records nothing")
def test_steps_of_several_rows_are_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """While nobody joins or leaves; and what is replayed is what is built."""
    loaded = opened("rows")
    gate = Gate(loaded, monkeypatch)
    gate.opened.set()
    asked = prompts(loaded, (5, 9, 2))
    with Engine(loaded) as engine:
        found = [ids(ticket) for ticket in [engine.submit(p, max_tokens=100) for p in asked]]
    assert gate.passes < 60
    assert found == [naive(loaded, p, 100) for p in asked]


@pytest.mark.parametrize("kind", ["chunks", "window"])
def test_each_answer_is_what_it_is_alone_in_rows_of_codes(kind: str) -> None:
    """In the default dtype, which keeps rows as codes on a CPU: beyond borders of chunks, where no row is kept."""
    loaded = open_loaded(KINDS[kind])
    some = np.random.default_rng(3)
    asked = [some.integers(1, loaded.config.vocab_size, 1 + index % 8).tolist() for index in range(12)]
    options = SamplingParams(temperature=1.0, seed=1)
    with Engine(loaded, prefixes=0, rows=1) as engine:
        alone = [ids(engine.submit(each, options, max_tokens=40)) for each in asked]
    with Engine(loaded, prefixes=0, rows=6) as engine:
        tickets = [engine.submit(each, options, max_tokens=40) for each in asked]
        together = [ids(ticket) for ticket in tickets]
    assert together == alone or loaded.device.compiles  # in 16 bits, GPUs' sums depend on what is computed beside them


def test_a_draft_model_that_is_closed_ends_no_answer() -> None:
    """It only guesses."""
    path = TESTS / "fixtures" / "llama" / "llama-spm-json"
    lm, draft = runner.load(path), runner.load(path)
    with runner.Engine(lm) as engine:
        wanted = [[chunk.token for chunk in engine.submit(p, max_tokens=30, temperature=0.0)] for p in ([1, 5], [1, 7])]
        guessed = engine.submit([1, 5], max_tokens=30, temperature=0.0, draft=draft)
        beside = engine.submit([1, 7], max_tokens=30, temperature=0.0)
        first = [chunk.token for _, chunk in zip(range(2), guessed, strict=False)]
        draft.close()
        assert [first + [chunk.token for chunk in guessed], [chunk.token for chunk in beside]] == wanted


@pytest.mark.parametrize("neighbour", [{"temperature": 1.0}, {"temperature": 0.0, "logprobs": 2}])
def test_a_penalty_does_not_depend_on_what_neighbours_ask_for(neighbour: dict[str, Any]) -> None:
    """Divided in 16 bits, two logits may become equal; in float32 beside one that is drawn they would not."""
    # Neighbours among the numbers of 8 bits from 1 to 2, the greater one behind.
    steps = np.arange(128, dtype=np.float32) / 128
    pairs = np.stack([1 + steps, 1 + steps + 1 / 128], axis=1)
    logits = mx.array(np.pad(pairs, [(0, 0), (0, 62)], constant_values=-4.0)).astype(mx.bfloat16)
    params = SamplingParams(temperature=0.0, repetition_penalty=1.1)
    for row in range(logits.shape[0]):
        one, other, alone = (
            SamplingState(each, 64, list(range(64))) for each in (params, SamplingParams(seed=1, **neighbour), params)
        )
        beside = Sampler()(mx.stack([logits[row], logits[row]]), [one, other]).tokens[0].item()
        assert beside == Sampler()(logits[row][None], [alone]).tokens[0].item()
