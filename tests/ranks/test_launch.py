"""`runner launch`: the same answers, and what becomes of a run in which something fails."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from command_line import own, run
from places import TESTS
from served_process import served

from runner.cli.launching import attend, children, environment, first_to_end, gpus, here, on_hosts
from runner.cli.rank import take_gpu
from runner.cli.serve_options import AnswerOptions, ModelOptions
from runner.errors import BackendError, UsageError
from runner.ops.device import current
from runner.ranks.link import SILENT
from runner.ranks.settings import GPUS

MODEL = str(TESTS / "fixtures" / "llama" / "llama-gqa")
PROMPT = ["abc", "--raw", "--temp", "0", "--max-tokens", "8"]
FOREVER = ("-r", "1000000")
BOTH, PROMPTS, TOKENS = ("-p", "64", "-n", "32"), ("-p", "96", "-n", "0"), ("-p", "0", "-n", "96")
"""What is measured: prompts and answers, or one of the two alone."""
IN_TIME = 10
ONE_FORM = current().ops.one_form
DTYPE = () if ONE_FORM else ("--dtype", "float32")  # in 16 bits, GPUs' sums depend on what is computed beside them
TWO = ("launch", "--wait", "60", "-n", "2")
linux = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="which rank a process is, /proc tells")


@pytest.mark.parametrize("mode", ["--pipeline", "--tensor"])
def test_the_answer_is_that_of_one_process(mode: str) -> None:
    alone, together = (run(*how, "generate", MODEL, *PROMPT) for how in ((), (*TWO, mode)))
    assert (together.returncode, own(together.stderr)) == (alone.returncode, own(alone.stderr)) == (0, "")
    assert together.stdout == alone.stdout != ""


def test_a_file_of_prompts_is_answered_as_by_one_process(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(f"{word} and more") + "\n" for word in ("a", "ab", "abc", "abcd")))
    arguments = ("generate", MODEL, "--file", str(file), "--raw", "--temp", "0", "--max-tokens", "8", *DTYPE)
    alone, together = (run(*how, *arguments) for how in ((), TWO))
    assert (together.returncode, together.stderr) == (alone.returncode, alone.stderr) and alone.returncode == 0
    assert together.stdout == alone.stdout and len(alone.stdout.splitlines()) == 4


@pytest.mark.parametrize("mode", ["--pipeline", "--tensor"])
def test_a_server_answers_as_one_process_and_ends_when_it_is_told_to(mode: str) -> None:
    asked = {"model": "llama-gqa", "prompt": "abc", "temperature": 0, "max_tokens": 8, "logprobs": 2}
    answers = []
    for launched in ((), (*TWO, mode)):
        with served(MODEL, "--port", "0", *DTYPE, launched=launched) as (process, address, lines):
            for _ in range(2):  # the second one begins with what was kept of the first
                with urllib.request.urlopen(f"{address}/v1/completions", json.dumps(asked).encode(), 60) as reply:
                    answers.append(json.load(reply)["choices"])
            process.send_signal(signal.SIGTERM)
            assert process.wait(IN_TIME) == 0, lines
    if ONE_FORM:
        assert answers[0] == answers[1] and answers[2] == answers[3]
        assert mode != "--pipeline" or answers[0] == answers[2]
    # By tensors, sums have another order.
    alone, *others = (choices[0] for choices in answers)
    for other in others:
        assert other["text"] == alone["text"]
        assert other["logprobs"]["token_logprobs"] == pytest.approx(alone["logprobs"]["token_logprobs"], abs=1e-4)


@pytest.mark.parametrize(
    ("models", "words"),
    [
        ({}, "a second model"),
        ({"adapter": ["a=b"]}, "--adapter"),
        ({"draft": "another"}, "--draft"),
        ({"allow_pull": True}, "--allow-pull"),
        ({"keep_alive": 5.0}, "--keep-alive"),
        ({"cache_dir": Path("x")}, "--cache-dir"),
        ({"restart": True}, "--on-engine-failure restart"),
    ],
)
def test_what_a_shared_out_model_cannot_be_served_with_is_refused_by_name(models: dict[str, Any], words: str) -> None:
    names = ["one"] if models else ["one", "two"]
    answers = AnswerOptions(on_engine_failure="restart" if models.pop("restart", False) else "exit")
    ModelOptions().check_shared(["one"], AnswerOptions())
    with pytest.raises(UsageError, match=f"shared out over processes is served alone: leave out {words}"):
        ModelOptions(**models).check_shared(names, answers)


def test_what_cannot_be_started_is_refused_by_name() -> None:
    for arguments, words in (
        (("-n", "2", "inspect", MODEL), "not 'inspect'"),
        (("generate", MODEL, *PROMPT), "-n says how many"),
        (("-n", "2", "--share", "1", "generate", MODEL), "2 positive numbers"),
        (("-n", "2", "--share", "1,nan", "generate", MODEL), "2 positive numbers"),
    ):
        done = run("launch", *arguments)
        assert done.returncode == 2 and words in done.stderr, done.stderr


class Started:
    """A run that measures until it is ended."""

    def __init__(self, *options: str, model: str = MODEL, wait: bool = True, measured: tuple[str, ...] = BOTH) -> None:
        arguments = [sys.executable, "-m", "runner", "launch", *options, "bench", model]
        self.process = subprocess.Popen(
            [*arguments, *measured, *FOREVER], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.ranks: list[int] = []
        assert not wait or self.process.stdout is not None
        end = time.monotonic() + 30
        while time.monotonic() < end and list(map(rank_of, self.ranks)) != list(range(int(options[1]))):
            (launcher,) = children(self.process.pid)[:1] or [0]
            self.ranks = sorted(children(launcher), key=rank_of) if launcher else []
            time.sleep(0.05)
        if wait:
            assert self.process.stdout is not None
            self.process.stdout.readline()  # the table begins: all have loaded

    def ended(self) -> str:
        """Wait for the end, and return what stderr says; nothing is left of it."""
        begun = time.monotonic()
        _, errors = self.process.communicate(timeout=3 * IN_TIME)
        assert time.monotonic() - begun < IN_TIME
        alive = [pid for pid in self.ranks if running(pid)]
        assert not alive
        return errors


def rank_of(pid: int) -> int:
    """Which rank a process is; -1 before it is one."""
    try:
        found = re.search(rb"(?:^|\0)MLX_RANK=(\d+)\0", Path(f"/proc/{pid}/environ").read_bytes())
    except OSError:
        return -1
    return -1 if found is None else int(found[1])


def running(pid: int) -> bool:
    """Whether the process is there and no zombie."""
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False).stdout
    return bool(state.strip()) and not state.startswith("Z")


@linux
@pytest.mark.long
@pytest.mark.parametrize("mode", ["--pipeline", "--tensor"])
@pytest.mark.parametrize("measured", [PROMPTS, TOKENS], ids=["in a prompt", "in decode"])
def test_a_rank_that_is_killed_ends_the_run_by_name(measured: tuple[str, ...], mode: str) -> None:
    started = Started("-n", "2", mode, measured=measured)
    time.sleep(1)  # rounds are under way, of which nothing else is computed
    assert started.process.poll() is None
    os.kill(started.ranks[1], signal.SIGKILL)
    errors = started.ended()
    assert started.process.returncode == 1
    assert f"rank 1 (process {started.ranks[1]} on 127.0.0.1): its process has ended" in errors, errors


@linux
@pytest.mark.long
@pytest.mark.parametrize("delay", [0.0, 0.3, 0.6, 1.0, 1.5, 2.5])
def test_a_rank_that_is_killed_while_it_starts_and_loads(delay: float) -> None:
    started = Started("-n", "2", wait=False)
    time.sleep(delay)
    os.kill(started.ranks[1], signal.SIGKILL)
    errors = started.ended()
    assert started.process.returncode == 1 and "rank 1" in errors, errors


@linux
@pytest.mark.long
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_each_of_three_that_is_killed(rank: int) -> None:
    started = Started("-n", "3", model=str(TESTS / "fixtures" / "families" / "gemma2-base"))
    os.kill(started.ranks[rank], signal.SIGKILL)
    errors = started.ended()
    assert started.process.returncode == 1
    assert (f"rank {rank} " in errors) if rank else ("rank 0 has ended with code -9" in errors), errors


@linux
@pytest.mark.long
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_stopped_ends_the_run_by_name(rank: int) -> None:
    started = Started("-n", "2")
    os.kill(started.ranks[rank], signal.SIGSTOP)
    errors = started.ended()
    assert started.process.returncode == 1
    assert re.search(rf"rank {rank} .*has given no sign of life", errors), errors


@linux
@pytest.mark.long
def test_a_rank_0_that_is_stuck_does_not_outlive_the_others() -> None:
    """As in MLX's call that connects by NCCL, in which none of its threads runs."""
    started = Started("-n", "2")
    os.kill(started.ranks[0], signal.SIGSTOP)
    os.kill(started.ranks[1], signal.SIGKILL)
    errors = started.ended()
    assert started.process.returncode == 1 and "rank 1 has ended with code -9" in errors, errors


