"""Streaming detokenizer: token ids to text, one id at a time.

The pieces that `add` and `flush` return join to `Tokenizer.decode` of the same ids, and no piece ends inside a
character. Each common kind of decoder has a stream that needs only the string of the new token, so a token costs the
same at the end of a long answer as at its start.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Protocol

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_WINDOW = 8  # ids of context that a re-decoding stream keeps
_HELD = 16  # ids that such a stream holds back at most, waiting for the end of a character


class TokenStream(Protocol):
    """Turns tokens into text one by one; `finish` returns the text held back and resets the stream.

    `bytes_of` says what a token adds to the middle of a text, as UTF-8, which may be a part of a character; b"" where
    that cannot be told.
    """

    def push(self, token_id: int, token: str) -> str: ...
    def finish(self) -> str: ...
    def bytes_of(self, token_id: int, token: str) -> bytes: ...


class Detokenizer:
    """Decodes an answer: call `add` for each of its tokens, then `flush` once, after which the next answer can begin.

    `token_of` maps an id to the token's string, or to None outside the vocabulary, where an id adds no text, as in
    `decode`. Ids in `skip` add no text either.
    """

    def __init__(self, stream: TokenStream, token_of: Callable[[int], str | None], skip: Container[int]) -> None:
        self._stream = stream
        self._token_of = token_of
        self._skip = skip

    def add(self, token_id: int) -> str:
        """Return the text that this token completes; "" if a character is still incomplete or the token is skipped."""
        if token_id in self._skip:
            return ""
        token = self._token_of(token_id)
        return "" if token is None else self._stream.push(token_id, token)

    def skipped(self, token_id: int) -> str:
        """Return the vocabulary's text of a token that adds no text because it is in `skip`; "" for any other token."""
        return (self._token_of(token_id) or "") if token_id in self._skip else ""

    def flush(self) -> str:
        """Return the text held back, with U+FFFD for an incomplete character, and start afresh."""
        return self._stream.finish()


class ByteLevelStream:
    """Stream for byte-level BPE: each character of a token stands for one byte (see `byte_alphabet`)."""

    def __init__(self, alphabet: Mapping[str, int]) -> None:
        self._alphabet = alphabet
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int, token: str) -> str:
        return self._decoder.decode(self.bytes_of(token_id, token))

    def bytes_of(self, token_id: int, token: str) -> bytes:
        try:
            return bytes([self._alphabet[character] for character in token])
        except KeyError:  # an added token with characters outside the alphabet stands for its own UTF-8
            return token.encode("utf-8")

    def finish(self) -> str:
        tail = self._decoder.decode(b"", True)
        self._decoder.reset()
        return tail


TextStep = Callable[[str, bool], str]
"""A step for a token's text; the flag says whether the token is the first of the text."""


def replacement(old: str, new: str) -> TextStep:
    """Step that replaces `old` by `new`."""
    return lambda text, first: text.replace(old, new)


def metaspace(mark: str, *, drop_first: bool) -> TextStep:
    """Step that turns the mark into a space or, in the first token with `drop_first`, into nothing."""
    return lambda text, first: text.replace(mark, "" if first and drop_first else " ")


def strip_each(character: str, start: int, stop: int) -> TextStep:
    """Step that drops up to `start` characters at the start of each token and up to `stop` at its end."""
    return lambda text, first: _strip(text, character, start, stop)


def _strip(text: str, character: str, start: int, stop: int) -> str:
    """`text` without up to `start` and `stop` times the character at its ends; the library panics on short texts."""
    left = min(start, len(text) - len(text.lstrip(character)))
    right = min(stop, len(text) - len(text.rstrip(character)))
    return text[left : max(left, len(text) - right)]


