"""The commands of a chat, which begin with a slash, and the names that they have in other programs."""

from __future__ import annotations

import os
import re
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import typer

from runner.cli import terminal
from runner.cli.chat_settings import NAMES, ChatSettings
from runner.cli.conversation import Conversation, path_of
from runner.errors import UsageError

COMMAND = re.compile(r"/(?:[A-Za-z]+|\?)")
ALIASES = {"/?": "/help", "/clear": "/reset", "/bye": "/quit", "/exit": "/quit"}
LEAVING = ("exit", "quit")
"""Messages that leave, as in llm and in most shells."""
SHOWN = ("info", "settings", "system", "template", "messages")
LARGEST_TEXT = 16 << 20
"""Bytes of the largest file that is read into a message."""
OTHER_KEYS = {
    "exit, quit": "leave, too",
    '"""': "begin and end a message of several lines; or end a line with \\",
    "Ctrl-C": "stop the answer",
}


@dataclass(frozen=True)
class Command:
    """A command: what follows its name, one line of help, and what it does with the text behind it."""

    takes: str
    help: str
    run: Callable[[str], None]


class Commands:
    """Runs the commands of one chat.

    Attributes:
        read: texts of files, which go with the next message.
    """

    def __init__(
        self,
        conversation: Conversation,
        settings: ChatSettings,
        answer: Callable[[str], bool],
        *,
        interactive: bool,
    ) -> None:
        """Prepare; `answer` has the model answer a message, and returns whether the turn was kept."""
        self.conversation = conversation
        self.settings = settings
        self.answer = answer
        self.interactive = interactive
        self.read: list[str] = []
        self.table = {
            "/help": Command("", "this list", self._help),
            "/set": Command("NAME VALUE", "change a setting ('default': undo it); alone: list them", self._set),
            "/show": Command("WHAT", f"{', '.join(SHOWN[:-1])} or {SHOWN[-1]}; alone: the model", self._show),
            "/regen": Command("", "answer the last message again", self._regenerate),
            "/edit": Command("", "change the last message in $EDITOR, and answer that", self._edit),
            "/read": Command("FILE", "add a file's text to the next message", self._read),
            "/reset": Command("", "forget the conversation, keep the system message", self._reset),
            "/system": Command("TEXT", "set the system message (no text: show it; 'clear': remove it)", self._system),
            "/save": Command("FILE", "write the conversation as JSON", self._save),
            "/load": Command("FILE", "go on with a saved conversation", self._load),
            "/quit": Command("", "leave (also Ctrl-D, or Ctrl-C twice)", self._quit),
        }

    @staticmethod
    def completions() -> tuple[str, ...]:
        """What Tab completes at the prompt."""
        names = ("help", "set", "show", "regen", "edit", "read", "reset", "system", "save", "load", "quit")
        lines = [*(f"/{name}" for name in names), *ALIASES]
        return (*lines, *(f"/set {name} " for name in NAMES), *(f"/show {what}" for what in SHOWN))

    def take(self, text: str) -> bool:
        """Run `text` if it is a command, and return whether it was one.

        A command is `/` and letters alone, so `/etc/hosts ...` is a message. Raises UsageError for an unknown one.
        """
        word, _, rest = text.partition(" ")
        if text.strip() in LEAVING and text[:1] != " ":
            self._quit("")
        if COMMAND.fullmatch(word) is None:
            return False
        command = self.table.get(ALIASES.get(word, word))
        if command is None:
            raise UsageError(
                f"unknown command {word}: /help lists the commands (to send it as text, begin with a space)"
            )
        if rest.strip() and not command.takes:
            raise UsageError(f"{word} takes no text after it, got {rest.strip()!r}")
        command.run(rest.strip())
        return True

    def ask(self, text: str) -> bool:
        """Have the model answer a message with the texts of the files that were read for it, each after a blank line.

        They wait for the next message unless the turn is kept, which is what this returns.
        """
        kept = False
        try:
            kept = self.answer("\n\n".join([text, *self.read]))
        finally:
            if kept:
                self.read.clear()
            elif self.read and self.interactive:
                terminal.note("(what you read still goes with your next message; /read alone forgets it)")
        return kept

    def _help(self, rest: str) -> None:
        """Run `/help`: list the commands."""
        others: dict[str, list[str]] = {}
        for other, name in ALIASES.items():
            others.setdefault(name, []).append(other)
        rows = {f"{name} {command.takes}".strip(): command.help for name, command in self.table.items()}
        for name, same in others.items():
            rows[name] += f"; also {', '.join(same)}"
        rows |= OTHER_KEYS
        width = max(map(len, rows)) + 2
        for name, text in rows.items():
            print(f"  {name:<{width}}{terminal.paint(text, 'dim', sys.stderr)}", file=sys.stderr)
        print(file=sys.stderr)

    def _set(self, rest: str) -> None:
        """Run `/set [NAME [VALUE]]`: change a setting, say what it is, or list all."""
        if rest.partition(" ")[0] == "system":
            return self._system(rest.partition(" ")[2].strip())
        if rest:
            terminal.note(f"({self.settings.set(rest)})\n")
        else:
            self._show("settings")

    def _show(self, rest: str) -> None:
        """Run `/show [WHAT]`: the model, the settings, the system message, the chat template or the messages."""
        what = {"": "info", "parameters": "settings"}.get(rest, rest)
        if what not in SHOWN:
            raise UsageError(f"/show {rest}: there are {', '.join(SHOWN)}")
        if what == "system":
            return self._system("")
        if what in ("info", "settings"):
            rows = self.settings.shown() if what == "settings" else self._info()
            width = max(map(len, rows)) + 2
            text = "\n".join(f"  {name:<{width}}{value}" for name, value in rows.items())
        elif what == "template":
            text = self.settings.model.template
        else:
            text = "\n".join(f"{each['role']}: {each['content']}" for each in self.conversation.all())
        terminal.note(f"{text or '(no messages)'}\n")

    def _info(self) -> dict[str, str]:
        return self.settings.model.info(self.conversation.all(), self.settings.template_kwargs)

    def _regenerate(self, rest: str) -> None:
        """Run `/regen`: answer the last message again; the old answer stays if no new one comes."""
        why = self.settings.repeats()
        if why is not None and self.conversation.messages:
            terminal.note(f"({why}: the answer will be the same)")
        self._again(None)

    def _again(self, text: str | None) -> None:
        """Put `text` in the place of the last message (None: as it is), and answer it."""
        taken = self.conversation.take_turn()
        kept = False
        try:
            kept = self.answer(taken[0]["content"] if text is None else text)
        finally:
            if not kept:
                self.conversation.messages += taken

    def _edit(self, rest: str) -> None:
        """Run `/edit`: change the last message in an editor and answer that, or write the first one there."""
        if not self.interactive:
            raise UsageError("/edit needs a terminal")
        before = self.conversation.last_question()
        text = edited(before or "")
        if not text.strip() or text == before:
            terminal.note("(nothing has changed)\n")
        elif before is None:
            self.ask(text)
        else:
            self._again(text)

    def _read(self, rest: str) -> None:
        """Run `/read [FILE]`: keep its text for the next message, or forget what is kept."""
        if not rest and self.read:
            self.read.clear()
            return terminal.note("(nothing goes with your next message)\n")
        if not rest:
            raise UsageError("/read needs the name of a file, as in /read notes.txt")
        path = path_of(rest)
        text = text_of(path)
        self.read.append(text)
        terminal.note(f"({len(text)} characters of {path} go with your next message)\n")

    def _reset(self, rest: str) -> None:
        """Run `/reset`: forget all messages but the system message."""
        self.conversation.messages.clear()
        self.read.clear()
        terminal.note("(forgotten)\n")

    def _system(self, rest: str) -> None:
        """Run `/system [TEXT | clear]`: set, remove or show the system message."""
        if rest:
            model, variables = self.settings.model, self.settings.template_kwargs
            new = None if rest == "clear" else model.checked_system(rest, variables, "/system")
            self.conversation.system = new
        shown = "none" if self.conversation.system is None else self.conversation.system
        terminal.note(f"(system message: {shown})\n")

    def _save(self, rest: str) -> None:
        """Run `/save FILE`: write the conversation."""
        path = self.conversation.save(rest)
        terminal.note(f"({len(self.conversation.all())} messages in {path})\n")

    def _load(self, rest: str) -> None:
        """Run `/load FILE`: replace the conversation by a saved one."""
        self.conversation.load(rest)
        terminal.note(f"({len(self.conversation.all())} messages)\n")

    def _quit(self, rest: str) -> None:
        """Run `/quit`: leave."""
        raise typer.Exit(0)


