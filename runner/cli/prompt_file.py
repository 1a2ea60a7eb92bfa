"""`runner generate --file`: a file of prompts, answered many at once, in order, and gone on with where it was left."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from runner.cli import terminal
from runner.errors import ContextLengthError, NumericsError, RunnerError, TemplateError, TokenizerError, UsageError

if TYPE_CHECKING:
    from runner.answer import Timings
    from runner.cli.asking import AskingOptions
    from runner.language_model import LanguageModel
    from runner.many import Answering

AHEAD = 256
"""Prompts that are with the engine at once: enough that it never waits, few enough to begin soon."""

KEYS = frozenset({"prompt", "messages", "id"})
LONGEST = 16 << 20
"""Bytes of one line of the file."""


class UnansweredError(RunnerError):
    """Some prompts of a file could not be answered; the command line exits 1."""


@dataclass(frozen=True)
class Asked:
    """One line of the file.

    Attributes:
        prompt: the text to be asked; "" where `messages` are a whole chat.
        mark: tells it from other prompts, in the file of answers.
    """

    prompt: str
    messages: list[dict[str, Any]] | None
    mark: str
    id: Any = None


@dataclass
class Answers:
    """Writes the lines of the answers, in order; those that a file has already are not made again.

    Attributes:
        done: how many there were.
    """

    path: Path | None
    done: int = 0
    _file: TextIO | None = field(default=None, init=False, repr=False)

    def open(self, asked: Sequence[Asked]) -> None:
        """Find out what is done. The rest of a line that was being written when the last run ended is cut off.

        Raises:
            UsageError: the file has answers to other prompts, or lines that are none; it is another run's; or it is no
                file of a disk.
        """
        if self.path is None:
            self._file = sys.stdout
            return
        if self.path.exists() and not self.path.is_file():  # a pipe has no beginning, a device no end
            raise UsageError(f"--output {self.path}: no regular file; answers go to stdout where there is no --output")
        self._file = self.path.open("a", encoding="utf-8", newline="\n")
        if not _locked(self._file):
            raise UsageError(f"--output {self.path}: another run writes its answers there")
        whole = self.path.read_bytes()
        kept = whole[: whole.rfind(b"\n") + 1]
        lines = kept.splitlines()
        for number, line in enumerate(lines, 1):
            try:
                mark = json.loads(line)["prompt_sha256"]
            except (ValueError, TypeError, KeyError):
                raise UsageError(f"{self.path} line {number} is no answer: give --output another file") from None
            if number > len(asked) or mark != asked[number - 1].mark:
                raise UsageError(f"{self.path} line {number} answers another prompt: give --output another file")
        self.done, rest = len(lines), whole[len(kept) :]
        # What is cut off is the beginning of the line that comes next, and nothing of somebody else's.
        if rest and (self.done == len(asked) or not _begins(rest, asked[self.done], self.done)):
            raise UsageError(f"{self.path} ends with what is no answer: give --output another file")
        self._file.truncate(len(kept))

    def write(self, line: Mapping[str, Any]) -> None:
        """Write one line, now: whoever goes on later finds it."""
        assert self._file is not None
        self._file.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """The end."""
        if self.path is not None and self._file is not None:
            self._file.close()


def _begins(text: bytes, asked: Asked, index: int) -> bool:
    """Whether a text is the beginning of an answer's line, as `answer` makes it."""
    head = json.dumps({"index": index, "prompt_sha256": asked.mark})[:-1].encode()
    return text.startswith(head) or head.startswith(text)


def _locked(file: TextIO) -> bool:
    """Whether this process alone has a file now, until it is closed, as far as the system has such locks."""
    try:
        import fcntl
    except ImportError:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a disk without locks
        return True
    return True


