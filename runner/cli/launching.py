"""Starting the processes of a run by `mlx.launch`, and seeing to it that all of them end."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from runner.errors import BackendError, UsageError
from runner.ranks.link import LIMIT, SILENT
from runner.ranks.settings import CODE, CONNECTING, GPUS, LAUNCHER, NCCL, VARIABLE, Settings

LAUNCH = "mlx._distributed_utils.launch"
"""Where `mlx.launch` is."""

PORT = 32323
"""The first port of a hostfile's addresses, as of `mlx.launch`. On one machine, free ones are looked for."""

LEAVE = 3.0
"""Seconds that the other processes have to end after rank 0."""


LONGEST_WORDS = 1 << 20
"""Bytes that are looked at of what `mlx.launch` prints."""

TOLD = 1.5
"""Seconds in which `mlx.launch` sees that a process has ended, and says which; it looks every second."""

STUCK = 6.0
"""Seconds that rank 0 has to end once another process has failed.

It connects to the others by a call of MLX in which none of its threads runs: over NCCL, it would wait there for ever.
"""


@dataclass(frozen=True)
class Place:
    """Where the processes run.

    Attributes:
        options: what `mlx.launch` is told of it.
        host: rank 0's address.
        port: the first port that is used.
        size: how many processes there are.
        local: whether all are on this machine.
    """

    options: tuple[str, ...]
    host: str
    port: int
    size: int
    local: bool


def here(processes: int, port: int | None) -> Place:
    """So many processes on this machine."""
    first = free_ports(processes + 1) if port is None else port
    options = ("--hosts", "127.0.0.1", "-n", str(processes), *ports(first))
    return Place(options, "127.0.0.1", first, processes, True)


def ports(first: int) -> tuple[str, ...]:
    """Options of `mlx.launch` for its ports, of any backend, from `first` on."""
    return ("--starting-port", str(first), "--nccl-port", str(first))


def new_token() -> str:
    """A word that tells a run from others. Users of the machines can see it: it is no secret from them."""
    return secrets.token_hex(16)


def free_ports(count: int) -> int:
    """The first of `count` ports in a row that nobody listens at now."""
    for _ in range(100):
        first = 20000 + secrets.randbelow(12000)
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in range(first, first + count):
                stack.enter_context(socket.create_server(("127.0.0.1", port)))
            return first
    raise BackendError(f"there are no {count} free ports in a row on this machine")


