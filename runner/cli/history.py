"""What is kept of chats between them, in the user's data directory: typed lines, and the last conversation.

Nobody but the user can read the files. `--no-history` neither reads nor writes them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from runner.cli import terminal
from runner.cli.conversation import Message, checked
from runner.cli.variables import variable
from runner.errors import UsageError, UserFileError
from runner.user_files import MAX_TABLE, change_table, data_directory, read_table

Resume = Annotated[
    bool, typer.Option("--continue", "-c", help="Go on with the last chat, with its model unless one is named.")
]
History = Annotated[
    bool,
    typer.Option(
        "--history/--no-history",
        help="Keep typed lines and the last chat, for the arrow keys and -c, in files that only you can read. "
        "Default: at a terminal.",
        show_default=False,
        **variable("--history"),
    ),
]
LINES = 1000
"""Typed lines that are remembered."""
LARGEST = 4 << 20
"""Bytes of the file of typed lines beyond which only its end is read."""


class TypedLines:
    """The lines that were typed into chats, oldest first: JSON strings, one a line, since pastes have line breaks."""

    def __init__(self, *, kept: bool = True) -> None:
        """Begin; unless they are `kept`, and there is a home directory, nothing is read or written."""
        self.path = data_directory() / "chat_history"
        self.kept = kept and self.path.is_absolute()
        self._last = ""

    def read(self) -> list[str]:
        """Return the last `LINES` lines; what is damaged in the file is left out."""
        if not self.kept:
            return []
        try:
            with self.path.open("rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - LARGEST))
                data = file.read(LARGEST)
        except OSError:
            return []
        rows = data.decode("utf-8", "replace").splitlines()
        lines = [line for row in rows if (line := _line(row)) is not None][-LINES:]
        if len(rows) > 2 * LINES:
            self._write("".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines), os.O_TRUNC)
        return lines

    def add(self, line: str) -> None:
        """Append a line that is not empty and not the same as the one before."""
        if self.kept and line.strip() and line != self._last:
            self._last = line
            # Half characters, as bytes that are not UTF-8 become, are escaped with all others.
            self._write(json.dumps(line, ensure_ascii=not line.isprintable()) + "\n", os.O_APPEND)

    def _write(self, text: str, how: int) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | how, 0o600)
            with os.fdopen(handle, "wb") as file:
                os.fchmod(handle, 0o600)
                file.write(text.encode("utf-8", "replace"))
        except OSError as problem:
            self.kept = False
            terminal.note_once(f"({self.path}: cannot be written: {problem.strerror})")


def _line(row: str) -> str | None:
    try:
        value = json.loads(row)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, str) else None


@dataclass(frozen=True)
class LastChat:
    """The last conversation: the model as it was named, a path made absolute, and all messages."""

    model: str
    messages: list[Message]


def last_chat_path() -> Path:
    """The file of the last conversation."""
    return data_directory() / "last_chat.json"


def read_last_chat() -> LastChat:
    """Return the last conversation; raises UsageError if there is none, UserFileError if its file is damaged."""
    path = last_chat_path()
    table = read_table(path)
    if not table:
        raise UsageError("there is no last chat to go on with (-c): none was held here, or all with --no-history")
    model, messages = table.get("model"), table.get("messages")
    if not isinstance(model, str) or not isinstance(messages, list):
        raise UserFileError(f"{path}: holds no chat: remove it")
    try:
        checked_messages = [checked(each, f"{path}, message {n}", first=n == 0) for n, each in enumerate(messages)]
    except UsageError as problem:
        raise UserFileError(f"{problem}: remove the file") from None
    return LastChat(model, checked_messages)


def resumed(resume: bool, history: bool) -> LastChat | None:
    """Return the last chat where -c asks for it, else None; raises UsageError with --no-history."""
    if resume and not history:
        raise UsageError("--continue reads what --no-history leaves alone: choose one")
    return read_last_chat() if resume else None


def model_of_last(words: Sequence[str | None], named: str | None, last: LastChat | None) -> str | None:
    """Return what -m names, or the model of the chat that is gone on with where neither -m nor an argument names one.

    Args:
        words: the arguments [MODEL] [TEXT]; of a single one that names no model, the text.
    """
    from runner.checkpoint.names import names_model

    given = [word for word in words if word is not None]
    if last is None or named is not None or len(given) > 1 or (given and names_model(given[0])):
        return named
    return last.model


def keep_last_chat(model: str, messages: Sequence[Message], *, noted: bool = True) -> None:
    """Keep a conversation as the last one; where that cannot be, a note says so once if it is to be `noted`."""
    plain = [{"role": message["role"], "content": message["content"]} for message in messages]
    path = os.path.expanduser(model)
    named = os.path.abspath(path) if os.path.exists(path) else model
    if len(json.dumps(plain).encode()) > MAX_TABLE // 2:
        return terminal.note_once("(this chat is too long to be kept for -c)") if noted else None

    def change(table: dict[str, Any]) -> None:
        table.clear()
        table.update(model=named, messages=plain)

    try:
        change_table(last_chat_path(), change)
    except (UserFileError, UsageError) as problem:
        if noted:
            terminal.note_once(f"(this chat is not kept for -c: {problem})")
