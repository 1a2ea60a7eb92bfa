"""One process of several that `runner launch` has started: `python -m runner.cli.rank COMMAND ...`.

Rank 0 runs the command in the terminal that `runner launch` was called from, whose files it is handed over a socket;
the others follow it and print nothing.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import platform
import signal
import socket
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from runner.ranks.settings import CODE, CONNECTED, CONNECTING, GPUS, LAUNCHER, VARIABLE, Settings

if TYPE_CHECKING:
    from runner.engine.loaded import Loaded
    from runner.ranks.follower import Follower
    from runner.ranks.leader import Leader

FAILED = "RUNNER_RANK_FAILED"
"""The environment variable in which rank 0 notes that another process has ended too early."""

LATE = 5.0
"""Seconds that rank 0 has to end once its command has."""

FILES = 3
"""Standard input, output and error."""


def versions() -> dict[str, str]:
    """What must be the same in all processes, by name."""
    from importlib.metadata import version

    from runner.cli import terminal

    return {
        "version of runner": terminal.version(),
        "version of MLX": version("mlx"),
        "version of Python": platform.python_version().rpartition(".")[0],
    }


def lead(what: Mapping[str, Any]) -> Leader:
    """Wait for the other ranks and have them open the model that `what` describes.

    Raises:
        BackendError: a rank has not come, or has other versions.
        UsageError: the run has a model already.
    """
    from runner.cli import terminal
    from runner.errors import BackendError, UsageError
    from runner.ranks.leader import Leader

    launcher = os.environ.pop(LAUNCHER, None)
    if launcher is None:
        raise UsageError("a run of several processes has one model: leave out the second one (--draft, --against)")
    settings = Settings.from_json(os.environ[VARIABLE])

    def fail(message: str) -> NoReturn:
        terminal.error(message)
        for pid in leader.local:  # one that is stopped hears nothing else
            if of_run(pid, settings.token):
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
        _leave(int(launcher), 1)

    def connects(begins: bool) -> None:
        with contextlib.suppress(OSError):
            os.write(int(launcher), (CONNECTING if begins else CONNECTED) + b"\0")

    try:
        leader = Leader(settings, versions(), fail, others_failed, connects)
    except OSError as error:
        raise BackendError(
            f"rank 0 cannot wait for the others at {settings.host}:{settings.port}: {error.strerror or error}"
        ) from error
    atexit.register(leader.close)
    leader.begin(**_absolute(what))
    return leader


def of_run(pid: int, token: str) -> bool:
    """Whether a process of this machine is one of this run: its number is what somebody at the socket has said.

    Where the system does not tell, it is left to `runner launch`, which ends its own.
    """
    with contextlib.suppress(OSError):
        for word in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            if word.startswith(f"{VARIABLE}=".encode()):
                return token.encode() in word
    return False


def _absolute(what: Mapping[str, Any]) -> dict[str, Any]:
    """`what` with a path to the model that means the same in another directory."""
    return {
        name: os.path.abspath(value) if name in ("model", "subject") and os.path.exists(str(value)) else value
        for name, value in what.items()
    }


def others_failed() -> bool:
    """Whether `mlx.launch` has said that a process has failed."""
    return FAILED in os.environ


def load(message: Mapping[str, Any], part: Follower) -> Loaded:
    """Open what rank 0 has opened, in a process that follows it."""
    from runner.checkpoint.model_files import open_files
    from runner.checkpoint.names import resolve
    from runner.engine.loaded import assemble
    from runner.ops.owner import OWNER

    what = {name: value for name, value in message.items() if name != "do"}

    def job() -> Loaded:
        if "subject" in what:
            from runner.bench.models import open_subject

            return open_subject(what.pop("subject"), **what, part=part).engine
        files = open_files(resolve(what["model"]))
        return assemble(files.config, files.source, dtype=what["dtype"], activations=what["activations"], part=part)

    return OWNER.run(job)


def follow(settings: Settings, rank: int) -> None:
    """Be a rank after 0, until the run is over; does not return."""
    from runner.ops import backend
    from runner.ranks.follower import run_follower

    backend.require()
    run_follower(settings, rank, versions(), load)


def speak(arguments: Sequence[str]) -> NoReturn:
    """Be rank 0: run the command in the caller's terminal, and tell `runner launch` its exit code."""
    launcher = socket.socket(socket.AF_UNIX)
    launcher.connect(os.environ[LAUNCHER])
    _, files, _, _ = socket.recv_fds(launcher, 1, FILES)
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    # Python has made its streams of other files, and has looked whether those are terminals.
    sys.stdin, sys.stdout, sys.stderr = (
        open(number, mode, closefd=False, buffering=1)  # noqa: SIM115
        for number, mode in ((0, "r"), (1, "w"), (2, "w"))
    )
    os.environ[LAUNCHER] = str(launcher.fileno())  # for who is asked for a model, and leads this run
    # The other processes are deaf to Ctrl-C: what it ends, this one decides, and tells them. `mlx.launch` sends SIGTERM
    # to all as soon as one has failed; which one that was, and why, this process has still to say.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda number, frame: os.environ.update({FAILED: "1"}))
    threading.Thread(target=_outlive, args=(launcher,), name="runner-launcher", daemon=True).start()
    from runner.cli import main

    code = main(arguments)
    # What waits for another rank now would wait for ever.
    late = threading.Timer(LATE, _leave, (launcher.fileno(), code))
    late.daemon = True
    late.start()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, OSError, ValueError):
            stream.flush()
    _leave(launcher.fileno(), code)


def _leave(launcher: int, code: int) -> NoReturn:
    """End this process, and let `runner launch` end with its code."""
    with contextlib.suppress(OSError):
        os.write(launcher, CODE + bytes([code]))
    os._exit(code)


def _outlive(launcher: socket.socket) -> None:
    """End this process, and with it the others, where `runner launch` has ended; as by Ctrl-C, where that asks to."""
    with contextlib.suppress(OSError):
        while launcher.recv(1):
            os.kill(os.getpid(), signal.SIGINT)
    os._exit(1)


def take_gpu() -> None:
    """Look at the GPU whose number `mlx.launch` has given, of those that `runner launch` could see."""
    visible = os.environ.pop(GPUS, "")
    if visible:
        os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[int(os.environ["CUDA_VISIBLE_DEVICES"])]


if __name__ == "__main__":
    take_gpu()
    own = int(os.environ["MLX_RANK"])
    if own == 0:
        speak(sys.argv[1:])
    follow(Settings.from_json(os.environ[VARIABLE]), own)
