"""`runner convert`: a GGUF file into a Hub-style directory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from runner.cli import terminal

Source = Annotated[
    Path, typer.Argument(metavar="FILE.gguf", exists=True, dir_okay=False, readable=True, help="A GGUF file.")
]
Target = Annotated[Path, typer.Argument(metavar="OUT", help="The directory to make.")]


def convert(source: Source, target: Target) -> None:
    """Turn a GGUF file into a directory of config, tokenizer and safetensors. Prints that directory."""
    from runner import backend

    backend.require()
    from runner import gguf

    terminal.Output().line(str(gguf.convert(source, target)))
