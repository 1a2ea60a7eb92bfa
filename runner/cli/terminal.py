"""What reaches the terminal and what comes from it: text on stdout, everything else on stderr, stdin as UTF-8."""

from __future__ import annotations

import os
import select
import stat
import sys
from typing import TextIO

from runner.errors import UsageError

CODES = {"bold": "1", "dim": "2", "red": "1;31", "yellow": "33", "green": "32", "cyan": "1;36"}
CLEAR_LINE = "\r\x1b[K"
STDIN_PATIENCE = 3.0  # seconds without a byte before we say what we wait for


def _visible_table() -> dict[int, str]:
    """C0 controls as their Unicode pictures, C1 as the replacement sign; tab and newline stay, carriage return goes."""
    table = {code: chr(0x2400 + code) for code in range(0x20) if code not in (0x09, 0x0A, 0x0D)}
    return table | {0x0D: "", 0x7F: "\u2421"} | {code: "\ufffd" for code in range(0x80, 0xA0)}


VISIBLE = _visible_table()


def visible(text: str) -> str:
    """`text` without the power to move the cursor, set the title, write to the clipboard: control characters are shown.

    Models and checkpoints are untrusted; each character is judged alone, so a sequence split over chunks is safe too.
    """
    return text.translate(VISIBLE)


def one_line(text: str) -> str:
    """`visible` for names and values: no tabs or newlines either, so that columns stay columns."""
    return visible(text).replace("\n", "\u240a").replace("\t", "\u2409")


def controls(stream: TextIO) -> bool:
    """Whether cursor movements work on `stream`."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def colours(stream: TextIO) -> bool:
    """Whether to colour `stream`: a terminal that can, and no NO_COLOR (https://no-color.org: set and not empty)."""
    return controls(stream) and not os.environ.get("NO_COLOR")


def paint(text: str, style: str, stream: TextIO) -> str:
    """`text` in one of the `CODES`, or as it is where `stream` takes no colour."""
    return f"\x1b[{CODES[style]}m{text}\x1b[0m" if colours(stream) else text


def note(text: str, style: str = "dim") -> None:
    """A line on stderr that is not an error."""
    print(paint(visible(text), style, sys.stderr), file=sys.stderr, flush=True)


def error(text: str) -> None:
    """`error: text` on stderr."""
    print(f"{paint('error:', 'red', sys.stderr)} {visible(text)}", file=sys.stderr, flush=True)


def version() -> str:
    """The installed distribution's version."""
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed

    try:
        return installed("mlx-runner")
    except PackageNotFoundError:
        return "(not installed: running from a source tree)"


class Output:
    """Stdout, written piece by piece and flushed each time: made visible on a terminal, unchanged in a pipe or file."""

    def __init__(self) -> None:
        self.stream = sys.stdout
        self.safe = self.stream.isatty()
        self.at_line_start = True

    def write(self, text: str) -> None:
        """Write a piece of text at once."""
        shown = visible(text) if self.safe else text
        if shown:
            self.stream.write(shown)
            self.stream.flush()
            self.at_line_start = shown.endswith("\n")

    def line(self, text: str) -> None:
        """Write `text` and end the line."""
        self.write(text + "\n")

    def end_line(self) -> None:
        """End the line unless it is ended; an empty answer stays empty."""
        if not self.at_line_start:
            self.write("\n")


class Status:
    """One line on stderr that is replaced and then removed; silent where the cursor cannot move."""

    def __init__(self) -> None:
        self.active = controls(sys.stderr)
        self.shown = False

    def show(self, text: str) -> None:
        """Replace the line."""
        if self.active:
            sys.stderr.write(CLEAR_LINE + paint(text, "dim", sys.stderr))
            sys.stderr.flush()
            self.shown = True

    def clear(self) -> None:
        """Remove the line."""
        if self.shown:
            sys.stderr.write(CLEAR_LINE)
            sys.stderr.flush()
            self.shown = False

    def prefill(self, done: int, total: int) -> None:
        """Progress through a prompt, in tokens; a prompt of one chunk shows nothing."""
        if done < total:
            self.show(f"reading the prompt  {done}/{total} tokens")
        else:
            self.clear()


def prompt_text(argument: str | None) -> str:
    """The prompt: the argument, standard input (no argument, or `-`), or both when text is piped in beside an argument.

    With both, the piped text follows the argument after a blank line: `runner generate M "Summarise:" < notes.txt`.
    Line ends at the end of piped text are dropped, as a shell's `$(...)` does. Raises UsageError for no text at all,
    for text that is not UTF-8, and for `-` or nothing at a terminal that gives none.
    """
    pieces: list[str] = []
    if argument is not None and argument != "-":
        pieces.append(checked_utf8(argument, "the prompt"))
        if stdin_is_piped():
            pieces.append(read_stdin())
    elif argument == "-" or stdin_is_piped():
        pieces.append(read_stdin())
    text = "\n\n".join(piece for piece in pieces if piece)
    if not text.strip():
        raise UsageError("the prompt is empty: give it as an argument, or pipe it in")
    return text


def stdin_is_piped() -> bool:
    """Whether stdin is a pipe, file or socket: something with text for us. A terminal, /dev/null or nothing is not."""
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (OSError, ValueError, AttributeError):  # closed (`<&-` leaves sys.stdin None), or replaced by an object
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode) or stat.S_ISSOCK(mode)


def read_stdin() -> str:
    """All of stdin as UTF-8 text, without a byte order mark and line ends at the end; UsageError for other bytes."""
    if sys.stdin is None:
        raise UsageError("the prompt '-' is standard input, which is closed")
    if os.name == "posix" and not select.select([sys.stdin], [], [], STDIN_PATIENCE)[0]:
        note("waiting for text on standard input (Ctrl-D ends it; </dev/null if there is none)")
    data = sys.stdin.buffer.read()
    try:
        return data.decode("utf-8-sig").rstrip("\r\n")
    except UnicodeDecodeError as problem:
        raise UsageError(
            f"standard input is not UTF-8 text: byte 0x{data[problem.start]:02x} at offset {problem.start} "
            "(convert it first, e.g. iconv -f latin1 -t utf-8)"
        ) from None


def checked_utf8(text: str, name: str) -> str:
    """`text` itself; UsageError where it holds bytes that were not UTF-8 (Python's lone surrogates)."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as problem:
        raise UsageError(f"{name} is not UTF-8 text: see character {problem.start}") from None
    return text
