"""Filling in the middle: how a model is asked for what stands between two texts, found from its vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from runner.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Infill:
    """The tokens of one form, as the model cards of those who trained with it spell them.

    Attributes:
        prefix: stands before the text in front.
        suffix: stands before the text behind.
        middle: what the model is to write begins behind it.
        suffix_first: whether the text behind comes before the one in front.
        ends: tokens that end the middle, besides the model's own, where the vocabulary has them.
    """

    prefix: str
    suffix: str
    middle: str
    suffix_first: bool = False
    ends: Sequence[str] = ()

    def prompt(self, before: str, behind: str) -> str:
        """The prompt for what stands between two texts, special tokens spelled."""
        parts = [self.prefix + before, self.suffix + behind]
        return "".join(reversed(parts) if self.suffix_first else parts) + self.middle

    @property
    def marks(self) -> tuple[str, str, str]:
        """The tokens without which there is no such prompt."""
        return self.prefix, self.suffix, self.middle


FORMS = (
    # Qwen 2.5 Coder and its successors, CodeGemma (which ends by file_separator), Granite 4
    Infill(
        "<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>",
        ends=("<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<|file_separator|>"),
    ),
    # StarCoder 1 and 2, Granite Code, Stable Code
    Infill(
        "<fim_prefix>", "<fim_suffix>", "<fim_middle>", ends=("<fim_pad>", "<repo_name>", "<reponame>", "<file_sep>")
    ),
    # DeepSeek Coder and V2: the hole is where the text behind begins
    Infill("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
    # Seed-Coder
    Infill("<[fim-prefix]>", "<[fim-suffix]>", "<[fim-middle]>", suffix_first=True),
)  # fmt: skip
"""What is known. Code Llama's and Codestral's are not: their tokenizers put a space before a text behind a mark."""


def infill_of(tokenizer: Tokenizer) -> Infill | None:
    """The form whose marks are single tokens of the vocabulary; None: the model was made for no form that is known."""
    return next((form for form in FORMS if all(one_token(tokenizer, mark) is not None for mark in form.marks)), None)


def one_token(tokenizer: Tokenizer, text: str) -> int | None:
    """The id of an added token, as which its text is read wherever it stands; None where it is none."""
    if (found := tokenizer.token_id(text)) is None:
        return None
    return found if tokenizer.encode(text, add_special_tokens=False, parse_special=True) == [found] else None
