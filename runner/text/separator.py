"""Tells the reasoning of an answer from its content, whatever marks a model puts between the two."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Split:
    """A piece of an answer: text for the reader, and what the model wrote to itself before."""

    content: str = ""
    reasoning: str = ""

    def __add__(self, other: Split) -> Split:
        return Split(self.content + other.content, self.reasoning + other.reasoning)


class Separator(Protocol):
    """Takes the text of one answer piece by piece; `add` and `flush` return what can be told so far.

    A special token comes as a piece of its own, with `special` set. `ends` are the special tokens that end an answer in
    the separator's format, whatever the model's files say.
    """

    ends: Sequence[str]

    def add(self, text: str, special: bool) -> Split: ...
    def flush(self) -> Split: ...


class PlainText:
    """Separator of a text without structure: all is content, and special tokens are left out."""

    ends: Sequence[str] = ()

    def add(self, text: str, special: bool) -> Split:
        return Split() if special else Split(text)

    def flush(self) -> Split:
        return Split()
