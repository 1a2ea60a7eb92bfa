"""What all ranks of a run are told by the environment, before they can talk to each other."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Self

from runner.errors import UsageError

VARIABLE = "RUNNER_RANKS"
"""The environment variable that makes a process one of several; its value is `Settings` as JSON."""

LAUNCHER = "RUNNER_LAUNCHER"
"""The environment variable with the path of the socket at which `runner launch` waits for rank 0."""

CODE, CONNECTING, CONNECTED = b"x", b"c", b"d"
"""What rank 0 says at that socket, each before another byte: that it ends, with the exit code in that byte; that it
connects to the other ranks now, in a call that lets none of its threads run; and that it has."""

GPUS = "RUNNER_GPUS"
"""The environment variable with the GPUs of a machine that its processes share, as CUDA_VISIBLE_DEVICES lists them."""

PIPELINE, TENSOR = "pipeline", "tensor"
MODES = (PIPELINE, TENSOR)

NCCL = "nccl"
"""The backend of NVIDIA GPUs, as `mx.distributed.init` calls it."""


@dataclass(frozen=True)
class Settings:
    """How a run of several processes is laid out.

    Attributes:
        size: how many processes there are.
        mode: what is shared out: `pipeline` (layers) or `tensor` (each layer's matrices).
        share: how much each rank of a pipeline may hold, in any unit; () for equal shares.
        host: the address that rank 0 waits at for the others.
        port: its port.
        token: a word that tells this run from others.
        wait: seconds in which all ranks must have come.
        backend: what carries what ranks send, as `mx.distributed.init` calls it; `any`: what its environment is for.
        sends: whether that one sends from one rank to another. MLX's NCCL does not: it only adds and gathers.
    """

    size: int
    mode: str
    share: tuple[float, ...]
    host: str
    port: int
    token: str
    wait: float
    backend: str = "any"
    sends: bool = True

    def to_json(self) -> str:
        """The value of `VARIABLE`."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read the value of `VARIABLE`; raises UsageError if this is not what `runner launch` has written."""
        try:
            values = json.loads(text)
            return cls(**{**values, "share": tuple(values["share"])})
        except (ValueError, TypeError, KeyError) as error:
            raise UsageError(f"{VARIABLE} is set by 'runner launch' alone; it holds {text[:80]!r}") from error