def on_hosts(path: Path, port: int | None, backend: str) -> Place:
    """The machines of a hostfile: `[{"ssh": NAME, "ips": [ADDRESS]}, ...]`, or an object with that under `hosts`.

    Raises:
        UsageError: it cannot be read, a host has no address, the first one is not this machine, or it does not say
            which GPU of its machine a process has.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        hosts = data["hosts"] if isinstance(data, dict) else data
        names = [(str(host["ssh"]), [str(address) for address in host.get("ips", [])]) for host in hosts]
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f'{path} is no hostfile of mlx.launch: [{{"ssh": NAME, "ips": [ADDRESS]}}, ...]') from error
    for name, addresses in names:
        if len(addresses) != 1:
            raise UsageError(f"{path}: host {name!r} has {len(addresses)} ips: it needs the one to listen at")
    if not names or names[0][0] != "127.0.0.1":
        raise UsageError(
            f"{path}: the first host speaks to the user, so it must be this machine, as "
            '{"ssh": "127.0.0.1", "ips": [ADDRESS]} with the address that the others find it at'
        )
    first = PORT if port is None else port
    local = all(name == "127.0.0.1" for name, _ in names)
    options = ("--hostfile", str(path), *ports(first))
    if backend == NCCL:
        options += ("-n", str(each_host([name for name, _ in names], path)))
    return Place(options, names[0][1][0], first, len(names), local)


def each_host(names: list[str], path: Path) -> int:
    """How many processes each host has, one behind the other: `mlx.launch` gives rank r the GPU r modulo that number.

    Raises:
        UsageError: they have not all the same, or those of one host do not follow each other.
    """
    count = names.count(names[0])
    groups = [names[start : start + count] for start in range(0, len(names), count)]
    if any(group != [group[0]] * count for group in groups) or len({group[0] for group in groups}) < len(groups):
        raise UsageError(
            f"{path}: with --backend {NCCL} each process has a GPU of its own, so all hosts need equally many entries, "
            "those of one host one after another"
        )
    return count


def gpus(place: Place) -> list[str]:
    """Options of `mlx.launch` for processes with a GPU of this machine each, of those that are visible here.

    Raises:
        BackendError: MLX has no NCCL here.
        UsageError: there are fewer than processes.
    """
    import mlx.core as mx

    if not mx.distributed.is_available(NCCL):
        raise BackendError(f"MLX has no {NCCL} here, which takes NVIDIA GPUs: leave --backend out for the ring")
    if not place.local:
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    found = [] if visible is None else [word for word in visible.split(",") if word.strip()]
    count = mx.device_count(mx.gpu) if visible is None else len(found)
    if count < place.size:
        raise UsageError(f"{place.size} processes need a GPU each, and there are {count}: -n must be {count} at most")
    chosen = [] if visible is None else ["--env", f"{GPUS}={','.join(found)}"]
    # NCCL's own connections stay on this machine, unless somebody knows better.
    return [*chosen, *([] if "NCCL_SOCKET_IFNAME" in os.environ else ["--env", "NCCL_SOCKET_IFNAME=lo"])]


def launcher() -> list[str]:
    """The command `mlx.launch`: the script that was installed with MLX, or else what it calls.

    Raises:
        BackendError: MLX was installed without it.
    """
    tool = Path(sysconfig.get_path("scripts")) / "mlx.launch"
    if tool.exists():
        return [str(tool)]
    if importlib.util.find_spec(LAUNCH) is None:
        raise BackendError(f"{tool} is missing, which comes with MLX: install mlx again")
    return [sys.executable, "-c", f"from {LAUNCH} import main; main()"]


def supervise(place: Place, settings: Settings, backend: str, command: list[str]) -> int:
    """Start the processes, lend rank 0 this terminal, and return its exit code once all have ended."""
    tool = [*launcher(), *place.options, "--backend", backend, *(gpus(place) if backend == NCCL else ())]
    with tempfile.TemporaryDirectory(prefix="runner-") as directory, socket.socket(socket.AF_UNIX) as server:
        # Only this user may enter the directory, so nobody else can take rank 0's place.
        path = os.path.join(directory, "rank0")
        server.bind(path)
        server.listen(1)
        arguments = [
            *tool, "--env", f"{VARIABLE}={settings.to_json()}", "--env", f"{LAUNCHER}={path}", *environment(), "--",
            sys.executable, "-m", "runner.cli.rank", *command,
        ]  # fmt: skip
        with tempfile.TemporaryFile() as said, terminal_kept():
            # Deaf to Ctrl-C, which a terminal sends to all: rank 0 decides what it ends.
            before = signal.signal(signal.SIGINT, signal.SIG_IGN)
            process = subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=said, stderr=said)
            signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
            try:
                if place.local and process.stdin is not None:
                    feed(process.stdin)
                code = attend(server, process, settings.wait, said, ends_itself=command[0] == "serve")
            finally:
                end(process)
                signal.signal(signal.SIGINT, before)
            if code is None:
                raise BackendError(first_to_end(said) + own_words(said))
            if code == 1 and (words := own_words(said)):
                print(f"what other processes said{words}", file=sys.stderr)
            return code


def ended(said: IO[bytes]) -> dict[int, int]:
    """The exit codes of the processes that have failed, by their ranks and in their order, as `mlx.launch` tells."""
    # Read from its start by a call that leaves the place alone: `mlx.launch` writes where this file stands.
    data = os.pread(said.fileno(), LONGEST_WORDS, 0).decode(errors="replace")
    return {int(rank): int(code) for rank, code in re.findall(r"Node with rank (\d+) exited with code (-?\d+)", data)}


def first_to_end(said: IO[bytes]) -> str:
    """Which process ended first, and took the others with it, as `mlx.launch` tells."""
    found = ended(said)
    if not found:
        return "the processes were not started in time"
    # Of those that are seen to have ended together, one that was killed has not done so because of another.
    rank = next((rank for rank, code in found.items() if code < 0), next(iter(found)))
    if found[rank] == SILENT:
        return f"rank 0 has given no sign of life for {LIMIT:.0f} seconds: rank {rank} has ended for that"
    if rank == 0:
        return f"rank 0 has ended with code {found[0]}"
    return f"rank {rank} has ended with code {found[rank]}: its host cannot be reached, or has no runner to start"


def own_words(said: IO[bytes]) -> str:
    """The last lines that the processes other than rank 0 have printed, but for what tells that they have ended."""
    said.seek(0)
    lines = said.read()[-8000:].decode(errors="replace").splitlines()
    found = [line for line in lines if line.strip() and "[ring]" not in line and "[WARN]" not in line]
    return ":\n  " + "\n  ".join(found[-5:]) if found else ""


def feed(stdin: Any) -> None:
    """Fill the standard input of all processes, which none of them reads.

    `mlx.launch` waits in one call for output and for room to write, and where there is always room it never rests: it
    would take a processor of its own. Where pipes are full, it sleeps.
    """
    os.set_blocking(stdin.fileno(), False)
    with contextlib.suppress(OSError):
        while True:
            os.write(stdin.fileno(), bytes(4096))


def environment() -> list[str]:
    """Options of `mlx.launch` that give the processes this one's variables of ours, NCCL's, and Python's path.

    But for keys: everybody on these machines can read a command line. Rank 0, which asks for them, has them from here.
    """
    names = [name for name in os.environ if name.startswith(("RUNNER_", "NCCL_")) or name == "PYTHONPATH"]
    names = [name for name in names if not name.endswith("_KEY")]
    return [word for name in sorted(names) for word in ("--env", f"{name}={os.environ[name]}")]


@contextlib.contextmanager
def terminal_kept() -> Iterator[None]:
    """Leave the terminal as it was, however a process that used it has ended."""
    try:
        import termios
    except ImportError:
        yield
        return
    try:
        mode = termios.tcgetattr(0)
    except (termios.error, ValueError, OSError):
        yield
        return
    try:
        yield
    finally:
        with contextlib.suppress(termios.error):
            termios.tcsetattr(0, termios.TCSADRAIN, mode)


def attend(
    server: socket.socket, process: subprocess.Popen[bytes], wait: float, said: IO[bytes], *, ends_itself: bool
) -> int | None:
    """Lend rank 0 this process's files, and return its exit code; None if it ended without one, or is stuck.

    Args:
        wait: seconds until rank 0 must have come, and, once all processes have, for them to connect to each other: the
            call of MLX that does it lets none of rank 0's threads run.
        said: what `mlx.launch` prints.
        ends_itself: whether rank 0 is told of a first SIGTERM, and ends when its answers have.

    Raises:
        BackendError: the processes have not connected in time.
    """
    end_of_wait = time.monotonic() + wait
    server.settimeout(0.2)
    while True:
        try:
            connection, _ = server.accept()
            break
        except TimeoutError:
            if process.poll() is not None or time.monotonic() > end_of_wait:
                return None
    with connection:
        connection.settimeout(None)
        with contextlib.suppress(ConnectionError):  # it has ended already
            socket.send_fds(connection, [b"f"], [0, 1, 2])
        if ends_itself:

            def ask(number: int, frame: object) -> None:
                signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
                with contextlib.suppress(OSError):  # it has ended already
                    connection.send(b"e")

            signal.signal(signal.SIGTERM, ask)
        connection.settimeout(1)
        failed: float | None = None  # when another process was seen to have
        connected: float | None = None  # when all must have
        told = b""
        while True:
            try:
                found = b""
                with contextlib.suppress(ConnectionError):  # an end without a word, too
                    found = connection.recv(2)
                told += found
                if len(told) >= 2:
                    kind, value, told = told[:1], told[1], told[2:]
                    if kind == CODE:
                        return value
                    connected = time.monotonic() + wait if kind == CONNECTING else None
                if found:
                    continue
                limit = time.monotonic() + TOLD
                while 0 not in ended(said) and process.poll() is None and time.monotonic() < limit:
                    time.sleep(0.05)
                return None
            except TimeoutError:
                if connected is not None and time.monotonic() > connected:
                    end(process, 0)
                    raise BackendError(
                        f"all processes have come, but have not connected to each other within {wait:.0f} seconds: one "
                        "is stopped, or the ports of the hostfile's addresses cannot be reached"
                    ) from None
                codes = ended(said)
                if failed is None and codes:
                    failed = time.monotonic()
                stopped = SILENT in codes.values()  # rank 0 will not say anything
                if stopped or (failed is not None and time.monotonic() - failed > STUCK):
                    end(process, 0)  # it has had its time
                    return None


def end(process: subprocess.Popen[bytes], leave: float = LEAVE) -> None:
    """Let the processes end by themselves, for so many seconds, and end those that do not."""
    limit = time.monotonic() + leave
    while time.monotonic() < limit and children(process.pid):
        time.sleep(0.05)
    for child in children(process.pid):
        with contextlib.suppress(OSError):
            os.kill(child, signal.SIGKILL)
    # `mlx.launch` itself takes up to a second to see that they have ended, and has nothing more to do.
    process.kill()
    process.wait()


def children(parent: int) -> list[int]:
    """The processes that `parent` has started and that have not ended."""
    if Path("/proc/self/stat").exists():  # a container may have no `ps`
        found = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                state, owner = path.read_text().rpartition(")")[2].split()[:2]  # behind the name, which may be anything
                if int(owner) == parent and state != "Z":
                    found.append(int(path.parent.name))
        return found
    listed = subprocess.run(["ps", "-A", "-o", "pid=,ppid=,stat="], capture_output=True, text=True, check=False).stdout
    rows = (line.split() for line in listed.splitlines())
    return [int(row[0]) for row in rows if len(row) == 3 and int(row[1]) == parent and row[2][0] != "Z"]
