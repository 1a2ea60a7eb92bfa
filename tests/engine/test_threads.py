"""Threads, exceptions and lifetimes: one owner of the device, whole passes, caches with one user.

What can crash or hang a process runs in one of its own.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import mlx.core as mx
import pytest
from places import ROOT, TESTS

import runner
from runner.engine.prompt_cache import PromptCache
from runner.errors import NumericsError, UsageError
from runner.language_model import LanguageModel
from runner.ops.owner import OWNER

LLAMA = TESTS / "fixtures" / "llama" / "llama-gqa"
FAMILIES = TESTS / "fixtures" / "families"
MODELS = [
    LLAMA,
    TESTS / "fixtures" / "llama" / "mistral-window",
    FAMILIES / "deepseek_v2-grouped",
    FAMILIES / "qwen3_moe-base",
    FAMILIES / "gpt_oss-base",
]
by_model = pytest.mark.parametrize("path", MODELS, ids=lambda path: path.name, indirect=True)


@pytest.fixture
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The fixture's directory, with another's tokenizer where it has none: prompts here are ids."""
    fixture: Path = request.param
    if (fixture / "tokenizer.json").exists():
        return fixture
    copy = tmp_path / fixture.name
    shutil.copytree(fixture, copy)
    shutil.copy(LLAMA / "tokenizer.json", copy)
    return copy


def ids(lm: LanguageModel, seed: int, count: int) -> list[int]:
    return random.Random(seed).choices(range(3, lm.config.vocab_size), k=count)


def options(lm: LanguageModel, **more: Any) -> dict[str, Any]:
    """Greedy answers that no end token cuts short."""
    return {"temperature": 0, "max_tokens": 12, "logit_bias": dict.fromkeys(lm.eos_token_ids, -1e9), **more}


def answered(lm: LanguageModel, kept: PromptCache | None) -> list[int]:
    return lm.generate([5, 6, 7], prompt_cache=kept, **options(lm)).tokens


def in_process(code: str, *arguments: object, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment, check=False)


def in_threads(*jobs: Any) -> list[BaseException]:
    """Run all of them at once; what they raised."""
    raised: list[BaseException] = []

    def caught(job: Any) -> None:
        try:
            job()
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=caught, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    return raised


FRESH = """
import sys, threading
import runner
lm = runner.load(sys.argv[1])
answers = [None] * 4
def ask(i):
    answers[i] = lm.generate([5, 6, 7 + i], temperature=0, max_tokens=8).tokens
threads = [threading.Thread(target=ask, args=(i,)) for i in range(4)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
assert answers == [lm.generate([5, 6, 7 + i], temperature=0, max_tokens=8).tokens for i in range(4)], answers
"""


@by_model
def test_threads_may_ask_a_fresh_model_at_once(path: Path) -> None:
    """Nothing lazy is shared: DeepSeek's unpacked matrices crashed 18 processes of 18."""
    done = in_process(FRESH, path)
    assert done.returncode == 0, done.stderr


@by_model
def test_answers_of_many_threads_are_those_of_one(path: Path) -> None:
    lm = runner.load(path, dtype="float32")
    prompts = [ids(lm, seed, 3 + seed) for seed in range(8)]
    wanted = [lm.generate(prompt, **options(lm)).tokens for prompt in prompts]
    found: dict[int, list[int]] = {}

    def ask(index: int) -> None:
        found[index] = lm.generate(prompts[index], **options(lm)).tokens

    assert not in_threads(*(lambda index=index: ask(index) for index in range(8)))
    assert [found[index] for index in range(8)] == wanted