@linux
@pytest.mark.long
def test_a_rank_that_is_killed_ends_a_server_by_name() -> None:
    with served(MODEL, "--port", "0", launched=TWO) as (process, address, lines):
        (launcher,) = children(process.pid)
        ranks = sorted(children(launcher), key=rank_of)
        asked = json.dumps(
            {"model": "llama-gqa", "prompt": "abc", "max_tokens": 100, "stream": True, "ignore_eos": True}
        )
        reply = urllib.request.urlopen(f"{address}/v1/completions", asked.encode(), 60)
        reply.readline()
        os.kill(ranks[1], signal.SIGKILL)
        assert process.wait(IN_TIME) == 1
        time.sleep(0.5)  # for the last lines
    assert f"rank 1 (process {ranks[1]} on 127.0.0.1): its process has ended" in "".join(lines), lines
    assert not any(map(running, ranks))


@linux
@pytest.mark.long
def test_one_interrupt_ends_all() -> None:
    started = Started("-n", "2")
    for pid in (started.process.pid, *started.ranks):  # as a terminal does
        os.kill(pid, signal.SIGINT)
    started.ended()
    assert started.process.returncode == 130


@linux
@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_where_the_launcher_is_ended(number: int) -> None:
    started = Started("-n", "2")
    started.process.send_signal(number)
    started.process.wait(IN_TIME)
    end = time.monotonic() + IN_TIME
    while time.monotonic() < end and any(map(running, started.ranks)):
        time.sleep(0.1)
    assert not any(map(running, started.ranks))


