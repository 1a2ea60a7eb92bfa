"""The messages of a chat, and their file: a JSON list of `{"role": ..., "content": ...}`, as templates take it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from runner.errors import UsageError

ROLES = ("system", "user", "assistant")
LARGEST_FILE = 64 << 20  # bytes
Message = dict[str, str]


class Conversation:
    """The system message, if there is one, and the user's and assistant's messages."""

    def __init__(self) -> None:
        self.system: str | None = None
        self.messages: list[Message] = []

    def all(self) -> list[Message]:
        """Return the messages as a chat template takes them, the system message first."""
        first = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*first, *self.messages]

    def add(self, question: str, answer: str, more: Message | None = None) -> None:
        """Append a turn: the user's message and the answer; `more` are further keys of the latter, which no file gets.

        The template decides what it does with them: most drop the reasoning of earlier turns.
        """
        answered = {**(more or {}), "role": "assistant", "content": answer}
        self.messages += [{"role": "user", "content": question}, answered]

    def last_question(self) -> str | None:
        """Text of the last turn's message; None before the first turn."""
        asked = [message["content"] for message in self.messages if message["role"] == "user"]
        return asked[-1] if asked else None

    def take_turn(self) -> list[Message]:
        """Remove the last message of the user's with what follows, and return them; UsageError before the first."""
        places = [index for index, message in enumerate(self.messages) if message["role"] == "user"]
        if not places:
            raise UsageError("there is no message yet")
        taken = self.messages[places[-1] :]
        del self.messages[places[-1] :]
        return taken

    def replace(self, messages: list[Message]) -> None:
        """Take other messages, the first of which may be the system message."""
        has_system = bool(messages) and messages[0]["role"] == "system"
        self.system = messages[0]["content"] if has_system else None
        self.messages = messages[1:] if has_system else list(messages)

    def save(self, name: str) -> Path:
        """Write all messages to the file `name` and return its path; replaces nothing but a saved chat (UsageError)."""
        path = file_path("/save", name)
        if path.exists():
            try:
                read_messages(path)
            except UsageError:
                raise UsageError(f"{path} exists and is not a saved chat: choose another name") from None
        # A file beside the target is renamed over it, so an interrupted write leaves the old chat whole.
        unfinished = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            plain = [{"role": message["role"], "content": message["content"]} for message in self.all()]
            unfinished.write_text(json.dumps(plain, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
            unfinished.replace(path)
        except (OSError, UnicodeEncodeError) as problem:
            unfinished.unlink(missing_ok=True)
            why = problem.strerror if isinstance(problem, OSError) else "a message has half of a character"
            raise UsageError(f"cannot write {path}: {why}") from None
        return path

    def load(self, name: str) -> None:
        """Replace all messages by those in the file `name`; after a UsageError nothing has changed."""
        self.replace(read_messages(file_path("/load", name)))


def file_path(command: str, name: str) -> Path:
    """Path of the file that follows a command; expands `~`."""
    if not name:
        raise UsageError(f"{command} needs the name of a file, as in {command} chat.json")
    return path_of(name)


def path_of(name: str) -> Path:
    """The path that a user has typed; `~` is expanded where there is such a user.

    Raises:
        UsageError: no file can have that name.
    """
    if "\0" in name:
        raise UsageError(f"no file can be called {name!r}")
    return Path(os.path.expanduser(name))


def read_messages(path: Path) -> list[Message]:
    """Read and check the messages of a file. Raises UsageError, which says what is wrong and where."""
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise UsageError(f"{path} is larger than {LARGEST_FILE >> 20} MiB: not a saved chat")
        data: Any = json.loads(path.read_text(encoding="utf-8"))
    except OSError as problem:
        raise UsageError(f"cannot read {path}: {problem.strerror}") from None
    except (ValueError, RecursionError) as problem:  # UnicodeDecodeError and JSONDecodeError are both ValueErrors
        raise UsageError(f"{path} is not a saved chat: {problem}") from None
    if not isinstance(data, list):
        raise UsageError(f"{path} is not a saved chat: expected a list of messages, found {type(data).__name__}")
    return [checked(message, f"{path}, message {index}", first=index == 0) for index, message in enumerate(data)]


def checked(message: Any, where: str, *, first: bool) -> Message:
    """Return `message` if it is exactly a role and a text; else raise UsageError, which names the place `where`."""
    if not isinstance(message, dict) or set(message) != {"role", "content"}:
        raise UsageError(f'{where}: expected {{"role": ..., "content": ...}} and nothing else')
    if message["role"] not in ROLES or (message["role"] == "system" and not first):
        raise UsageError(
            f"{where}: role {message['role']!r}; expected user or assistant, or system in the first message only"
        )
    if not isinstance(message["content"], str):
        raise UsageError(f"{where}: content must be text, found {type(message['content']).__name__}")
    return {"role": message["role"], "content": message["content"]}
