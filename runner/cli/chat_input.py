"""Input of chat messages: a line, a block between triple quotes, or lines continued by a backslash at their end."""

from __future__ import annotations

import os
import select
import sys
import time
from collections.abc import Sequence

from runner.cli.history import TypedLines
from runner.cli.terminal import colours, controls
from runner.errors import UsageError

QUOTES = '"""'
PROMPT = "> "
CONTINUED = "… "
TAKING_FILES = ("/read", "/save", "/load")
MOST_PATHS = 500
PAUSE = 0.1
"""Seconds without input after which a paste has ended."""


class LineReader:
    """Reads messages from stdin; if stdin and stdout are terminals, with a prompt, line editing and a history."""

    def __init__(self, completions: Sequence[str], typed: TypedLines) -> None:
        self.interactive = sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty()
        self.typed = typed
        self._whole_pastes = not self.interactive or set_up_editing(completions, typed.read())

    def read(self) -> tuple[str, bool] | None:
        """Read the next message, and whether it may be a command (a single line); None at the end of input."""
        line = self.line(PROMPT)
        if line is None:
            return None
        if line.lstrip().startswith(QUOTES):
            return self.block(line.lstrip().removeprefix(QUOTES)), False
        if pasted := self.pasted():
            return "\n".join([line, *pasted]), False
        lines = [line]
        while lines[-1].endswith("\\"):
            following = self.line(CONTINUED)
            lines[-1] = lines[-1][:-1]
            if following is None:
                break
            lines.append(following)
        return "\n".join(lines), len(lines) == 1 and "\n" not in lines[0]

    def block(self, first: str) -> str:
        """Read up to a line that ends in triple quotes or the end of input; drops line breaks at both ends."""
        lines: list[str] = []
        line: str | None = first
        while line is not None:
            if line.rstrip().endswith(QUOTES):
                lines.append(line.rstrip().removesuffix(QUOTES))
                break
            lines.append(line)
            line = self.line(CONTINUED)
        return "\n".join(lines).strip("\n")

    def pasted(self) -> list[str]:
        """The lines of a paste after its first, up to the Enter that sends them; none where the editor keeps all."""
        lines: list[str] = []
        if self._whole_pastes or not select.select([sys.stdin], [], [], PAUSE)[0]:
            return lines
        # What the paste has brought is there at once; the line that takes longer is the one that the user ends.
        waited = False
        while not waited:
            start = time.monotonic()
            line = self.line(CONTINUED)
            waited = line is None or time.monotonic() - start > PAUSE
            if line or not waited:
                lines.append(line or "")
        return lines

    def line(self, prompt: str) -> str | None:
        """Read one line, without its line break; None at the end of input. Raises UsageError for undecodable bytes."""
        try:
            if self.interactive:
                # readline counts columns, and colour codes take none: they must stand between \x01 and \x02. The last
                # ones stand before the space, as libedit drops those at the end.
                mark = f"\x01\x1b[1;36m\x02{prompt.rstrip()}\x01\x1b[0m\x02 "
                line = input(mark if colours(sys.stdout) else prompt)
                self.typed.add(line)
                return line
            text = sys.stdin.readline() if sys.stdin is not None else ""
            return text.removesuffix("\n").removesuffix("\r") if text else None
        except EOFError:
            sys.stderr.write("\n")
            return None
        except UnicodeDecodeError as problem:
            raise UsageError(
                f"the input is not {problem.encoding} text: byte 0x{problem.object[problem.start]:02x}"
            ) from None


def completed(text: str, completions: Sequence[str]) -> list[str]:
    """The lines that `text` may become: those of `completions`, and with paths behind a command that takes a file."""
    if not text:
        return []
    command, space, path = text.partition(" ")
    if not space or command not in TAKING_FILES:
        return [line for line in completions if line.startswith(text)]
    import glob

    start = os.path.expanduser(path)
    found = sorted(glob.glob(f"{glob.escape(start)}*"))[:MOST_PATHS]
    ends = [each[len(start) :] + ("/" if os.path.isdir(each) else "") for each in found]
    return [f"{text}{end}" for end in ends]


def set_up_editing(completions: Sequence[str], history: Sequence[str]) -> bool:
    """Set up line editing, if Python has readline; returns whether it keeps pasted lines together.

    Tab completes commands and the names of their files. The arrow keys go through the `history`; its file is not
    readline's, as libedit's kind is another.
    """
    try:
        import readline
    except ImportError:
        return False
    # macOS's Pythons and uv's have libedit under this name: other words bind keys, and pastes are not bracketed.
    libedit = "libedit" in (readline.__doc__ or "")
    if not libedit and controls(sys.stdout):
        readline.parse_and_bind("set enable-bracketed-paste on")
    for line in history:
        if not (libedit and "\n" in line):  # which it could not show
            readline.add_history(line)
    readline.set_completer_delims("")
    readline.parse_and_bind("bind ^I rl_complete" if libedit else "tab: complete")
    readline.set_completer(lambda text, n: dict(enumerate(completed(text, completions))).get(n))
    return not libedit and controls(sys.stdout)