@pytest.mark.long
def test_a_host_that_is_dead(tmp_path: Path) -> None:
    hosts = tmp_path / "hosts.json"
    hosts.write_text(
        json.dumps([{"ssh": "127.0.0.1", "ips": ["127.0.0.1"]}, {"ssh": "no.such.host.invalid", "ips": ["192.0.2.1"]}])
    )
    begun = time.monotonic()
    done = run("launch", "--hostfile", str(hosts), "generate", MODEL, *PROMPT)
    assert done.returncode == 1 and time.monotonic() - begun < 2 * IN_TIME
    assert "rank 1" in done.stderr, done.stderr


def hostfile(folder: Path, *names: str) -> Path:
    path = folder / "hosts.json"
    path.write_text(json.dumps([{"ssh": name, "ips": ["127.0.0.1"]} for name in names]))
    return path


def test_each_process_has_a_gpu_of_its_own(tmp_path: Path) -> None:
    """`mlx.launch` gives rank r the GPU r modulo what `-n` says, also with a hostfile."""
    own = "127.0.0.1"
    assert on_hosts(hostfile(tmp_path, own, own, "b", "b"), 4000, "nccl").options[-2:] == ("-n", "2")
    assert on_hosts(hostfile(tmp_path, own, "b", "c"), 4000, "nccl").options[-2:] == ("-n", "1")
    assert "-n" not in on_hosts(hostfile(tmp_path, own, "b", "b"), 4000, "ring").options
    for names in ((own, "b", "b"), (own, own, "b"), (own, "b", own, "b")):
        with pytest.raises(UsageError, match="equally many entries"):
            on_hosts(hostfile(tmp_path, *names), 4000, "nccl")