def test_a_cache_in_use_is_refused() -> None:
    """Two streams taken in turns, and two threads at once; afterwards the cache is as good as ever."""
    lm = runner.load(LLAMA, dtype="float32")
    kept = lm.prompt_cache()
    first = lm.stream([5, 6, 7], prompt_cache=kept, **options(lm))
    head = [next(first).token for _ in range(3)]
    with pytest.raises(UsageError, match="in use by another answer"):
        next(lm.stream([5, 6, 8], prompt_cache=kept, **options(lm)))
    raised = in_threads(lambda: lm.generate([5, 6, 8], prompt_cache=kept, **options(lm)))
    assert len(raised) == 1 and isinstance(raised[0], UsageError)
    rest = [chunk.token for chunk in first]
    assert [*head, *rest] == lm.generate([5, 6, 7], **options(lm)).tokens
    wanted = lm.generate([5, 6, 8], **options(lm)).tokens
    assert lm.generate([5, 6, 8], prompt_cache=kept, **options(lm)).tokens == wanted


def test_a_stream_that_nobody_finishes_gives_its_cache_back() -> None:
    lm = runner.load(LLAMA, dtype="float32")
    kept = lm.prompt_cache()
    stream = lm.stream([5, 6, 7], prompt_cache=kept, **options(lm))
    next(stream)
    del stream
    assert (
        lm.generate([5, 6, 7], prompt_cache=kept, **options(lm)).tokens == lm.generate([5, 6, 7], **options(lm)).tokens
    )


def test_another_models_cache_is_refused() -> None:
    one, other = runner.load(LLAMA), runner.load(LLAMA)
    with pytest.raises(UsageError, match="another model"):
        one.generate([5], prompt_cache=other.prompt_cache())


