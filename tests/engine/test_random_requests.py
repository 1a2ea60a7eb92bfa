"""Requests at random to an engine with little memory: an answer is the naive one, whatever happens to the others."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
from engine_requests import KINDS, idle, ids, naive, opened, prompts
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from places import ROOT

from runner.engine.engine import Engine
from runner.engine.loaded import Loaded
from runner.engine.lookup import PromptLookup
from runner.engine.sampling import SamplingParams
from runner.engine.ticket import Ticket
from runner.errors import UsageError

PARAMS = [
    None,
    SamplingParams(temperature=0.9, top_k=20, seed=5),
    SamplingParams(temperature=1.3, seed=8, frequency_penalty=0.6, penalty_window=6),
]


class Requests(RuleBasedStateMachine):
    """An engine over a model of one kind of memory, and the requests that it works on."""

    @initialize(
        kind=st.sampled_from(sorted(KINDS)),
        rows=st.integers(1, 5),
        kept=st.sampled_from(["no", "memory", "disk", "disk"]),
        tight=st.booleans(),
    )
    def start(self, kind: str, rows: int, kept: str, tight: bool) -> None:
        self.loaded: Loaded = dataclasses.replace(
            opened(kind), device=dataclasses.replace(opened(kind).device, chunk=16)
        )
        with Engine(self.loaded) as probe:
            one = probe._workers[""].loaded.footprint.of(60 + 128)
            self.footprint = probe._workers[""].loaded.footprint.of
        memory = self.loaded.nbytes + (one + one // 2 if tight else 12 * one)
        self.files = tempfile.TemporaryDirectory() if kept == "disk" else None
        self.options: dict[str, Any] = {"memory": memory, "rows": rows, "prefixes": 0 if kept == "no" else None}
        if self.files is not None:
            self.options |= {"cache_dir": Path(self.files.name), "cache_size": 6 * one}
        self.engine = Engine(self.loaded, **self.options)
        self.open: list[tuple[Ticket, list[int], int, SamplingParams | None]] = []
        self.texts = prompts(self.loaded, (40, 25))
        self.answers: dict[Any, list[int]] = {}

    @rule(text=st.integers(0, 50), cut=st.integers(1, 60), more=st.integers(0, 3), count=st.integers(1, 30),
          params=st.sampled_from(PARAMS), priority=st.integers(0, 2), guesses=st.booleans(),
          timeout=st.sampled_from([None, None, None, 0.0, 0.01]))  # fmt: skip
    def submit(self, text: int, cut: int, more: int, count: int, params: SamplingParams | None, priority: int,
               guesses: bool, timeout: float | None) -> None:  # fmt: skip
        prompt = [*self.texts[text % len(self.texts)][:cut], *range(2, 2 + more)]
        ticket = self.engine.submit(
            prompt, params, max_tokens=count, priority=priority, timeout=timeout,
            proposer=PromptLookup if guesses else None,
        )  # fmt: skip
        self.open.append((ticket, prompt, count, params))

    @rule()
    def ask_too_much(self) -> None:
        if self.footprint(1 << 40) <= self.engine.budget.room:
            return  # states and windows have one size, however long an answer is
        with pytest.raises(UsageError, match=r"need .* MB, and there are"):
            self.engine.submit([1], max_tokens=1 << 40)

    @precondition(lambda self: self.open)
    @rule(which=st.integers(0, 99), wait=st.sampled_from([0.0, 0.001]))
    def cancel(self, which: int, wait: float) -> None:
        time.sleep(wait)
        self.check(which, cancelled=True)

    @precondition(lambda self: self.open)
    @rule(which=st.integers(0, 99))
    def drop(self, which: int) -> None:
        self.open.pop(which % len(self.open))

    @precondition(lambda self: self.open)
    @rule(which=st.integers(0, 99))
    def finish(self, which: int) -> None:
        self.check(which)

    @rule(nbytes=st.integers(1, 1 << 18))
    def evict(self, nbytes: int) -> None:
        self.loaded.run(lambda: self.engine.budget.press(nbytes))

    @precondition(lambda self: self.files is not None)
    @rule(finish=st.booleans())
    def start_anew(self, finish: bool) -> None:
        """With requests under way, which end with the engine; what was kept lies on disk."""
        while finish and self.open:
            self.check(0)
        open_ones, self.open = self.open, []
        self.engine.close()
        for ticket, prompt, _, params in open_ones:
            found: list[int] = []
            with contextlib.suppress(UsageError):
                found += (token.id for token in ticket)
            assert found == self.wanted(prompt, params)[: len(found)]
        self.engine = Engine(self.loaded, **self.options)

    def check(self, which: int, cancelled: bool = False) -> None:
        ticket, prompt, count, params = self.open.pop(which % len(self.open))
        if cancelled:
            ticket.cancel()
        found = ids(ticket)
        assert found == self.wanted(prompt, params)[: len(found)]
        assert ticket.reused + ticket.read <= len(prompt)
        if ticket.finish_reason == "length":
            assert len(found) == count and ticket.reused + ticket.read == len(prompt)
            self.texts.append([*prompt, *found][:60])
        else:
            assert ticket.finish_reason in ("cancelled", "timeout")

    def wanted(self, prompt: list[int], params: SamplingParams | None) -> list[int]:
        key = (*prompt, PARAMS.index(params))
        if key not in self.answers:
            self.answers[key] = naive(self.loaded, prompt, 30, params)
        return self.answers[key]

    @invariant()
    def alive(self) -> None:
        status = self.engine.status()
        assert status.alive and status.running <= 5

    def teardown(self) -> None:
        while self.open:
            self.check(0)
        idle(self.engine)
        status = self.engine.status()
        assert status.nbytes == 0 and status.prefixes.nbytes <= self.engine.budget.room
        assert status.prefixes.note is None
        self.engine.close()
        if self.files is not None:
            self.files.cleanup()


def test_requests_at_random() -> None:
    run(examples=8, steps=12)


@pytest.mark.long
def test_requests_at_random_for_an_hour() -> None:
    """Half of them for warming up; then memory stays flat."""
    minutes = float(os.environ.get("RUNNER_SOAK_MINUTES", "60"))
    seen, ends = [], time.monotonic() + 60 * minutes
    while time.monotonic() < ends:
        run(examples=50, steps=40)
        seen.append(int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize())
        print(f"{time.monotonic() - ends + 60 * minutes:.0f} s: {seen[-1] / 1e6:.1f} MB", flush=True)
    half = len(seen) // 2
    assert max(seen[half:]) < 1.05 * max(seen[: half + 1]), seen


def run(examples: int, steps: int) -> None:
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    wanted = settings(max_examples=examples, stateful_step_count=steps, deadline=None, suppress_health_check=checks)
    run_state_machine_as_test(Requests, settings=wanted)  # type: ignore[no-untyped-call]


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_two_hundred_requests_of_mixed_lengths(kind: str) -> None:
    loaded, draw = opened(kind), random.Random(kind)
    asked = prompts(loaded, [1 + int(draw.paretovariate(0.7)) % 90 for _ in range(200)])
    params = [draw.choice(PARAMS) for _ in asked]
    counts = [1 + draw.randrange(25) for _ in asked]
    with Engine(loaded, rows=24) as engine:
        tickets = [engine.submit(*pair, max_tokens=n) for *pair, n in zip(asked, params, counts, strict=True)]
        for ticket, prompt, option, count in zip(tickets, asked, params, counts, strict=True):
            assert ids(ticket) == naive(loaded, prompt, count, option)


TERMINATED = """
import signal, sys, threading
from pathlib import Path
from runner.engine.engine import Engine
from runner.engine.loaded import open_loaded
def end(number, frame):
    raise SystemExit(7)
signal.signal(signal.SIGTERM, end)
with Engine(open_loaded(Path(sys.argv[1]), dtype="float32")) as engine:
    tickets = [engine.submit([1, 2, 3 + i], max_tokens=10**6) for i in range(3)]
    threads = [threading.Thread(target=list, args=(ticket,), daemon=True) for ticket in tickets[1:]]
    threading.excepthook = lambda args: None
    [thread.start() for thread in threads]
    for index, token in enumerate(tickets[0]):
        if index == 5:
            print("running", flush=True)
"""


def test_sigterm_in_the_middle_ends_the_process_as_it_says() -> None:
    """The exception that a handler raises goes through the iteration, the engine is closed, and Python exits."""
    process = subprocess.Popen(
        [sys.executable, "-c", TERMINATED, str(KINDS["rows"])], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == b"running\n"
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 7, errors.decode()
