"""Runs of several processes over fixtures, on this machine."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from places import ROOT, TESTS

from runner.cli.launching import free_ports
from runner.ranks.settings import VARIABLE, Settings

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
) -> list[dict[str, Any]]:
    """What `rank_worker` finds for each fixture, with `size` processes."""
    first = free_ports(size + 1)
    settings = Settings(size, mode, (), "127.0.0.1", first + size, secrets.token_hex(8), 180, backend, sends)
    hosts = folder / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{first + rank}"] for rank in range(size)]))
    results = folder / "results.jsonl"
    environment = {
        **os.environ,
        VARIABLE: settings.to_json(),
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    if backend == "nccl":
        environment |= {
            "MLX_ENABLE_TF32": "0",
            "NCCL_HOST_IP": "127.0.0.1",
            "NCCL_PORT": str(first),
            "MLX_WORLD_SIZE": str(size),
        }
    else:
        environment["MLX_HOSTFILE"] = str(hosts)
    arguments = [sys.executable, str(WORKER), str(results), str(tokens), str(requests), str(times), *map(str, fixtures)]
    processes = [
        subprocess.Popen(
            arguments,
            env={**environment, "MLX_RANK": str(rank), "CUDA_VISIBLE_DEVICES": str(rank)},
            stderr=subprocess.PIPE,
        )
        for rank in range(size)
    ]
    errors = [process.communicate(timeout=patience)[1].decode() for process in processes]
    found = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    assert [process.returncode for process in processes] == [0] * size, (errors, found[-1:])
    return found
