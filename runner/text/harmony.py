"""Separator for harmony, gpt-oss's format: messages with a header that names a channel (github.com/openai/harmony).

<|start|>assistant<|channel|>analysis<|message|>Easy.<|end|><|start|>assistant<|channel|>final<|message|>Paris.<|return|>
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Literal

from runner.text.separator import Split
from runner.text.stop import unfinished

START, CHANNEL, MESSAGE = "<|start|>", "<|channel|>", "<|message|>"
MARKS = (START, CHANNEL, MESSAGE, "<|end|>", "<|return|>", "<|call|>", "<|constrain|>")
AUTHOR = "assistant"

Place = Literal["author", "header", "reasoning", "content", "between"]


def speaks_harmony(named: str, has_token: Callable[[str], bool]) -> bool:
    """Whether a model's template, or its vocabulary, has the marks of harmony's headers."""
    return all(mark in named for mark in (CHANNEL, MESSAGE)) or all(map(has_token, (CHANNEL, MESSAGE)))


class HarmonySeparator:
    """Takes harmony's messages apart: channel `analysis` is reasoning; `final`, `commentary` and others are content.

    A message to a recipient (a call of a function) is content too, with its header as it was written, since the name of
    the function stands there. Messages of one kind are joined by an empty line. A message without a header is content;
    an unfinished header is left out.
    """

    ends: Sequence[str] = ("<|return|>", "<|call|>")

    def __init__(self, special: Collection[str], prompt: Iterable[tuple[str, bool]] = ()) -> None:
        """Begin an answer; `prompt` is the end of the prompt in pieces, which may have begun a message."""
        self.around = ""  # written on both sides of a header's first mark, for who has to tell it from a quoted one
        self._spelled = [mark for mark in MARKS if mark not in special]
        self._held = ""
        self._header: str | None = None  # None within a message's text
        self._reasons = False
        self._fresh = True  # the present message has no text yet
        self._shown: set[bool] = set()  # whether there was reasoning, content
        self._between = False  # behind the end of a message
        for text, is_special in prompt:
            self.add(text, is_special)
        # The prompt's own texts, users' messages among them, are no part of the answer.
        self._fresh, self._shown = True, set()

    @property
    def place(self) -> Place:
        """Where the next token stands: behind the author's name, in a header, in a message, or between two."""
        if self._header is not None:
            return "author" if self._header.strip() == AUTHOR else "header"
        if self._between:
            return "between"
        return "reasoning" if self._reasons else "content"

    def add(self, text: str, special: bool) -> Split:
        if special:
            return self._mark(text)
        # Marks that the vocabulary lacks as special tokens are looked for in the text.
        self._held += text
        split = Split()
        while self._spelled and (found := re.search("|".join(map(re.escape, self._spelled)), self._held)):
            before, self._held = self._held[: found.start()], self._held[found.end() :]
            split += self._text(before) + self._mark(found[0])
        cut = len(self._held) - unfinished(self._held, self._spelled)
        text, self._held = self._held[:cut], self._held[cut:]
        return split + self._text(text)

    def flush(self) -> Split:
        text, self._held = self._held, ""
        split = self._text(text)
        # A header that never came to its message: text behind the author's name was meant for the reader.
        if self._header is not None and CHANNEL not in self._header and self._header.startswith(AUTHOR):
            split += self._headless()
        return split

    def _mark(self, mark: str) -> Split:
        self._between = mark in MARKS and mark not in (START, CHANNEL, MESSAGE, "<|constrain|>")
        if mark == START:
            self._header = ""
        elif mark == CHANNEL:
            self._header = (AUTHOR if self._header is None else self._header) + mark
        elif mark == MESSAGE:
            return self._begin() if self._header is not None else Split()
        elif mark == "<|constrain|>":
            if self._header is not None:
                self._header += mark
        elif mark in MARKS:  # an end: what follows without a header is for the reader
            self._header, self._reasons, self._fresh = None, False, True
        return Split()

    def _text(self, text: str) -> Split:
        if not text:
            return Split()
        if self._header is None:
            return self._shows(text)
        self._header += text
        if not self._header.startswith(AUTHOR) or CHANNEL in self._header:
            return Split()
        # Between the author and the channel stands at most a recipient: other text is a message without a header.
        rest = self._header.removeprefix(AUTHOR).lstrip()
        return Split() if "to=".startswith(rest) or rest.startswith("to=") else self._headless()

    def _begin(self) -> Split:
        """Begin the message whose header is complete."""
        assert self._header is not None
        header, self._header, self._fresh = self._header, None, True
        author, _, channel = header.partition(CHANNEL)
        if not author.startswith(AUTHOR) or re.search(r"\bto=", header):
            self._reasons = False
            return self._shows(self.around + START + self.around + header + MESSAGE)
        self._reasons = channel.split(maxsplit=1)[:1] == ["analysis"]
        return Split()

    def _headless(self) -> Split:
        assert self._header is not None
        text, self._header, self._reasons = self._header.removeprefix(AUTHOR), None, False
        return self._shows(text)

    def _shows(self, text: str) -> Split:
        if not text:
            return Split()
        if self._fresh and self._reasons in self._shown:
            text = "\n\n" + text
        self._fresh = False
        self._shown.add(self._reasons)
        return Split(reasoning=text) if self._reasons else Split(text)
