"""An animated SVG of what a terminal showed, from a recording: (seconds, text) as it came."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

WIDTH, HEIGHT = 8.4, 19  # pixels of a character
MARGIN, BAR = 16, 34
REST = 4.0  # seconds for which the whole picture stands before it begins again
Style = Literal["prompt", "typed", "shown"]
COLOURS = {"prompt": "#5fd75f", "typed": "#ffffff", "shown": "#c5c8c6"}


@dataclass(frozen=True)
class Piece:
    """Text that appears at a moment of the recording, in seconds."""

    at: float
    text: str
    style: Style


def picture(pieces: Sequence[Piece], columns: int, title: str) -> str:
    """The SVG: each piece stands in its place from its moment on, over and over; where nothing moves, all of them."""
    placed = list(_placed(pieces, columns))
    rows = 1 + max(row for _, row, _, _ in placed)
    whole = max(piece.at for piece in pieces) + REST
    width, height = columns * WIDTH + 2 * MARGIN, rows * HEIGHT + BAR + MARGIN
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" '
        f'font-family="ui-monospace, SFMono-Regular, Menlo, Consolas, monospace" font-size="14">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{width:.0f}" height="{height:.0f}" rx="8" fill="#1d1f21"/>',
        *(
            f'<circle cx="{20 + 18 * index}" cy="18" r="6" fill="{colour}"/>'
            for index, colour in enumerate(("#ff5f57", "#febc2e", "#28c840"))
        ),
    ]
    for piece, row, column, text in placed:
        x, y = MARGIN + column * WIDTH, BAR + (row + 1) * HEIGHT - 5
        moment = f'keyTimes="0;{piece.at / whole:.4f}" dur="{whole:.1f}s"'
        lines.append(
            f'<text x="{x:.1f}" y="{y:.0f}" textLength="{len(text) * WIDTH:.1f}" fill="{COLOURS[piece.style]}" '
            f'xml:space="preserve">{escape(text)}'
            f'<animate attributeName="opacity" calcMode="discrete" values="0;1" {moment} repeatCount="indefinite"/>'
            "</text>"
        )
    return "\n".join([*lines, "</svg>"]) + "\n"


def _placed(pieces: Sequence[Piece], columns: int) -> Iterator[tuple[Piece, int, int, str]]:
    """Each piece line by line, with the row and column where it stands; too long lines go on in the next row."""
    row = column = 0
    for piece in pieces:
        for index, line in enumerate(piece.text.split("\n")):
            if index:
                row, column = row + 1, 0
            while line:
                part, line = line[: columns - column], line[columns - column :]
                if part.strip():
                    yield piece, row, column, part
                column += len(part)
                if line:
                    row, column = row + 1, 0


def typed(at: float, text: str, style: Style = "typed", pace: float = 0.045) -> list[Piece]:
    """`text` as hands type it, a character after the other."""
    return [Piece(at + index * pace, letter, style) for index, letter in enumerate(text)]


def timed(events: Sequence[tuple[float, str]], at: float, longest: float = 1.0) -> list[Piece]:
    """What a program printed, from `at` on: at its own pace, but for waits longer than `longest` seconds."""
    found, clock, last = [], at, None
    for moment, text in events:
        clock += 0.0 if last is None else min(moment - last, longest)
        last = moment
        found.append(Piece(clock, text, "shown"))
    return found