def text_of(path: Path, limit: int = LARGEST_TEXT) -> str:
    """Return the text of a file, without byte order mark and final line breaks.

    Raises:
        UsageError: it cannot be read, is no regular file, has more than `limit` bytes, or is not UTF-8.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a FIFO would wait for a writer, a device has no end
            raise UsageError(f"{path} is not a regular file")
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except OSError as problem:
        raise UsageError(f"cannot read {path}: {problem.strerror}") from None
    if len(data) > limit:
        raise UsageError(f"{path} has more than {limit >> 20} MiB: no message is that long")
    try:
        return data.decode("utf-8-sig").rstrip("\r\n")
    except UnicodeDecodeError as problem:
        raise UsageError(f"{path} is not UTF-8 text: byte 0x{data[problem.start]:02x} at {problem.start}") from None


def edited(text: str) -> str:
    """Let the user change `text` in $VISUAL, $EDITOR or vi; returns it without final line breaks.

    Raises:
        UsageError: the editor cannot be started, ends with another code than 0, or leaves no UTF-8 text.
    """
    import shlex
    import tempfile  # modules that no other part of a command needs

    named = os.environ.get("VISUAL") or os.environ.get("EDITOR") or "vi"
    try:
        command: Sequence[str] = shlex.split(named)
    except ValueError as problem:
        raise UsageError(f"the editor {named!r} cannot be understood: {problem}") from None
    with tempfile.TemporaryDirectory(prefix="runner-") as directory:  # which nobody else can enter
        path = Path(directory) / "message.md"
        path.write_text(f"{text}\n" if text else "", encoding="utf-8")
        try:
            with undisturbed():
                code = subprocess.run([*command, str(path)], check=False).returncode
        except OSError as problem:
            raise UsageError(f"cannot start the editor {named!r}: {problem.strerror} (set EDITOR)") from None
        if code:
            raise UsageError(f"the editor {named!r} ended with code {code}: the message stays as it was")
        return text_of(path)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Leave Ctrl-C to the program that is started: a function, unlike SIG_IGN, is not inherited."""
    before = signal.signal(signal.SIGINT, lambda number, frame: None)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