REQUESTS = """
import json, os, sys, threading, time
import runner
lm = runner.load(sys.argv[1])
def state():
    time.sleep(0.2)  # the last thread has been joined, and may not have left the system's list yet
    pages = int(open("/proc/self/statm").read().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))
def ask(i):
    lm.generate([5, 6, 7 + i % 90], temperature=0.7 if i % 2 else 0, seed=i, max_tokens=4)
    if i % 5 == 0:
        assert lm.logits([5, 6]).shape[0] == 2
def some(count):
    for i in range(count):
        thread = threading.Thread(target=ask, args=(i,))
        thread.start()
        thread.join()
some(100)
before = state()
some(int(sys.argv[2]))
print(json.dumps([before, state()]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_thread_for_each_request_leaves_nothing_behind() -> None:
    done = in_process(REQUESTS, LLAMA, 500)
    assert done.returncode == 0, done.stderr
    (rss, threads, files), (rss_after, threads_after, files_after) = eval(done.stdout)
    assert rss_after - rss < 8 << 20 and threads_after == threads and files_after == files, done.stdout


class Timeout(Exception):
    pass


@pytest.fixture
def alarm() -> Iterator[None]:
    def ring(number: int, frame: FrameType | None) -> None:
        raise Timeout

    before = signal.signal(signal.SIGALRM, ring)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@by_model
def test_a_timeout_in_the_middle_leaves_a_cache_that_is_right(path: Path, alarm: None) -> None:
    """Exceptions at random points of a prompt or an answer, then another answer over the same cache."""
    lm = runner.load(path, dtype="float32")
    kept = lm.prompt_cache()
    draw = random.Random(0)
    prompt = ids(lm, 1, 40)
    times = []
    for _ in range(2):  # the first answer may take seconds: GPUs compile kernels for it
        started = time.perf_counter()
        lm.generate(prompt, **options(lm, max_tokens=20))
        times.append(time.perf_counter() - started)
    whole = min(times)
    interrupted = turn = 0
    while interrupted < 10 and turn < 400:  # an answer whose prompt is cached may end before its alarm
        turn += 1
        signal.setitimer(signal.ITIMER_REAL, draw.uniform(0.0005, whole))
        try:
            lm.generate(prompt, prompt_cache=kept, **options(lm, max_tokens=20))
            signal.setitimer(signal.ITIMER_REAL, 0)
        except Timeout:
            interrupted += 1
        following = [*prompt[: draw.randint(1, 40)], *ids(lm, turn, 5)]
        wanted = lm.generate(following, **options(lm)).tokens
        assert lm.generate(following, prompt_cache=kept, **options(lm)).tokens == wanted
        offsets = {cache.offset for cache in kept.caches}
        assert len(offsets) == 1
    assert interrupted == 10


def test_an_error_within_a_pass_empties_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = runner.load(LLAMA, dtype="float32")
    kept = lm.prompt_cache()
    prompt = ids(lm, 2, 20)
    lm.generate(prompt, prompt_cache=kept, **options(lm))
    layer = lm.model.layers[1]
    with monkeypatch.context() as patched:
        patched.setattr(type(layer), "__call__", lambda self, x, batch, cache: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            lm.generate([*prompt, 9], prompt_cache=kept, **options(lm))
    assert {cache.offset for cache in kept.caches} == {0}
    wanted = lm.generate([*prompt, 9], **options(lm)).tokens
    assert lm.generate([*prompt, 9], prompt_cache=kept, **options(lm)).tokens == wanted


def test_what_one_thread_began_another_goes_on_with() -> None:
    """A prompt cache whose request was given up elsewhere, logits of a worker, a stream handed on."""
    lm = runner.load(LLAMA, dtype="float32")
    kept = lm.prompt_cache()
    logits: list[mx.array] = []

    def worker() -> None:
        stream = lm.stream([5, 6, 7], prompt_cache=kept, **options(lm))
        next(stream)
        stream.close()  # type: ignore[attr-defined]
        logits.append(lm.logits([5, 6, 7]))

    assert not in_threads(worker)
    assert mx.array_equal(logits[0], lm.logits([5, 6, 7])) and bool(mx.all(logits[0] + 1 > logits[0]))
    assert (
        lm.generate([5, 6, 7], prompt_cache=kept, **options(lm)).tokens == lm.generate([5, 6, 7], **options(lm)).tokens
    )
    sampled = options(lm, temperature=0.8, seed=3, repetition_penalty=1.1)
    wanted = lm.generate([5, 6, 7], **sampled).tokens
    stream, found = lm.stream([5, 6, 7], **sampled), []
    for _ in wanted:
        assert not in_threads(lambda: found.append(next(stream).token))
    assert found == wanted


def test_new_adapter_weights_count_from_the_next_answer_on() -> None:
    case = TESTS / "fixtures" / "adapters" / "llama-two"
    lm = runner.load(LLAMA, dtype="float32", adapters=[str(case / "first"), str(case / "second")])
    first, second = lm.adapters
    full, none = {first: 1.0, second: 1.0}, {first: 0.0, second: 0.0}
    wanted = {}
    for name, weights in (("full", full), ("none", none)):
        lm.set_adapters(weights)
        wanted[name] = lm.generate([5, 6, 7], **options(lm)).tokens
    assert wanted["full"] != wanted["none"]
    lm.set_adapters(full)
    kept = lm.prompt_cache()
    stream = lm.stream([5, 6, 7], prompt_cache=kept, **options(lm))
    head = [next(stream).token for _ in range(2)]
    lm.set_adapters(none)
    assert lm.generate([5, 6, 7], **options(lm)).tokens == wanted["none"]  # another answer in between
    assert [*head, *(chunk.token for chunk in stream)] == wanted["full"]
    assert lm.generate([5, 6, 7], prompt_cache=kept, **options(lm)).tokens == wanted["none"]


FORKED = """
import os, sys
import runner
from runner.errors import BackendError
lm = runner.load(sys.argv[1])
lm.generate([5, 6, 7], temperature=0, max_tokens=3)
child = os.fork()
if child == 0:
    try:
        lm.generate([5, 6, 7], temperature=0, max_tokens=3)
    except BackendError as error:
        os._exit(7 if "spawn" in str(error) else 1)
    os._exit(2)
status = os.waitpid(child, 0)[1]
assert os.waitstatus_to_exitcode(status) == 7, status
assert lm.generate([5, 6, 7], temperature=0, max_tokens=3).tokens
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_is_told_so() -> None:
    done = in_process(FORKED, LLAMA, timeout=60)
    assert done.returncode == 0, done.stderr


