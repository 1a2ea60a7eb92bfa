"""Input and output of the commands: text on stdout, everything else on stderr, stdin as UTF-8."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import select
import stat
import sys
from typing import TextIO

from runner.cli.wrap import WordWrap
from runner.errors import UsageError

CODES = {"bold": "1", "dim": "2", "red": "1;31", "yellow": "33", "green": "32", "cyan": "1;36"}
CLEAR_LINE = "\r\x1b[K"
STDIN_PATIENCE = 3.0  # seconds without a byte before a note says what we wait for


def _visible_table() -> dict[int, str]:
    """Translation of C0 controls to Unicode control pictures and of C1 to U+FFFD.

    Tab and newline stay as they are, carriage returns are dropped.
    """
    table = {code: chr(0x2400 + code) for code in range(0x20) if code not in (0x09, 0x0A, 0x0D)}
    return table | {0x0D: "", 0x7F: "\u2421"} | {code: "\ufffd" for code in range(0x80, 0xA0)}


VISIBLE = _visible_table()


def visible(text: str) -> str:
    """Make control characters visible, so that `text` cannot move the cursor, set the title or write to the clipboard.

    Models and checkpoints are untrusted. Each character is translated alone, so a sequence split over chunks is safe.
    """
    return text.translate(VISIBLE)


def one_line(text: str) -> str:
    """Like `visible`, but with tabs and newlines made visible too: for names and values in columns."""
    return visible(text).replace("\n", "\u240a").replace("\t", "\u2409")


def controls(stream: TextIO) -> bool:
    """Whether `stream` is a terminal on which cursor movements work."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def colours(stream: TextIO) -> bool:
    """Whether to colour `stream`: a terminal that can, unless NO_COLOR is set and not empty (https://no-color.org)."""
    return controls(stream) and not os.environ.get("NO_COLOR")


def paint(text: str, style: str, stream: TextIO) -> str:
    """Colour `text` in a style of `CODES`; returns it unchanged if `stream` takes no colour."""
    return f"\x1b[{CODES[style]}m{text}\x1b[0m" if colours(stream) else text


def open_closed_streams() -> None:
    """Put /dev/null where stdin, stdout or stderr were closed at the start, as by `<&-` or `2>&-` in a shell.

    Else the next file that is opened takes the number: MLX takes 0 for a failure to open a checkpoint, and whatever
    writes to 1 or 2 would write into a file of the user's. `sys.stdin` stays None; messages for stderr are lost.

    Raises:
        OSError: stdout was closed: no command can give its answer.
    """
    for number, mode in enumerate((os.O_RDONLY, os.O_WRONLY, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, mode)  # takes the lowest free number
            os.set_inheritable(number, True)
    if sys.stderr is None:
        sys.stderr = os.fdopen(2, "w", encoding="utf-8", closefd=False)
    if sys.stdout is None:
        raise OSError(errno.EBADF, "standard output is closed")


def note(text: str, style: str = "dim") -> None:
    """Print a line on stderr that is not an error."""
    say(paint(visible(text), style, sys.stderr))


@functools.cache
def note_once(text: str, style: str = "dim") -> None:
    """Print such a line the first time that a command has it to say."""
    note(text, style)


def error(text: str) -> None:
    """Print `error: text` on stderr."""
    say(f"{paint('error:', 'red', sys.stderr)} {visible(text)}")


def say(text: str) -> None:
    """Print a line on stderr; where nobody can read it (its disk is full, its reader gone), work and exit code stay."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def version() -> str:
    """Version of the installed distribution."""
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed

    try:
        return installed("mlx-runner")
    except PackageNotFoundError:
        return "(not installed: running from a source tree)"


class Output:
    """Writes to a stream (stdout unless told) piece by piece, flushing each.

    On a terminal, control characters are made visible, and with `wrap` lines are broken between words.
    """

    def __init__(self, stream: TextIO | None = None, *, wrap: bool = False) -> None:
        self.stream = sys.stdout if stream is None else stream
        self.safe = self.stream.isatty()
        self.wrap = WordWrap(self._columns) if wrap and self.safe else None
        self.style: str | None = None
        self.at_line_start = True

    def _columns(self) -> int:
        """Width of the terminal; 0 where it does not say."""
        try:
            return os.get_terminal_size(self.stream.fileno()).columns
        except OSError:
            return 0

    def write(self, text: str, style: str | None = None) -> None:
        """Write a piece of text, in a style of `CODES` where the stream takes colours; a word may wait for its end."""
        shown = visible(text) if self.safe else text
        if style != self.style:
            self.flush()
            self.style = style
        if self.wrap is not None:
            shown = self.wrap.feed(shown)
        self._put(shown)

    def flush(self) -> None:
        """Write the word that waits for its end, if there is one."""
        if self.wrap is not None:
            self._put(self.wrap.flush())

    def _put(self, shown: str) -> None:
        if shown:
            style = self.style
            self.stream.write(shown if style is None else paint(shown, style, self.stream))
            self.stream.flush()
            self.at_line_start = shown.endswith("\n")

    def line(self, text: str) -> None:
        """Write `text` and end the line."""
        self.write(text + "\n")

    def end_line(self) -> None:
        """End the line unless it has ended already; empty output stays empty. What follows is a text of its own."""
        self.flush()
        if self.wrap is not None:
            self.wrap = WordWrap(self._columns)  # a block of code that was left open has ended, too
        if not self.at_line_start:
            self.write("\n")


class Status:
    """Shows progress in one line on stderr, which is replaced and finally removed; silent without a terminal."""

    def __init__(self) -> None:
        self.active = controls(sys.stderr)
        self.shown = False

    def show(self, text: str) -> None:
        """Show `text`, in place of what the line showed before."""
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
        """Show progress through a prompt, in tokens; for a prompt of one chunk nothing is shown."""
        if done < total:
            self.show(f"reading the prompt  {done}/{total} tokens")
        else:
            self.clear()


def prompt_text(argument: str | None) -> str:
    """Read the prompt from the argument, from standard input (no argument, or `-`), or from both.

    With both, the piped text follows the argument after a blank line: `runner generate M "Summarise:" < notes.txt`.
    Line breaks at the end of piped text are dropped, as a shell's `$(...)` does.

    Raises:
        UsageError: there is no text, or it is not UTF-8.
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
        raise UsageError("the prompt is empty: pass it as an argument, or pipe it in")
    return text


def stdin_is_piped() -> bool:
    """Whether stdin is a pipe, file or socket, which has text for us, and not a terminal, /dev/null or closed."""
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (OSError, ValueError, AttributeError):  # closed (`<&-` leaves sys.stdin None), or replaced by an object
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode) or stat.S_ISSOCK(mode)


def read_stdin() -> str:
    """Read all of stdin as UTF-8, without byte order mark and final line breaks; raises UsageError for other bytes."""
    if sys.stdin is None:
        raise UsageError("the prompt '-' means standard input, but that is closed")
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
    """Return `text`; raises UsageError if it holds bytes that were not UTF-8 (Python's lone surrogates)."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as problem:
        raise UsageError(f"{name} is not UTF-8 text: see the character at offset {problem.start}") from None
    return text
