"""The options that say how a model is shared out over processes: of `launch`, and of `inspect` for what would be."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from runner.errors import UsageError

if TYPE_CHECKING:
    from runner.ranks.settings import Settings

SHARING = "Sharing out"


@dataclass(frozen=True)
class SharingOptions:
    """What is shared out, and how much each process may hold."""

    pipeline: Annotated[
        bool, typer.Option("--pipeline", help="Share out the layers: the default.", rich_help_panel=SHARING)
    ] = False
    tensor: Annotated[
        bool,
        typer.Option("--tensor", help="Share out each layer's matrices, over a fast link.", rich_help_panel=SHARING),
    ] = False
    share: Annotated[
        str | None,
        typer.Option(
            metavar="A,B,...",
            help="How much each process may hold, as in 2,1,1; default: all the same.",
            rich_help_panel=SHARING,
        ),
    ] = None

    def refuse(self, needed: str) -> None:
        """Raise UsageError if one of them is given without the option `needed`."""
        for name, value in (("--pipeline", self.pipeline), ("--tensor", self.tensor), ("--share", self.share)):
            if value:
                raise UsageError(f"{name} is for {needed}: add it")

    def shares(self, size: int) -> tuple[float, ...]:
        """The numbers of `--share`, one for each of `size` processes; () where it was not given.

        Raises:
            UsageError: there are not so many, or one is not positive.
        """
        if self.share is None:
            return ()
        try:
            found = tuple(float(word) for word in self.share.split(","))
        except ValueError as error:
            raise UsageError(
                f"--share must be numbers with commas between them, as in 2,1,1, not {self.share!r}"
            ) from error
        if len(found) != size or not all(math.isfinite(each) and each > 0 for each in found):
            raise UsageError(f"--share must be {size} positive numbers, one for each process, not {self.share!r}")
        return found

    def settings(self, size: int, *, host: str = "", port: int = 0, token: str = "", wait: float = 0.0) -> Settings:
        """What the processes are told."""
        from runner.ranks.settings import PIPELINE, TENSOR, Settings

        if self.tensor and (self.pipeline or self.share):
            raise UsageError("--tensor shares tensors out evenly: --pipeline and --share are for whole layers")
        return Settings(size, TENSOR if self.tensor else PIPELINE, self.shares(size), host, port, token, wait)
