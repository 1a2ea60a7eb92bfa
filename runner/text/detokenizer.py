"""Streaming detokenizer: token ids to text, one id at a time.

The pieces that `add` and `flush` return join to `Tokenizer.decode` of the same ids, and no piece ends inside a
character. Each common kind of decoder has a stream that needs only the string of the new token, so a token costs the
same at the end of a long answer as at its start.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_WINDOW = 8  # ids of context that a re-decoding stream keeps
_HELD = 16  # ids that such a stream holds back at most, waiting for the end of a character


class TokenStream(Protocol):
    """Turns tokens into text one by one; `finish` returns the text held back and resets the stream."""

    def push(self, token_id: int, token: str) -> str: ...
    def finish(self) -> str: ...


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
        try:
            data = bytes([self._alphabet[character] for character in token])
        except KeyError:  # an added token with characters outside the alphabet stands for its own UTF-8
            data = token.encode("utf-8")
        return self._decoder.decode(data)

    def finish(self) -> str:
        tail = self._decoder.decode(b"", True)
        self._decoder.reset()
        return tail


class PieceStream:
    """Stream for SentencePiece tokens, in which a mark stands for the space and `<0xNN>` for a byte.

    `replacements` turn the mark into a space; up to `strip` spaces at the start of the text are dropped. Bytes become
    text as soon as a character is complete; each byte that belongs to no character becomes one U+FFFD.
    """

    def __init__(self, replacements: Sequence[tuple[str, str]], *, byte_fallback: bool, strip: int) -> None:
        self._replacements = tuple(replacements)
        self._byte_fallback = byte_fallback
        self._strip = strip
        self._unstripped = strip
        self._pending = b""

    def push(self, token_id: int, token: str) -> str:
        for old, new in self._replacements:
            token = token.replace(old, new)
        byte = byte_of(token) if self._byte_fallback else None
        if byte is None:
            return self._emit(self._take_pending() + token)
        self._pending += bytes([byte])
        return self._emit(self._complete())

    def finish(self) -> str:
        tail = self._emit(self._take_pending())
        self._unstripped = self._strip
        return tail

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
        """Return `text`, at the start of the answer without the spaces that are to be dropped."""
        if self._unstripped and text:
            kept = text.lstrip(" ")
            dropped = min(self._unstripped, len(text) - len(kept))
            # Only the very start of the text is stripped: stop at its first other character.
            self._unstripped = self._unstripped - dropped if dropped == len(text) else 0
            text = text[dropped:]
        return text


class MetaspaceStream:
    """Stream for the Metaspace decoder: the mark becomes a space or, in the first token with `drop_first`, nothing."""

    def __init__(self, mark: str, *, drop_first: bool) -> None:
        self._mark = mark
        self._drop_first = drop_first
        self._first = True

    def push(self, token_id: int, token: str) -> str:
        space = "" if self._first and self._drop_first else " "
        self._first = False
        return token.replace(self._mark, space)

    def finish(self) -> str:
        self._first = True
        return ""


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

    def _new_text(self) -> str:
        return self._decode([*self._context, *self._held])[len(self._decode(self._context)) :]

    def _settle(self) -> None:
        """Make the held ids part of the context, of which the last few are kept."""
        self._context = [*self._context, *self._held][-_WINDOW:]
        self._held = []


@dataclass(frozen=True)
class DecoderPlan:
    """The kind of stream that suits a tokenizer, found once when the tokenizer is loaded."""

    make: Callable[[], TokenStream]
    """Makes a new stream."""
    keeps_characters: bool = False
    """Whether the stream keeps whole characters in a run of byte tokens that is not all UTF-8.

    The library's decoder gives U+FFFD for every byte of such a run; `decode` then follows the stream.
    """


def plan_decoder(spec: Mapping[str, Any] | None, decode: Callable[[Sequence[int]], str]) -> DecoderPlan:
    """Choose the stream for `spec`, the `decoder` section of a tokenizer.json.

    `decode` is the library's own decoding, for the kinds of decoder that have no stream of their own.
    """
    steps = _steps(spec)
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        alphabet = byte_alphabet()
        return DecoderPlan(lambda: ByteLevelStream(alphabet))
    if kinds == ["Metaspace"]:
        mark, drop = steps[0]["replacement"], steps[0]["prepend_scheme"] != "never"
        return DecoderPlan(lambda: MetaspaceStream(mark, drop_first=drop))
    if (arguments := _piece_arguments(steps, kinds)) is not None:
        replacements, byte_fallback, strip = arguments
        return DecoderPlan(
            lambda: PieceStream(replacements, byte_fallback=byte_fallback, strip=strip), keeps_characters=byte_fallback
        )
    return DecoderPlan(lambda: WindowStream(decode))


def _steps(spec: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """The steps of a decoder in order, with nested sequences flattened."""
    if spec is None:
        return []
    if spec["type"] == "Sequence":
        return [inner for step in spec["decoders"] for inner in _steps(step)]
    return [spec]


def _piece_arguments(
    steps: Sequence[Mapping[str, Any]], kinds: Sequence[str]
) -> tuple[list[tuple[str, str]], bool, int] | None:
    """Arguments of `PieceStream` (replacements, byte fallback, strip); None if it cannot do what the steps do.

    The steps must be Replace (once or more), then ByteFallback, Fuse and Strip, of which each may be missing; Strip
    needs Fuse before it, since it would otherwise strip every token.
    """
    replaces = [step for step in steps if step["type"] == "Replace"]
    rest = list(kinds[len(replaces) :])
    if not replaces or list(kinds[: len(replaces)]) != ["Replace"] * len(replaces):
        return None
    if rest not in ([], ["Fuse"], ["ByteFallback"], ["ByteFallback", "Fuse"], ["Fuse", "Strip"],
                    ["ByteFallback", "Fuse", "Strip"]):  # fmt: skip
        return None
    # `PieceStream` replaces plain strings only, and strips only spaces and only at the start of the text.
    if not all(step["pattern"].get("String") for step in replaces):
        return None
    strip = 0
    if rest[-1:] == ["Strip"]:
        if steps[-1]["content"] != " " or steps[-1]["stop"] != 0:
            return None
        strip = steps[-1]["start"]
    pairs = [(step["pattern"]["String"], step["content"]) for step in replaces]
    return pairs, "ByteFallback" in rest, strip


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