def read(path: Path) -> list[Asked]:
    """The prompts of a file: a JSON text a line, or an object with `prompt` or `messages`, and perhaps an `id`.

    Raises:
        UsageError: the file cannot be read, or a line is none of these; the message names it.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise UsageError(f"--file {path}: {error.strerror or error}") from error
    return [_asked(line, f"{path} line {number}") for number, line in enumerate(lines, 1) if line.strip()]


def _asked(line: bytes, place: str) -> Asked:
    if len(line) > LONGEST:
        raise UsageError(f"{place} has more than {LONGEST >> 20} MB")
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{place} is no JSON: {error}") from None
    given = {"prompt": value} if isinstance(value, str) else value
    if not isinstance(given, dict):
        raise UsageError(f'{place} must be a text, or an object with "prompt" or "messages"')
    if unknown := sorted(set(given) - KEYS):
        raise UsageError(f"{place} has {unknown[0]!r}, which is none of {', '.join(sorted(KEYS))}")
    prompt, messages = given.get("prompt"), given.get("messages")
    if (prompt is None) == (messages is None):
        raise UsageError(f'{place} must have either "prompt" or "messages"')
    if prompt is not None and (not isinstance(prompt, str) or not prompt):
        raise UsageError(f"{place}: prompt must be a text, and not empty")
    if messages is not None and not isinstance(messages, list):
        raise UsageError(f"{place}: messages must be a list")
    try:
        json.dumps(given.get("id"), allow_nan=False, ensure_ascii=False).encode()
    except ValueError:
        raise UsageError(f"{place}: the id cannot be written as JSON") from None
    mark = hashlib.sha256(json.dumps([prompt, messages], sort_keys=True).encode()).hexdigest()[:16]
    return Asked(prompt or "", messages, mark, given.get("id"))


def answer_all(
    lm: LanguageModel,
    asked: Sequence[Asked],
    answers: Answers,
    asking: AskingOptions,
    thinking: str | None,
    keywords: Mapping[str, Any],
    told: Callable[[Timings], None],
) -> None:
    """Answer what is not answered yet, many at once.

    Args:
        told: is given, at the end, the tokens of all together, each kind over the whole time.

    Raises:
        UsageError: an option does not go with the model or with chats, or some prompts could not be answered.
    """
    from runner.answer import Timings
    from runner.many import Engine
    from runner.ops.memory import Memory

    if asking.system is not None and any(one.messages is not None for one in asked):
        raise UsageError("--system is for prompts, and some lines have messages: put it among these")
    if answers.done:
        terminal.note(f"({answers.done} of {len(asked)} prompts are answered already)")
    # Whether prompts are asked through the template is the same for all, and noted once.
    chat = asking.messages(lm, "", [], thinking=thinking) is not None
    begun, counts, memory = time.perf_counter(), Counts(), Memory(lm.engine.device.keeps)
    with Engine(lm) as many:

        def begin(one: Asked) -> Answering:
            messages = one.messages if one.messages is not None or not chat else asking.chat_of(one.prompt)
            return asking.put(lm, one.prompt, messages, thinking, many.submit, many.submit_chat, **keywords)

        answer(asked, answers, begin, counts)
    answers.close()
    seconds = time.perf_counter() - begun
    told(Timings(counts.read, seconds, counts.made, seconds, memory.look(), counts.reused))
    if counts.failed:
        raise UnansweredError(f"{counts.failed} of {len(asked)} prompts could not be answered: their lines say why")


@dataclass
class Counts:
    """What came of a file's prompts.

    Attributes:
        failed: prompts that could not be answered.
        read: tokens of prompts that were read; `reused`: those that came of earlier prompts.
        made: tokens of answers.
    """

    failed: int = 0
    read: int = 0
    reused: int = 0
    made: int = 0


def answer(asked: Sequence[Asked], answers: Answers, begin: Callable[[Asked], Answering], counts: Counts) -> None:
    """Answer what is not answered yet, and count it.

    Args:
        begin: gives a prompt to the engine.
    """
    status = terminal.Status()
    waiting: deque[tuple[int, Answering | RunnerError]] = deque()
    following = iter(range(answers.done, len(asked)))
    try:
        while True:
            while len(waiting) < AHEAD and (index := next(following, None)) is not None:
                waiting.append((index, _begun(begin, asked[index])))
            if not waiting:
                return
            index, begun = waiting.popleft()
            line = {"index": index, "prompt_sha256": asked[index].mark, **_line(begun)}
            if asked[index].id is not None:
                line["id"] = asked[index].id
            counts.failed += "error" in line
            if not isinstance(begun, RunnerError):
                counts.read, counts.reused = counts.read + begun.read, counts.reused + begun.reused
                counts.made += line.get("tokens", 0)
            answers.write(line)
            status.show(f"answered {index + 1}/{len(asked)} prompts")
    finally:
        status.clear()


def _begun(begin: Callable[[Asked], Answering], asked: Asked) -> Answering | RunnerError:
    """What was begun, or why it could not be: one prompt that is too long does not end the others."""
    try:
        return begin(asked)
    except (ContextLengthError, TemplateError, TokenizerError) as error:
        return error


def _line(begun: Answering | RunnerError) -> dict[str, Any]:
    if isinstance(begun, RunnerError):
        return {"error": str(begun)}
    from runner.answer import gather

    try:
        made = gather(begun)
    except NumericsError as error:
        return {"error": str(error)}
    line: dict[str, Any] = {"text": made.text, "finish_reason": made.finish_reason}
    if made.reasoning:
        line["reasoning"] = made.reasoning
    return {**line, "prompt_tokens": begun.reused + begun.read, "tokens": len(made.tokens)}
