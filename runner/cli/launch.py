"""`runner launch`: one command on several processes that share a model out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from runner.cli.sharing_options import SharingOptions
from runner.errors import UsageError
from runner.ranks.settings import NCCL

COMMANDS = ("generate", "chat", "run", "serve", "bench", "perplexity")
"""Commands that can be shared out."""

BACKENDS = ("ring", "nccl", "jaccl", "jaccl-ring")
"""Backends of `mx.distributed` for whose processes `mlx.launch` sets a rank."""

INITIALIZED = {"jaccl-ring": "jaccl"}
"""What `mx.distributed.init` calls those that it calls otherwise."""

UNSENDING = (NCCL,)
"""Those that cannot send from one process to another."""

Processes = Annotated[int, typer.Option("-n", "--processes", metavar="N", min=1, help="Processes on this machine.")]
HostFile = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="A hostfile of mlx.launch: the machines, this one first.", show_default=False),
]
Backend = Annotated[
    str,
    typer.Option(metavar="NAME", help=f"What carries what they send, of mlx.launch's: {', '.join(BACKENDS)}."),
]
Wait = Annotated[float, typer.Option(metavar="SECONDS", min=1, help="How long the processes have to come.")]
StartingPort = Annotated[
    int | None,
    typer.Option(metavar="PORT", min=1024, max=65000, help="First of the ports; default: free ones, or 32323 on."),
]
Rest = Annotated[
    list[str], typer.Argument(metavar="COMMAND...", help=f"The command to run: {', '.join(COMMANDS)}, and its options.")
]


def launch(
    rest: Rest,
    *,
    processes: Processes = 1,
    hostfile: HostFile = None,
    sharing: SharingOptions,
    backend: Backend = "ring",
    wait: Wait = 10.0,
    port: StartingPort = None,
) -> None:
    """Run a command with a model shared out over several processes or machines, by mlx.launch."""
    if rest[0] not in COMMANDS:
        raise UsageError(f"launch runs {', '.join(COMMANDS)}, not {rest[0]!r}")
    if hostfile is not None and processes != 1:
        raise UsageError("the processes are those of --hostfile: leave -n out")
    if hostfile is None and processes == 1:
        raise UsageError("there is one process only: -n says how many, --hostfile where")
    from runner.cli.launching import here, new_token, on_hosts, supervise

    if backend not in BACKENDS:
        raise UsageError(f"--backend must be one of {', '.join(BACKENDS)}, not {backend!r}")
    from runner.ops.backend import require

    require()
    place = here(processes, port) if hostfile is None else on_hosts(hostfile, port, backend)
    # Each rank has a port for the ring; rank 0 another one, for what is said beside it.
    settings = sharing.settings(place.size, host=place.host, port=place.port + place.size, token=new_token(), wait=wait)
    settings = replace(settings, backend=INITIALIZED.get(backend, backend), sends=backend not in UNSENDING)
    raise typer.Exit(supervise(place, settings, backend, rest))
