"""From token ids back to text, one id at a time.

What `add` and `flush` return, joined, is `Tokenizer.decode` of the same ids; no piece ends inside a character. Each
kind of decoder has a stream that needs only the token's own string, looked up by id: nothing is rebuilt for an answer.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_WINDOW = 8  # ids of context that a re-decoding stream keeps
_HELD = 16  # ids that it holds back at most, waiting for the end of a character


class TokenStream(Protocol):
    """Turns tokens into text; `finish` gives what was held back and makes the stream as new."""

    def push(self, token_id: int, token: str) -> str: ...
    def finish(self) -> str: ...


class Detokenizer:
    """`add(id) -> str` for each token of an answer, then `flush() -> str` once; afterwards it starts afresh.

    `token_of(id)` is the token's string or None for an id outside the vocabulary, which adds no text, as in `decode`.
    """

    def __init__(self, stream: TokenStream, token_of: Callable[[int], str | None], skip: Container[int]) -> None:
        self._stream = stream
        self._token_of = token_of
        self._skip = skip

    def add(self, token_id: int) -> str:
        """The text that is complete now; "" while a character is incomplete or the token is skipped."""
        if token_id in self._skip:
            return ""
        token = self._token_of(token_id)
        return "" if token is None else self._stream.push(token_id, token)

    def flush(self) -> str:
        """What was held back: an incomplete character becomes U+FFFD."""
        return self._stream.finish()


class ByteLevelStream:
    """GPT-2's byte alphabet: each character of a token stands for one byte (see `byte_alphabet`)."""

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
    """SentencePiece tokens: a mark for the space, `<0xNN>` for a byte, and up to `strip` leading spaces dropped.

    Bytes become text as soon as a character is complete; each byte that belongs to none becomes one U+FFFD.
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
        """The characters that are complete in the pending bytes, at most the last three of which stay pending."""
        text = ""
        while self._pending:
            try:
                whole = self._pending.decode("utf-8")
            except UnicodeDecodeError as error:
                if error.start == 0 and error.reason == "unexpected end of data":
                    break
                good = self._pending[: error.start].decode("utf-8")
                self._pending = self._pending[max(1, error.start) :]
                text += good or REPLACEMENT
            else:
                self._pending = b""
                text += whole
        return text

    def _take_pending(self) -> str:
        text, self._pending = REPLACEMENT * len(self._pending), b""
        return text

    def _emit(self, text: str) -> str:
        if self._unstripped and text:
            kept = text.lstrip(" ")
            dropped = min(self._unstripped, len(text) - len(kept))
            # Only the very start of the text is stripped: stop at its first other character.
            self._unstripped = self._unstripped - dropped if dropped == len(text) else 0
            text = text[dropped:]
        return text


class MetaspaceStream:
    """The Metaspace decoder: the mark is a space, except in the first token where `drop_first` removes it."""

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
    """Any other decoder: decode the last few ids with and without the new one; the difference is the new text."""

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._context: list[int] = []
        self._held: list[int] = []

    def push(self, token_id: int, token: str) -> str:
        self._held.append(token_id)
        text = self._new_text()
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
        self._context = [*self._context, *self._held][-_WINDOW:]
        self._held = []


@dataclass(frozen=True)
class DecoderPlan:
    """Which stream suits a tokenizer, found once when it is loaded.

    `keeps_characters`: in a run of byte tokens that is not all UTF-8 the stream keeps the characters that are whole,
    where the library's decoder gives U+FFFD for every byte of the run; `decode` then follows the stream.
    """

    make: Callable[[], TokenStream]
    keeps_characters: bool = False


def plan_decoder(spec: Mapping[str, Any] | None, decode: Callable[[Sequence[int]], str]) -> DecoderPlan:
    """The stream for tokenizer.json's `decoder` section; `decode` serves the kinds that have none of their own."""
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
    if spec is None:
        return []
    if spec["type"] == "Sequence":
        return [inner for step in spec["decoders"] for inner in _steps(step)]
    return [spec]


def _piece_arguments(
    steps: Sequence[Mapping[str, Any]], kinds: Sequence[str]
) -> tuple[list[tuple[str, str]], bool, int] | None:
    """What `PieceStream` needs, if the steps are Replace*, ByteFallback?, Fuse?, Strip? in this order, else None."""
    replaces = [step for step in steps if step["type"] == "Replace"]
    rest = list(kinds[len(replaces) :])
    if not replaces or list(kinds[: len(replaces)]) != ["Replace"] * len(replaces):
        return None
    if rest not in ([], ["Fuse"], ["ByteFallback"], ["ByteFallback", "Fuse"], ["Fuse", "Strip"],
                    ["ByteFallback", "Fuse", "Strip"]):  # fmt: skip
        return None
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
    """The value of a byte token `<0xNN>`, else None."""
    if len(token) != 6 or not token.startswith("<0x") or token[5] != ">":
        return None
    try:
        return int(token[3:5], 16) if token.isascii() and token[3:5].isalnum() else None
    except ValueError:
        return None


def byte_alphabet() -> dict[str, int]:
    """GPT-2's table (openai/gpt-2, encoder.py): printable Latin-1 bytes are themselves, the others 256, 257, ..."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}
