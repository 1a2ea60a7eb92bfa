"""Separator for answers that begin with a block of reasoning between two marks."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from enum import Enum, auto

from runner.text.reasoning import BlockFormat, Marks
from runner.text.separator import Split
from runner.text.stop import unfinished


class _State(Enum):
    START = auto()  # nothing but white space so far
    OPENED = auto()  # the same, behind the mark with which the prompt ends
    INSIDE = auto()
    BEHIND = auto()  # nothing but white space since the last block
    CONTENT = auto()


class BlockSeparator:
    """Tells a leading block of reasoning, or several in a row, from the content; marks that come later are content.

    White space at both ends of the reasoning, and between it and the content, is dropped, and so is the name of a
    block; several blocks are joined by an empty line. Text is held back only while it may be such white space or part
    of a mark or name.
    """

    ends: Sequence[str] = ()

    def __init__(self, known: BlockFormat, special: Collection[str] = (), opened: Marks | None = None) -> None:
        """Begin an answer.

        Args:
            special: texts of the special tokens. A mark among them counts only as that token: plain text that spells it
                is a quotation. Other special tokens are left out.
            opened: the block that the prompt has opened already.
        """
        self.blocks = known.blocks  # with which the answer may begin
        self.opened = opened
        self._format = known
        self._spelled = [marks for marks in known.blocks if marks.opening not in special]
        self._special = special
        self._block = opened
        self._state = _State.START
        if opened is not None:  # a special token that only repeats the prompt's is left out like any other
            self._state = _State.INSIDE if opened.opening in special else _State.OPENED
        self._name = ""  # the block's name, while it may still come
        self._wrapper: Marks | None = None
        self._held = ""
        self._trim = opened is not None  # white space at the start of the present part is dropped
        self._between = ""  # what joins the present block to those before

    @classmethod
    def behind(cls, begun: str, known: BlockFormat, special: Collection[str] = ()) -> BlockSeparator:
        """Begin an answer that goes on with the text `begun`, in which marks are texts, special or not."""
        read = cls(known)
        read.add(begun, False)
        result = cls(known, special, read._block)
        # Text that was held back as a possible mark is no part of the answer, and the mark was none.
        result._state = _State.CONTENT if read._block is None and read._held.strip() else read._state
        result._trim, result._between, result._wrapper = read._trim, read._between, read._wrapper
        if result._state == _State.CONTENT:
            result.blocks = ()
        return result

    def add(self, text: str, special: bool) -> Split:
        if special:
            return self._take_special(text)
        self._held += text
        split, before = Split(), None
        # The end of one part may be followed by the start of the next in the same piece.
        while before != self._state:
            before = self._state
            split += self._step()
        return split

    def flush(self) -> Split:
        text, self._held = self._held, ""
        if self._block is not None:
            return self._reasoning(text.rstrip())
        if self._wrapper is not None and text.rstrip().endswith(self._wrapper.closing):
            text = text.rstrip().removesuffix(self._wrapper.closing).rstrip()
        return Split(self._trimmed(text))

    def _step(self) -> Split:
        """Go on with the held text, up to the end of the present state."""
        if self._state in (_State.START, _State.BEHIND):
            return self._lead()
        if self._state == _State.OPENED:
            return self._reopen()
        return self._reason() if self._state == _State.INSIDE else self._content()

    def _take_special(self, token: str) -> Split:
        """Take a special token: a mark if one is due, else nothing."""
        if self._block is not None:
            return self._close(self._held, "") if token == self._block.closing else Split()
        if self._state in (_State.START, _State.BEHIND):
            for marks in self._format.blocks:
                if marks.opening == token and not self._held.strip():
                    self._open(marks, "")
        return Split()

    def _lead(self) -> Split:
        """Look for a block, or behind one for what wraps the content; any other text is content."""
        text = self._held.lstrip()
        wrappers = self._format.wrappers if self._state == _State.BEHIND else ()
        for marks in (*self._spelled, *wrappers):
            if text.startswith(marks.opening):
                if marks in self._spelled:
                    self._open(marks, text[len(marks.opening) :])
                else:
                    self._wrapper, self._held, self._state = marks, text[len(marks.opening) :], _State.CONTENT
                return Split()
        if text and not any(marks.opening.startswith(text) for marks in (*self._spelled, *wrappers)):
            self._state = _State.CONTENT
        return Split()

    def _reopen(self) -> Split:
        """Drop an opening mark that only repeats the one in the prompt, as some models write it."""
        assert self._block is not None
        text, opening = self._held.lstrip(), self._block.opening
        if not opening.startswith(text) or text == opening:
            self._held = text.removeprefix(opening)
            self._state = _State.INSIDE
        return Split()

    def _reason(self) -> Split:
        assert self._block is not None
        if self._name:
            text = self._held.lstrip()
            if text != self._name and self._name.startswith(text):
                return Split()
            self._held, self._name = text.removeprefix(self._name), ""
        closing = [] if self._block.closing in self._special else [self._block.closing]
        for mark in closing:
            if mark in self._held:
                inside, _, rest = self._held.partition(mark)
                return self._close(inside, rest)
        # White space at the end waits too: it is dropped if the block ends behind it.
        shown = self._held[: len(self._held) - unfinished(self._held, closing)].rstrip()
        self._held = self._held[len(shown) :]
        return self._reasoning(shown)

    def _content(self) -> Split:
        shown = self._held
        # The mark that ends the wrapper counts only at the very end, where but white space follows it.
        if self._wrapper is not None:
            closing, bare = self._wrapper.closing, shown.rstrip()
            if bare.endswith(closing):
                shown = bare.removesuffix(closing).rstrip()
            else:
                shown = shown[: len(shown) - unfinished(shown, [closing])].rstrip()
        self._held = self._held[len(shown) :]
        return Split(self._trimmed(shown))

    def _open(self, marks: Marks, rest: str) -> None:
        self._block, self._held, self._trim, self._state = marks, rest, True, _State.INSIDE
        self._name = marks.name

    def _close(self, inside: str, rest: str) -> Split:
        split = self._reasoning(inside.rstrip())
        self._block, self._held, self._trim, self._state = None, rest, True, _State.BEHIND
        self._name = ""
        return split

    def _reasoning(self, text: str) -> Split:
        first, text = self._trim, self._trimmed(text)
        if not text:
            return Split()
        between = self._between if first else ""
        self._between = "\n\n"
        return Split(reasoning=between + text)

    def _trimmed(self, text: str) -> str:
        """Return `text`, at the start of a part without the white space before it."""
        if self._trim:
            text = text.lstrip()
            self._trim = not text
        return text
