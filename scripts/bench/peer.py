"""What the scripts have in common that compare engines: each engine a process of its own, driven by lines of JSON.

The processes run `bench_peer_worker.py`. They are started once and kept alive; in each round every engine does every
test once, in an order that rotates, so that a noisy neighbour disturbs all of them.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Tests = Mapping[str, Mapping[str, Any]]
FEW = {"pp": 16, "tg": 4}
"""Tokens of the first, short measurement of a kind of test."""


@dataclass
class Peer:
    """A worker process and its results: the seconds of each test, and the tokens of each measurement.

    Attributes:
        tests: what the worker is asked for, by the names of tests: "do", "tokens" and whatever else a kind needs.
    """

    name: str
    kind: str
    process: subprocess.Popen[str]
    version: str
    tests: Tests
    tokens: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, list[float]] = field(default_factory=dict)

    @classmethod
    def start(cls, name: str, python: str, kind: str, model: str, tests: Tests) -> Peer:
        """Start the worker and wait until its model is loaded; raises SystemExit if that fails."""
        command = [python, str(Path(__file__).with_name("bench_peer_worker.py")), kind, model]
        log = Path(tempfile.gettempdir()) / f"bench_peers.{name.replace(' ', '_')}.log"
        with log.open("w") as errors:
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True)
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise SystemExit(f"error: {name}: {' '.join(command)} did not start; see {log}")
        return cls(name, kind, process, json.loads(line)["version"], tests)

    def ask(self, **request: Any) -> dict[str, Any]:
        """Send a request and wait for its answer."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"error: {self.name} died at {request}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def warm_up(self, test: str, limit: float) -> None:
        """Run a test once without counting it; decides how many of its tokens fit the time limit."""
        wanted = self.tests[test]
        few = FEW[wanted["do"]]
        seconds = self.ask(**{**wanted, "tokens": few})["seconds"]
        fitting = int(few * limit / seconds)
        self.tokens[test] = max(few, min(wanted["tokens"], fitting))
        if self.tokens[test] == wanted["tokens"]:
            self.ask(**wanted)

    def measure(self, test: str) -> None:
        """Run one repetition of a test."""
        time.sleep(0.1)  # the others' threads have gone to sleep
        seconds = self.ask(**{**self.tests[test], "tokens": self.tokens[test]})["seconds"]
        self.seconds.setdefault(test, []).append(seconds)

    def rate(self, test: str) -> float:
        """Median tokens per second."""
        return self.tokens[test] / statistics.median(self.seconds[test])

    def close(self) -> None:
        """End the worker by closing its input."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=30)


def alternate(plan: list[tuple[Peer, list[str]]], rounds: int, limit: float) -> None:
    """Warm up, then run the rounds; the order of the engines rotates by one each round."""
    for peer, tests in plan:
        for test in tests:
            print(f"warming up {peer.name}: {test}", file=sys.stderr)
            peer.warm_up(test, limit)
    for index in range(rounds):
        print(f"round {index + 1} of {rounds}", file=sys.stderr)
        turn = index % len(plan)
        for test in plan[0][0].tests:
            for peer, tests in plan[turn:] + plan[:turn]:
                if test in tests:
                    peer.measure(test)


def hardware() -> str:
    """Processor, cores, memory and system, in one line."""
    facts = dict(
        line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines() if ":" in line
    )
    cpu = {name.strip(): value.strip() for name, value in facts.items()}
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    level = next((name for name in ("avx512_vnni", "avx2") if name in cpu.get("flags", "")), "")
    name = cpu.get("model name", platform.processor())
    return f"{name} ({level}), {os.cpu_count()} cores, {memory:.0f} GB, {platform.system()}"