UNFORKED = """
import os, sys
import runner
child = os.fork()
if child == 0:
    lm = runner.load(sys.argv[1])
    os._exit(0 if lm.generate([5, 6, 7], temperature=0, max_tokens=3).tokens else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_child_that_loads_its_own_model_works() -> None:
    done = in_process(UNFORKED, LLAMA, timeout=60)
    assert done.returncode == 0, done.stderr


EXIT = """
import sys, threading, time
import runner
lm = runner.load(sys.argv[1])
def answer():
    while True:
        for _ in lm.stream([5, 6, 7], temperature=0.8, max_tokens=50):
            pass
for _ in range(3):
    threading.Thread(target=answer, daemon=True).start()
time.sleep(0.2)
"""


@pytest.mark.parametrize("ending", ["", "sys.exit(3)", "raise KeyError('x')"])
def test_exit_is_clean_whatever_is_under_way(ending: str) -> None:
    for _ in range(3):
        done = in_process(EXIT + ending, LLAMA, timeout=60)
        wanted = {"": 0, "sys.exit(3)": 3, "raise KeyError('x')": 1}[ending]
        assert done.returncode == wanted and done.stderr.count("Traceback") == (wanted == 1), done


def test_a_job_within_a_job_runs_at_once() -> None:
    assert OWNER.run(lambda: OWNER.run(lambda: 5)) == 5


def test_an_interrupted_caller_does_not_wait_for_what_it_no_longer_wants(alarm: None) -> None:
    """A job that has begun runs to its end, one that has not never runs, and the next one is served."""
    ran: list[str] = []

    def slow() -> None:
        time.sleep(0.3)
        ran.append("slow")

    signal.setitimer(signal.ITIMER_REAL, 0.05)
    with pytest.raises(Timeout):
        OWNER.run(slow)
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    with pytest.raises(Timeout):
        OWNER.run(lambda: ran.append("queued behind it"))
    OWNER.run(lambda: ran.append("last"))
    assert ran == ["slow", "last"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("temperature", [0, 0.8])
def test_logits_that_are_no_numbers_end_the_answer(
    bad: float, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = runner.load(LLAMA, dtype="float32")
    good = type(lm.model).logits
    calls = []

    def broken(self: Any, hidden: mx.array) -> mx.array:
        calls.append(1)
        logits = good(self, hidden)
        if len(calls) < 4:
            return logits
        if bad == -float("inf"):
            return mx.full(logits.shape, bad)
        return mx.where(mx.arange(logits.shape[-1]) == 7, bad, logits)

    monkeypatch.setattr(type(lm.model), "logits", broken)
    kept = lm.prompt_cache()
    stream = lm.stream([5, 6, 7], prompt_cache=kept, **options(lm, temperature=temperature))
    assert [next(stream).token for _ in range(3)]
    with pytest.raises(NumericsError, match=r"position 6.*float32"):
        next(stream)
    monkeypatch.undo()
    assert (
        lm.generate([5, 6, 7], prompt_cache=kept, **options(lm)).tokens == lm.generate([5, 6, 7], **options(lm)).tokens
    )


@pytest.mark.parametrize("temperature", [1e-38, 5e-324, 1e-30, 1e-6])
def test_the_smallest_temperatures_are_greedy(temperature: float) -> None:
    lm = runner.load(LLAMA, dtype="float32")
    found = lm.generate([5, 6, 7], **options(lm, temperature=temperature, seed=1)).tokens
    assert found == lm.generate([5, 6, 7], **options(lm)).tokens


def test_longrope_goes_on_beyond_its_first_context() -> None:
    """Where the frequencies change, keys made with the first ones do not count any more."""
    lm = runner.load(TESTS / "fixtures" / "llama" / "llama-rope-longrope", dtype="float32")
    border = lm.config.rope_border
    assert border is not None and border < lm.context_length
    prompt = ids(lm, 4, border - 3)
    found = lm.generate(prompt, **options(lm, max_tokens=10)).tokens
    wanted: list[int] = []
    for _ in range(10):
        logits = lm.logits([*prompt, *wanted])[-1]
        barred = [-mx.inf if token in lm.eos_token_ids else 0.0 for token in range(logits.shape[0])]
        wanted.append(int(mx.argmax(logits + mx.array(barred))))
    assert found == wanted
