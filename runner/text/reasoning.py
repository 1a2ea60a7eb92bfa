"""Reasoning in a block at the start of an answer, as `<think>...</think>`: which marks a model uses.

The marks are read from the chat template, the system message and the vocabulary. A small table has those that no rule
can make out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Marks:
    """The texts before and behind a block, and the name that a model may write first within it."""

    opening: str
    closing: str
    name: str = ""


TABLE = (
    Marks("<think>", "</think>"),
    Marks("<thinking>", "</thinking>"),
    Marks("<thought>", "</thought>"),
    Marks("<seed:think>", "</seed:think>"),
    Marks("[THINK]", "[/THINK]"),
    Marks("<|START_THINKING|>", "<|END_THINKING|>"),
    Marks("<|begin_of_thought|>", "<|end_of_thought|>"),
    Marks("<|inner_prefix|>", "<|inner_suffix|>"),  # Apertus
    Marks("<|channel>", "<channel|>", "thought"),  # Gemma 4
    Marks("Here is my thought process:", "Here is my response:"),  # Granite 3.2
)
"""Marks that are known by one half, or as tokens that are not special, and marks that no rule pairs."""

UNNAMED = Marks("<think>\n", "</think>")
"""For a model whose files name no marks: many are tuned to reason behind a template that does not know it.

With the line break, since an answer *about* `<think>` may begin with the word.
"""

WRAPPERS = (
    Marks("<answer>", "</answer>"),  # Hunyuan
    Marks("<response>", "</response>"),  # Granite 3.3, ERNIE 4.5
    Marks("<|begin_of_solution|>", "<|end_of_solution|>"),
)
"""Marks that some models put around all of the content, if it follows a block of reasoning."""

_MOST = 16
"""Pairs of marks that a model has at most, since each is looked for in every piece of an answer."""

_TAG = re.compile(r"<\|?/?[A-Za-z_][\w:.-]{0,40}\|?>|\[/?[A-Za-z_]{1,40}\]|◁/?\w{1,40}▷")
_WORDS = {"think", "thinking", "thought", "thoughts", "reason", "reasoning", "cot", "scratchpad"}
_AFFIXES = {"begin", "start", "open", "of"}
_ENDS = {"begin": "end", "start": "end", "open": "close"}


@dataclass(frozen=True)
class BlockFormat:
    """How a model marks reasoning: the blocks that it may begin with, and what it may wrap the content in."""

    blocks: Sequence[Marks] = ()
    wrappers: Sequence[Marks] = ()

    def opened(self, text: str) -> Marks | None:
        """The block that `text`, the end of a prompt, has opened and not closed; None if there is none."""
        last = max(self.blocks, key=lambda marks: text.rfind(marks.opening), default=None)
        if last is None or last.opening not in text or last == UNNAMED:
            return None
        return None if last.closing in text[text.rfind(last.opening) + len(last.opening) :] else last


def block_format(named: str, special: Iterable[str], has_token: Callable[[str], bool]) -> BlockFormat:
    """Find out the marks of a model.

    Args:
        named: the texts that tell a model its marks: the chat template, then the system message.
        special: the special tokens' texts.
        has_token: whether a text is one token of the vocabulary.
    """

    def known(marks: Marks) -> bool:
        return (marks.opening in named and marks.closing in named) or (
            has_token(marks.opening) and has_token(marks.closing)
        )

    # A name in brackets says enough alone: DeepSeek's first template only splits messages at `</think>`.
    blocks = [
        marks
        for marks in TABLE
        if known(marks) or (_TAG.fullmatch(marks.opening) and (marks.opening in named or marks.closing in named))
    ]
    # The model's own come first: a system message, which a client writes, may name any number of tags.
    tags = dict.fromkeys([*(text for text in special if _TAG.fullmatch(text)), *_TAG.findall(named)])
    for tag in tags:
        if len(blocks) >= _MOST:
            break
        closing = next((text for text in _closings(tag) if text in tags), None)
        if closing is not None and Marks(tag, closing) not in blocks:
            blocks.append(Marks(tag, closing))
    return BlockFormat(blocks or (UNNAMED,), [marks for marks in WRAPPERS if known(marks)])


def reasoning_key(source: str) -> str | None:
    """Key under which a template reads the reasoning of an earlier message; None if it reads none.

    `thinking` alone is no sign, since it is also the name of variables that turn reasoning on.
    """
    for key in ("reasoning_content", "thinking", "reasoning"):
        if re.search(rf"""\.{key}\b|\[\s*['"]{key}['"]\s*\]|['"]{key}['"]\s+in\b|get\(\s*['"]{key}['"]""", source):
            return key
    return None


def _closings(tag: str) -> list[str]:
    """The texts that may close `tag`, if it is named for reasoning: `<x:think>` -> `</x:think>`, and such."""
    words = re.split(r"[_.-]", tag.strip("<|>[]◁▷").rpartition(":")[2].lower())
    if len([word for word in words if word in _WORDS]) != 1 or set(words) - _WORDS - _AFFIXES:
        return []
    ended = re.sub("begin|start|open", lambda found: _like(found[0], _ENDS[found[0].lower()]), tag, flags=re.I)
    slashed = re.sub(r"^(<\|?|\[|◁)", r"\1/", tag)
    return [text for text in (ended, slashed) if text != tag]


def _like(model: str, word: str) -> str:
    """Return `word` in the case of `model`."""
    return word.upper() if model.isupper() else word.capitalize() if model[0].isupper() else word
