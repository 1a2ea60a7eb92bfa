"""Rank 0 lets nobody follow it that is of another run, version, model or size."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from places import ROOT, TESTS

from runner.checkpoint.model_files import open_files
from runner.cli.launching import free_ports
from runner.cli.rank import of_run
from runner.engine.loaded import assemble
from runner.errors import BackendError, UsageError
from runner.ranks import leader as leading
from runner.ranks.leader import Leader
from runner.ranks.link import LONGEST, Link
from runner.ranks.settings import VARIABLE, Settings

VERSIONS = {"version of runner": "1"}
MODEL = TESTS / "fixtures" / "llama" / "llama-gqa"
OTHER = """
import sys
from pathlib import Path
from runner.checkpoint.model_files import open_files
from runner.engine.loaded import assemble
from runner.ranks.follower import run_follower
from runner.ranks.settings import Settings

def load(message, part):
    files = open_files(Path(sys.argv[2]))
    return assemble(files.config, files.source, dtype=sys.argv[3] or None, part=part)

run_follower(Settings.from_json(sys.argv[1]), 1, {"version of runner": "1"}, load)
"""


STRANGE: list[dict[str, Any]] = [
    *({"token": word} for word in ("another", "wörd", "\ud800", None, ["word"])),
    *({"rank": rank} for rank in (2, 0, "x", 1.0, float("inf"), True)),
    *({"pid": pid} for pid in (None, "x" * 5000)),
]
"""What somebody may say first who is no rank of the run."""


def settings(wait: float = 20) -> Settings:
    return Settings(2, "pipeline", (), "127.0.0.1", free_ports(1), "word", wait)


def greet(where: Settings, **changes: Any) -> socket.socket:
    """Say what a follower says first, with some of it changed."""
    hello = {"token": where.token, "rank": 1, "pid": 1, "versions": VERSIONS, **changes}
    while True:
        try:
            connection = socket.create_connection((where.host, where.port), timeout=5)
            break
        except ConnectionRefusedError:
            continue
    connection.sendall(json.dumps(hello).encode() + b"\n")
    return connection


def in_background(work: Callable[[], object]) -> None:
    threading.Thread(target=work, daemon=True).start()


def test_another_version_is_refused_by_name() -> None:
    where = settings()
    in_background(lambda: greet(where, versions={"version of runner": "2"}))
    with pytest.raises(BackendError, match=r"rank 1 .*its version of runner differs from rank 0's: 2, not 1"):
        Leader(where, VERSIONS, lambda message: None)


def test_strangers_are_not_let_in() -> None:
    """Another run's word, a rank that there is not, and what is no message at all; then nobody has come."""
    where, closed = settings(wait=3), []

    def strangers() -> None:
        for changes in STRANGE:
            connection = greet(where, **changes)
            try:
                closed.append(connection.recv(1))
            except ConnectionResetError:  # what was not read of it
                closed.append(b"")

    in_background(strangers)
    with pytest.raises(BackendError, match=r"rank 1 of 2 has not come within 3 seconds"):
        Leader(where, VERSIONS, lambda message: None)
    assert closed == [b""] * len(STRANGE)


def test_no_more_is_read_of_a_line_than_a_message_may_have() -> None:
    one, other = socket.socketpair()
    lost: list[str] = []
    told = threading.Event()
    link = Link(one, lambda reason: (lost.append(reason), told.set()))
    link.start()
    in_background(lambda: other.sendall(b"[" * (LONGEST + 1)))
    assert told.wait(10) and "no message" in lost[0]
    link.close()


@pytest.mark.parametrize(
    ("fixture", "dtype", "words"),
    [
        ("llama/llama-eps", "", "its config.json differs"),
        ("llama/llama-gqa", "float16", "its activations differs"),
    ],
)
def test_another_model_is_refused_by_name(fixture: str, dtype: str, words: str) -> None:
    where = settings()
    arguments = [sys.executable, "-c", OTHER, where.to_json(), str(TESTS / "fixtures" / fixture), dtype]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(arguments, env=environment) as other:
        leader = Leader(where, VERSIONS, lambda message: None)
        leader.begin(model=str(MODEL), dtype=None)
        files = open_files(MODEL)
        with pytest.raises(UsageError, match=rf"rank 1 \(process {other.pid} on 127.0.0.1\): {words}"):
            assemble(files.config, files.source, part=leader)
        leader.close()
        assert other.wait(10) == 0


def test_too_little_memory_is_refused_before_anything_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    where = settings()
    arguments = [sys.executable, "-c", OTHER, where.to_json(), str(MODEL), ""]
    with subprocess.Popen(arguments, env={**os.environ, "PYTHONPATH": str(ROOT)}):
        leader = Leader(where, VERSIONS, lambda message: None)
        leader.begin(model=str(MODEL), dtype=None)
        files = open_files(MODEL)

        class Unread:
            headers = files.source.headers

            def read(self, name: str) -> None:
                raise AssertionError(f"{name} is read")

        monkeypatch.setattr("runner.engine.loaded.capacity", lambda device: 10)
        with pytest.raises(UsageError, match=r"rank 0 would hold .* GB of weights, and has .* GB of memory"):
            assemble(files.config, Unread(), part=leader)  # type: ignore[arg-type]
        leader.close()


def test_the_rank_that_died_is_named_and_not_those_that_it_took_down(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leading, "GRACE", 0.3)
    where = Settings(3, "pipeline", (), "127.0.0.1", free_ports(1), "word", 10)
    connections: list[socket.socket] = []
    in_background(lambda: connections.extend([greet(where), greet(where, rank=2, pid=2)]))
    told: list[str] = []
    done = threading.Event()
    Leader(where, VERSIONS, lambda message: (told.append(message), done.set())[0])
    while len(connections) < 2:
        time.sleep(0.01)
    first, second = connections
    second.sendall(b'{"do": "end", "why": "RuntimeError: [ring] connection to a peer was lost"}\n')
    first.close()
    assert done.wait(10)
    assert told == ["rank 1 (process 1 on 127.0.0.1): its process has ended; the run is over"]


def test_nobody_holds_up_the_start_for_longer_than_it_may_take() -> None:
    """A stranger who says a byte now and then, and others who say nothing."""
    where, begun = settings(wait=2), time.monotonic()

    def drip() -> None:
        with greet(where, token="another"), socket.create_connection((where.host, where.port)) as slow:
            for _ in range(40):
                try:
                    slow.sendall(b" ")
                except OSError:
                    return
                time.sleep(0.2)

    in_background(drip)
    with pytest.raises(BackendError, match=r"has not come within 2 seconds"):
        Leader(where, VERSIONS, lambda message: None)
    assert time.monotonic() - begun < 6


def test_only_processes_of_this_run_are_ended() -> None:
    """A peer says which process it is; that may be any."""
    where = settings()
    for environment, ours in (({VARIABLE: where.to_json()}, True), ({VARIABLE: "{}"}, False), ({}, False)):
        with subprocess.Popen(["sleep", "60"], env={**os.environ, **environment}) as other:
            end = time.monotonic() + 10
            while of_run(other.pid, where.token) != ours and time.monotonic() < end:
                time.sleep(0.05)  # until it is no copy of this process any more
            assert of_run(other.pid, where.token) is ours or not Path("/proc/self/environ").exists()
            other.kill()
    assert not any(of_run(pid, where.token) for pid in (-1, 0, 1, os.getpid(), 1 << 40))
