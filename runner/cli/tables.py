"""Aligned columns and headings, with rich; imported only by commands that print a report."""

from __future__ import annotations

import sys
from typing import Literal

from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from runner.cli.terminal import colours, controls, one_line

PIPE_WIDTH = 1000  # a pipe has no width: never wrap or cut there


def console() -> Console:
    """A rich console on stdout, in colour on a terminal that takes it.

    Markup, emoji and highlighting are off: the text comes from checkpoints, not from us.
    """
    colour = colours(sys.stdout)
    return Console(
        file=sys.stdout,
        force_terminal=controls(sys.stdout),
        color_system="standard" if colour else None,
        no_color=not colour,
        width=None if sys.stdout.isatty() else PIPE_WIDTH,
        markup=False,
        emoji=False,
        highlight=False,
    )


def cell(text: str, style: str = "") -> Text:
    """A cell of text in a style ("": plain); control characters are made visible."""
    return Text(one_line(text), style=style if colours(sys.stdout) else "")


def columns(*names: str, indent: int = 0, gap: int = 3) -> Table:
    """A table without lines; a column whose name starts with ">" is right-aligned; without names, no header."""
    table = Table(box=None, pad_edge=False, padding=(0, gap, 0, 0), show_header=any(names))
    for name in names:
        align: Literal["left", "right"] = "right" if name.startswith(">") else "left"
        heading = cell((" " * indent if not table.columns else "") + name.lstrip(">"), "dim")
        table.add_column(heading, justify=align, overflow="fold", no_wrap=align == "right")
    return table


def show(*parts: RenderableType) -> None:
    """Print the parts on stdout, without spaces at the ends of lines."""
    out = console()
    with out.capture() as captured:
        for part in parts:
            out.print(part)
    sys.stdout.write("".join(line.rstrip(" ") + "\n" for line in captured.get().splitlines()))
    sys.stdout.flush()


def section(title: str, body: RenderableType) -> tuple[RenderableType, ...]:
    """A section of a report: a blank line, a bold title, and `body` indented by two columns."""
    return Text(""), cell(title, "bold"), Padding(body, (0, 0, 0, 2))


def size(nbytes: int) -> str:
    """Format bytes as in `269.1 MB`, in powers of ten as disks, the hub and mlx-lm count."""
    value = float(nbytes)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 999.95:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def count(number: int) -> str:
    """Format a number of parameters as in `134.5 M`."""
    for scale, unit in ((10**12, " T"), (10**9, " B"), (10**6, " M"), (10**3, " k")):
        if number >= scale:
            return f"{number / scale:.1f}{unit}"
    return str(number)
