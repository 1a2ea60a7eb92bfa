"""Aligned columns and headings with rich; imported only by commands that print a report."""

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
    """Stdout: colours on a terminal that takes them; no markup, emoji or highlighting of text we did not write."""
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
    """Text with control characters shown, in a style ("" is plain)."""
    return Text(one_line(text), style=style if colours(sys.stdout) else "")


def columns(*names: str, indent: int = 0) -> Table:
    """A table without lines; a name that starts with ">" is aligned to the right, "" for all names is no header."""
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), show_header=any(names))
    for name in names:
        align: Literal["left", "right"] = "right" if name.startswith(">") else "left"
        heading = cell((" " * indent if not table.columns else "") + name.lstrip(">"), "dim")
        table.add_column(heading, justify=align, overflow="fold", no_wrap=align == "right")
    return table


def show(*parts: RenderableType) -> None:
    """Print each part, with no spaces at the ends of lines."""
    out = console()
    with out.capture() as captured:
        for part in parts:
            out.print(part)
    sys.stdout.write("".join(line.rstrip(" ") + "\n" for line in captured.get().splitlines()))
    sys.stdout.flush()


def section(title: str, body: RenderableType) -> tuple[RenderableType, ...]:
    """A blank line, a bold title, and `body` under it, two columns in."""
    return Text(""), cell(title, "bold"), Padding(body, (0, 0, 0, 2))


def size(nbytes: int) -> str:
    """`269.1 MB`: powers of ten, as disks, the hub and mlx-lm count."""
    value = float(nbytes)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 999.95:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def count(number: int) -> str:
    """`134.5 M`, for parameters."""
    for scale, unit in ((10**12, " T"), (10**9, " B"), (10**6, " M"), (10**3, " k")):
        if number >= scale:
            return f"{number / scale:.1f}{unit}"
    return str(number)
