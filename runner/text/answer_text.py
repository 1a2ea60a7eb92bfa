"""The way of one answer from token ids to text: detokenizer, then stop texts, then reasoning apart from content."""

from __future__ import annotations

from collections import deque

from runner.text.detokenizer import Detokenizer
from runner.text.separator import Separator, Split
from runner.text.stop import StopMatcher


class AnswerText:
    """Turns the ids of one answer into content and reasoning: call `add` for each id, then `finish` once.

    Stop texts are searched in all that the model writes: reasoning and the text of special tokens included, in the
    order of the tokens. So `</s>` is found if it is a token, and so is `\\n</s>`, half of which is plain text.
    """

    def __init__(self, detokenizer: Detokenizer, stops: StopMatcher, separator: Separator) -> None:
        self._detokenizer = detokenizer
        self._stops = stops
        self._separator = separator
        self._stopped = False
        # What the stop matcher was given and has not released yet: texts, and whether each is a special token.
        self._waiting: deque[tuple[str, bool]] = deque()
        self._ahead = 0  # characters of the first waiting special token that were released; it is passed on whole

    @property
    def found(self) -> str | None:
        """The stop text that ended the answer; None if none did."""
        return self._stops.found

    def add(self, token_id: int) -> tuple[Split, bool]:
        """Take the next token; return the text that may now be shown, and whether a stop text was found."""
        special = self._detokenizer.skipped(token_id)
        split = self._take(special, True) if special else self._take(self._detokenizer.add(token_id), False)
        return split, self._stopped

    def finish(self) -> tuple[Split, bool]:
        """Return the text held back, once no more tokens come, and whether a stop text was found now or before.

        What follows a stop text is no part of the answer, so only text before it is returned.
        """
        split = Split()
        if not self._stopped:
            split = self._take(self._detokenizer.flush(), False)
        if not self._stopped:
            split += self._release(len(self._stops.flush()))
        return split + self._separator.flush(), self._stopped

    def _take(self, text: str, special: bool) -> Split:
        if not text:
            return Split()
        self._waiting.append((text, special))
        shown, self._stopped = self._stops.add(text)
        return self._release(len(shown))

    def _release(self, count: int) -> Split:
        """Pass the next `count` characters to the separator, special tokens as a whole."""
        split = Split()
        count += self._ahead
        self._ahead = 0
        while count:
            text, special = self._waiting.popleft()
            if special and count < len(text):
                self._waiting.appendleft((text, True))
                self._ahead = count
                break
            if count < len(text):
                self._waiting.appendleft((text[count:], False))
            split += self._separator.add(text[:count], special)
            count -= min(count, len(text))
        return split
