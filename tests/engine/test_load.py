"""Ten thousand requests from threads that come and go, a third of them broken off: every answer is the serial one's."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT, TESTS

LLAMA = TESTS / "fixtures" / "llama"
FAMILIES = TESTS / "fixtures" / "families"
MODELS = [
    LLAMA / "llama-gqa",
    LLAMA / "mistral-window",
    FAMILIES / "deepseek_v2-grouped",
    FAMILIES / "qwen3_moe-base",
    FAMILIES / "gpt_oss-base",
]

LOAD = '''
import ctypes, heapq, json, os, random, sys, threading, time
import runner

class Broken(Exception):
    """Thrown into a thread from outside, at whatever point it has reached."""

models = [runner.load(path, dtype="float32") for path in sys.argv[2:]]
TOTAL, AT_ONCE, PROMPTS, SHARE = int(sys.argv[1]), 64, 40, 0.5

def options(lm):
    return {"temperature": 0, "max_tokens": 6, "logit_bias": dict.fromkeys(lm.eos_token_ids, -1e9)}

draw = random.Random(1)
def prompt(lm):
    return draw.choices(range(3, lm.config.vocab_size), k=draw.randint(1, 24))

prompts = [[prompt(lm) for _ in range(PROMPTS)] for lm in models]
wanted = [[lm.generate(p, **options(lm)).tokens for p in prompts[i]] for i, lm in enumerate(models)]
caches = [[lm.prompt_cache() for _ in range(16)] for lm in models]
outcome = {"right": 0, "wrong": 0, "broken": 0, "cache in use": 0, "other": []}
lock = threading.Lock()

def tell(kind):
    with lock:
        outcome[kind] += 1

def ask(number, started):
    rng = random.Random(number)
    which, prompt = rng.randrange(len(models)), rng.randrange(PROMPTS)
    lm = models[which]
    kept = rng.choice(caches[which]) if rng.random() < 0.3 else None
    try:
        started.set()
        found = lm.generate(prompts[which][prompt], prompt_cache=kept, **options(lm)).tokens
        tell("right" if found == wanted[which][prompt] else "wrong")
    except Broken:
        tell("broken")
    except runner.RunnerError as error:
        if "in use" in str(error):
            tell("cache in use")
        else:
            outcome["other"].append(repr(error))
    except BaseException as error:
        outcome["other"].append(repr(error))

def state():
    time.sleep(0.2)  # threads that were joined may not have left the list of the system yet
    pages = int(open("/proc/self/statm").read().split()[1])
    return [pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))]

class Breaker(threading.Thread):
    """Throws into threads at the moments that it was told."""

    def __init__(self):
        super().__init__()
        self.due, self.ready, self.ended = [], threading.Condition(), False

    def later(self, seconds, thread):
        with self.ready:
            heapq.heappush(self.due, (time.monotonic() + seconds, thread.ident, thread))
            self.ready.notify()

    def end(self):
        with self.ready:
            self.ended = True
            self.ready.notify()
        self.join()

    def run(self):
        with self.ready:
            while self.due or not self.ended:
                wait = self.due[0][0] - time.monotonic() if self.due else None
                if wait is None or wait > 0:
                    self.ready.wait(wait)
                    continue
                _, ident, thread = heapq.heappop(self.due)
                if thread.is_alive():
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(ident), ctypes.py_object(Broken))

def run(total):
    gate = threading.Semaphore(AT_ONCE)
    breaker = Breaker()
    breaker.start()
    rng = random.Random(-total)
    def one(number):
        started = threading.Event()
        thread = threading.Thread(target=lambda: (ask(number, started), gate.release()))
        thread.start()
        if rng.random() < SHARE:
            # Anywhere in the time that an answer takes, its wait for those before it included.
            started.wait()
            breaker.later(rng.uniform(0, patience), thread)
        return thread
    live = []
    for number in range(total):
        gate.acquire()
        live.append(one(number))
        if len(live) > 400:
            live = [thread for thread in live if thread.is_alive()]
    for thread in live:
        thread.join(120)
    breaker.end()
    assert not any(thread.is_alive() for thread in live)

patience = 0.1
begun = time.monotonic()
run(300)
# With AT_ONCE requests waiting for one device, an answer takes as long as so many of them do.
patience = AT_ONCE * (time.monotonic() - begun) / 300
before = state()
for kind in ("right", "wrong", "broken", "cache in use"):
    outcome[kind] = 0
run(TOTAL)
# Afterwards each cache is as good as a new one, whatever its last user met.
for i, lm in enumerate(models):
    for kept in caches[i]:
        for p in range(3):
            assert lm.generate(prompts[i][p], prompt_cache=kept, **options(lm)).tokens == wanted[i][p]
print(json.dumps([outcome, before, state()]))
'''


def load(total: int, tmp_path: Path) -> None:
    paths = []
    for fixture in MODELS:
        copy = tmp_path / fixture.name
        shutil.copytree(fixture, copy)
        if not (copy / "tokenizer.json").exists():
            shutil.copy(LLAMA / "llama-gqa" / "tokenizer.json", copy)
        paths.append(str(copy))
    command = [sys.executable, "-c", LOAD, str(total), *paths]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    done = subprocess.run(command, capture_output=True, text=True, timeout=3600, env=environment, check=False)
    # An exception that hits a thread outside its request is printed by Python; nothing else may be.
    assert done.returncode == 0, done.stderr[-4000:]
    outcome, before, after = json.loads(done.stdout)
    print(outcome, before, after)
    assert outcome["wrong"] == 0 and not outcome["other"], outcome
    assert outcome["right"] > total // 3 and outcome["broken"] > total // 10
    assert after[0] - before[0] < 32 << 20 and after[1:] == before[1:], (before, after)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_requests_of_many_threads_a_third_broken_off(tmp_path: Path) -> None:
    load(400, tmp_path)


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_ten_thousand_requests(tmp_path: Path) -> None:
    load(10_000, tmp_path)
