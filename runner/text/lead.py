"""What a model may write before the content of its answer, token by token: nothing, or reasoning in its own marks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Self

from runner.errors import UsageError
from runner.text.blocks import BlockSeparator
from runner.text.harmony import CHANNEL, START, HarmonySeparator, Place
from runner.text.separator import Separator
from runner.text.tokenizer import Tokenizer


class Lead:
    """Nothing: the answer is content from its first token on.

    Attributes:
        free: whether any token may come next, but for those that end an answer.
        only: the tokens of which one must come next; empty: there are no such.
        also: tokens that may come next instead of the content's.
    """

    free = False
    only: Sequence[int] = ()
    also: Sequence[int] = ()

    def add(self, token: int) -> bool:
        """Take the token that was picked; false if it is the content's."""
        return False

    def copy(self) -> Self:
        """A second reader at the same place, to go on from in another way."""
        return copy.copy(self)


class BlockLead(Lead):
    """A block of reasoning between two marks, each a token, or none where the prompt has not opened one."""

    def __init__(self, openings: Sequence[int], closing: int, *, opened: bool) -> None:
        self.free = opened
        self.also = () if opened else tuple(openings)
        self._closing = closing

    def add(self, token: int) -> bool:
        if self.free:
            self.free = token != self._closing
            return True
        also, self.also = self.also, ()
        self.free = token in also
        return self.free


class HarmonyLead(Lead):
    """Messages of harmony up to the header of the first that is for the reader."""

    def __init__(
        self, separator: HarmonySeparator, piece: Callable[[int], tuple[str, bool]], channel: int, start: int
    ) -> None:
        """Begin where `separator` is.

        Args:
            piece: the text of a token, and whether it is special.
            channel: the token that begins a channel's name.
            start: the token that begins a message.
        """
        self._separator = copy.deepcopy(separator)
        self._piece = piece
        self._marks = {"author": channel, "between": start}
        self._look()

    def add(self, token: int) -> bool:
        if not self.free and not self.only:
            return False
        self._separator.add(*self._piece(token))
        self._look()
        return True

    def copy(self) -> Self:
        other = copy.copy(self)
        other._separator = copy.deepcopy(self._separator)
        return other

    def _look(self) -> None:
        place: Place = self._separator.place
        self.free = place in ("header", "reasoning")
        self.only = (self._marks[place],) if place in self._marks else ()


def lead_of(separator: Separator, tokenizer: Tokenizer, piece: Callable[[int], tuple[str, bool]]) -> Lead:
    """What may stand before the content in an answer that `separator` takes apart.

    Raises:
        UsageError: where the content begins cannot be told token by token.
    """
    token = tokenizer.token_id
    if isinstance(separator, HarmonySeparator):
        channel, start = token(CHANNEL), token(START)
        if channel is None or start is None:
            raise UsageError(f"{CHANNEL} or {START} is no token of this model: where its answer starts cannot be told")
        return HarmonyLead(separator, piece, channel, start)
    if not isinstance(separator, BlockSeparator):
        return Lead()
    if separator.opened is not None:
        closing = token(separator.opened.closing)
        if closing is None:
            raise UsageError(
                f"the prompt begins a block of reasoning, whose end {separator.opened.closing!r} is no token of this "
                "model: where its answer starts cannot be told; turn the reasoning off"
            )
        return BlockLead((), closing, opened=True)
    pairs = [(token(marks.opening), token(marks.closing)) for marks in separator.blocks]
    known = [(opening, closing) for opening, closing in pairs if opening is not None and closing is not None]
    if len({closing for _, closing in known}) != 1:  # none, or several: the model is held to answer at once
        return Lead()
    return BlockLead([opening for opening, _ in known], known[0][1], opened=False)
