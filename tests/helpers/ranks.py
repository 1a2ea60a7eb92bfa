"""Runs of several processes over fixtures, on this machine."""

from __future__ import annotations

import dataclasses
import json
import os
import secrets
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
from places import ROOT, TESTS

from runner.cli.launching import free_ports
from runner.ranks.settings import NCCL, VARIABLE, Settings

FEW = {"RUNNER_NUM_THREADS": "2"}
"""For ranks of a ring, which compute on the CPU: on a large machine, those of all tests at once would have a thread for
each core."""

WORKER = TESTS / "helpers" / "rank_worker.py"


def over_fixtures(
    folder: Path,
    fixtures: Sequence[Path],
    *,
    size: int,
    mode: str,
    tokens: int,
    requests: int = 0,
    times: int = 1,
    sends: bool = True,
    backend: str = "ring",
    patience: float = 300,
    twin: bool = False,
) -> list[dict[str, Any]]:
    """What `rank_worker` finds for each fixture, with `size` processes; `twin`: with `rank_twin` for kernels."""
    arguments = [str(tokens), str(requests), str(times), *map(str, fixtures)]
    settings = Settings(size, mode, (), "127.0.0.1", 0, secrets.token_hex(8), 60, backend, sends)
    return over_processes(folder, WORKER, arguments, settings, patience=patience, twin=twin)


def over_processes(
    folder: Path, worker: Path, arguments: Sequence[str], settings: Settings, *, patience: float, twin: bool = False
) -> list[dict[str, Any]]:
    """What a worker writes to the file that comes before its `arguments`, with `settings` and free ports."""
    size = settings.size
    first = free_ports(size + 1)
    settings = dataclasses.replace(settings, port=first + size)
    hosts = folder / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{first + rank}"] for rank in range(size)]))
    results = folder / "results.jsonl"
    environment = {
        **os.environ,
        VARIABLE: settings.to_json(),
        "RANK_TWIN": str(int(twin)),
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    if settings.backend == NCCL:
        environment |= {
            "MLX_ENABLE_TF32": "0",
            "NCCL_HOST_IP": "127.0.0.1",
            "NCCL_PORT": str(first),
            "MLX_WORLD_SIZE": str(size),
        }
    else:
        environment["MLX_HOSTFILE"] = str(hosts)
    processes = [
        subprocess.Popen(
            [sys.executable, str(worker), str(results), *arguments],
            env={**environment, "MLX_RANK": str(rank), **(on_gpu(rank, size) if settings.backend == NCCL else FEW)},
            stderr=subprocess.PIPE,
        )
        for rank in range(size)
    ]
    errors = [process.communicate(timeout=patience)[1].decode() for process in processes]
    found = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    assert [process.returncode for process in processes] == [0] * size, (errors, found[-1:])
    return found


def on_gpu(rank: int, size: int) -> dict[str, str]:
    """The environment of a rank that has a GPU of its own, or shares one where there are fewer than ranks.

    NCCL refuses the same GPU twice, of one host: those that share one say that they are on several, whose network is
    this machine's loopback.
    """
    count = mx.device_count(mx.gpu)
    apart = {"NCCL_HOSTID": f"rank-{rank}", "NCCL_SOCKET_IFNAME": "lo", "NCCL_NET": "Socket", "NCCL_IB_DISABLE": "1"}
    return {"CUDA_VISIBLE_DEVICES": str(rank % count), **(apart if count < size else {})}