def test_gpus_that_the_launcher_sees_are_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx.distributed, "is_available", lambda backend: True)
    monkeypatch.delenv("NCCL_SOCKET_IFNAME", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert gpus(here(2, 4000)) == ["--env", f"{GPUS}=5,7", "--env", "NCCL_SOCKET_IFNAME=lo"]
    with pytest.raises(UsageError, match="3 processes need a GPU each, and there are 2"):
        gpus(here(3, 4000))
    monkeypatch.setenv(GPUS, "5,7")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    take_gpu()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "7" and GPUS not in os.environ
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(mx, "device_count", lambda device: 2)
    assert gpus(here(2, 4000)) == ["--env", "NCCL_SOCKET_IFNAME=lo"]


def test_a_backend_that_mlx_was_built_without_is_refused() -> None:
    if mx.distributed.is_available("nccl"):
        pytest.skip("it has NCCL here")
    done = run(*TWO, "--backend", "nccl", "generate", MODEL, *PROMPT)
    assert done.returncode == 1 and "MLX has no nccl here" in done.stderr, done.stderr


def test_keys_are_not_on_a_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everybody on a machine can read those of all processes."""
    monkeypatch.setenv("RUNNER_API_KEY", "sesame")
    monkeypatch.setenv("RUNNER_NUM_THREADS", "3")
    found = environment()
    assert "RUNNER_NUM_THREADS=3" in found and not any("sesame" in word for word in found)


def attended(*said: bytes, wait: float = 20, leaves: bool = False) -> tuple[int | None, float]:
    """What becomes of a run whose rank 0 says this, and seconds until then."""
    with (
        socket.socket(socket.AF_UNIX) as server,
        tempfile.TemporaryDirectory() as folder,
        tempfile.TemporaryFile() as log,
    ):
        server.bind(f"{folder}/rank0")
        server.listen(1)
        process = subprocess.Popen(["sleep", "60"])
        rank = socket.socket(socket.AF_UNIX)
        rank.connect(f"{folder}/rank0")
        for word in said:
            rank.sendall(word)
        if leaves:
            rank.close()  # with what it was sent still unread
            process.kill()
        begun = time.monotonic()
        try:
            return attend(server, process, wait, log, ends_itself=False), time.monotonic() - begun
        finally:
            rank.close()
            process.kill()
            process.wait()


@linux
def test_rank_0_says_how_it_ends_and_may_end_without_a_word() -> None:
    assert attended(b"c\0", b"d\0x\7")[0] == 7
    assert attended(b"c", b"\0x", b"\0")[0] == 0
    assert attended(leaves=True)[0] is None
    assert attended(b"c\0", leaves=True)[0] is None


@linux
def test_processes_that_do_not_connect_to_each_other_end() -> None:
    """MLX lets no thread of rank 0 run meanwhile: it cannot see that another is stopped."""
    with pytest.raises(BackendError, match="have not connected to each other within 1 seconds"):
        attended(b"c\0", wait=1)
    assert attended(b"c\0", b"d\0", b"x\1", wait=0.5)[0] == 1


def test_a_stopped_rank_0_is_named() -> None:
    with tempfile.TemporaryFile() as said:
        said.write(f"[WARN] Node with rank 1 exited with code {SILENT}\n".encode())
        said.flush()
        assert first_to_end(said).startswith("rank 0 has given no sign of life")