class PieceStream:
    """Stream for SentencePiece tokens, in which a mark stands for the space and `<0xNN>` for a byte.

    Bytes become text as soon as a character is complete; each byte that belongs to no character becomes one U+FFFD.

    Args:
        before: steps for the text of each token, before bytes are recognised.
        byte_fallback: whether `<0xNN>` is a byte.
        after: steps for each token after that; those in `fused` take the whole text for one token.
        strip: a character of which up to `strip_start` are dropped at the start of the whole text, and up to
            `strip_stop` at its end.
    """

    def __init__(
        self,
        *,
        before: Sequence[TextStep] = (),
        after: Sequence[TextStep] = (),
        fused: Sequence[TextStep] = (),
        byte_fallback: bool = False,
        strip: str = " ",
        strip_start: int = 0,
        strip_stop: int = 0,
    ) -> None:
        self._before = tuple(before)
        self._after = tuple(after)
        self._fused = tuple(fused)
        self._byte_fallback = byte_fallback
        self._strip, self._strip_start, self._strip_stop = strip, strip_start, strip_stop
        self._reset()

    def _reset(self) -> None:
        self._pending = b""
        self._seen = False  # a token before this one
        self._past_first = False  # a token before this one, where a run of bytes counts as one
        self._unstripped = self._strip_start
        self._held = ""  # characters that the end of the text would drop

    def push(self, token_id: int, token: str) -> str:
        first, self._seen = not self._seen, True
        for step in self._before:
            token = step(token, first)
        byte = byte_of(token) if self._byte_fallback else None
        if byte is not None:
            self._pending += bytes([byte])
            return self._emit(self._finished(self._complete()))
        text = self._finished(self._take_pending())
        # A run of bytes ends here, so this token is not the first if there was one.
        self._past_first = not first
        text += self._finished(token)
        self._past_first = True
        return self._emit(text)

    def finish(self) -> str:
        tail = self._emit(self._finished(self._take_pending()))
        self._reset()
        return tail

    def bytes_of(self, token_id: int, token: str) -> bytes:
        for step in self._before:
            token = step(token, False)
        byte = byte_of(token) if self._byte_fallback else None
        if byte is not None:
            return bytes([byte])
        for step in self._after:
            token = step(token, False)
        for step in self._fused:
            token = step(token, True)
        return token.encode("utf-8")

    def _finished(self, text: str) -> str:
        """`text` after the steps past the bytes."""
        for step in self._after:
            text = step(text, not self._past_first)
        for step in self._fused:
            text = step(text, True)
        return text

    def _complete(self) -> str:
        """Take the complete characters from the pending bytes; at most the last three bytes stay pending."""
        text = ""
        while self._pending:
            try:
                whole = self._pending.decode("utf-8")
            except UnicodeDecodeError as error:
                # Only the start of a character is left: it waits for more bytes.
                if error.start == 0 and error.reason == "unexpected end of data":
                    break
                # Take the text before the error or, if there is none, replace the one byte at the start.
                good = self._pending[: error.start].decode("utf-8")
                self._pending = self._pending[max(1, error.start) :]
                text += good or REPLACEMENT
            else:
                self._pending = b""
                text += whole
        return text

    def _take_pending(self) -> str:
        """Give up on the pending bytes: one U+FFFD for each."""
        text, self._pending = REPLACEMENT * len(self._pending), b""
        return text

    def _emit(self, text: str) -> str:
        """Return `text` without what is dropped at the start of the whole text, holding back what the end may drop."""
        if self._unstripped and text:
            kept = text.lstrip(self._strip)
            dropped = min(self._unstripped, len(text) - len(kept))
            # Only the very start of the text is stripped: stop at its first other character.
            self._unstripped = self._unstripped - dropped if dropped == len(text) else 0
            text = text[dropped:]
        if not self._strip_stop:
            return text
        text = self._held + text
        shown = len(text) - min(self._strip_stop, len(text) - len(text.rstrip(self._strip)))
        self._held = text[shown:]
        return text[:shown]


class WindowStream:
    """Stream for any other decoder: decodes the last few ids with and without the new ones and takes the difference."""

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._context: list[int] = []
        self._held: list[int] = []

    def push(self, token_id: int, token: str) -> str:
        self._held.append(token_id)
        text = self._new_text()
        # U+FFFD at the end can be half a character; after `_HELD` ids it is taken for broken bytes and shown.
        if text.endswith(REPLACEMENT) and len(self._held) < _HELD:
            return ""
        self._settle()
        return text

    def finish(self) -> str:
        text = self._new_text() if self._held else ""
        self._context, self._held = [], []
        return text

    def bytes_of(self, token_id: int, token: str) -> bytes:
        # Behind itself: what comes first may be written otherwise.
        text = self._decode([token_id, token_id]).removeprefix(self._decode([token_id]))
        return b"" if REPLACEMENT in text else text.encode("utf-8")

    def _new_text(self) -> str:
        return self._decode([*self._context, *self._held])[len(self._decode(self._context)) :]

    def _settle(self) -> None:
        """Make the held ids part of the context, of which the last few are kept."""
        self._context = [*self._context, *self._held][-_WINDOW:]
        self._held = []


def byte_of(token: str) -> int | None:
    """Value of a byte token `<0xNN>`; None for any other token."""
    if len(token) != 6 or not token.startswith("<0x") or token[5] != ">":
        return None
    try:
        return int(token[3:5], 16) if token.isascii() and token[3:5].isalnum() else None
    except ValueError:
        return None


def byte_alphabet() -> dict[str, int]:
    """GPT-2's table from character to byte (openai/gpt-2, encoder.py).

    Printable Latin-1 characters stand for their own byte; those from U+0100 on stand for the other bytes in order.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}
