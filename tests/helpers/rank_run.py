"""One process of a run over cases: what rank 0 finds of each is a line of JSON in a file."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import mlx.core as mx

from runner.cli.rank import versions
from runner.engine.loaded import Loaded
from runner.ops.owner import OWNER
from runner.ranks.follower import Follower, run_follower
from runner.ranks.leader import Leader
from runner.ranks.settings import NCCL, VARIABLE, Settings

T = TypeVar("T")


def run_rank(
    results: str,
    cases: Sequence[T],
    follow: Callable[[Mapping[str, Any], Follower], Loaded],
    compared: Callable[[T, Leader], dict[str, Any]],
    named: Callable[[T], dict[str, Any]],
) -> None:
    """Be the rank that the environment says: rank 0 writes what `compared` finds; the others `follow`, and end."""
    settings, rank = Settings.from_json(os.environ[VARIABLE]), int(os.environ["MLX_RANK"])
    if settings.backend != NCCL:
        # A ring is for machines without NCCL, and processes that share a GPU wait long for each other. On both threads:
        # each has a default of its own, or all have one.
        mx.set_default_device(mx.cpu)
        OWNER.run(lambda: mx.set_default_device(mx.cpu))
    if rank:
        run_follower(settings, rank, versions(), follow)

    def fail(message: str) -> None:
        with Path(results).open("a") as lost:
            lost.write(json.dumps({"lost": message}) + "\n")
        os._exit(1)

    leader = Leader(settings, versions(), fail)
    with Path(results).open("w") as lines:
        for case in cases:
            try:
                found = compared(case, leader)
            except Exception as error:
                found = {"raised": f"{type(error).__name__}: {error}"}
            lines.write(json.dumps({**named(case), **found}) + "\n")
            lines.flush()
    leader.close()
