"""Chooses the stream that decodes a vocabulary's tokens, from the decoder of its file and from the vocabulary itself.

The two can contradict each other: byte-level pieces (`Ġthe`) under the decoder of a SentencePiece vocabulary, or
SentencePiece pieces (`▁the`, `<0xE2>`) under one that leaves their marks in the text. The vocabulary is what the model
was trained with, so it decides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from runner.text.detokenizer import (
    ByteLevelStream,
    PieceStream,
    TextStep,
    TokenStream,
    WindowStream,
    byte_alphabet,
    metaspace,
    replacement,
    strip_each,
)

MakeStream = Callable[[], TokenStream]
MARK = "▁"
_BYTE_PROBES = ("<0x00>", "<0x0A>", "<0x41>", "<0xE2>", "<0xFF>")


def sentencepiece_stream(strip: bool) -> MakeStream:
    """Maker of streams for a SentencePiece vocabulary; `strip`: its text starts with a space that is none."""
    return lambda: PieceStream(before=[replacement(MARK, " ")], byte_fallback=True, strip_start=int(strip))


def plan_stream(
    spec: Mapping[str, Any] | None,
    pieces: Sequence[str],
    decode_ids: Callable[[Sequence[int]], str],
    decode_tokens: Callable[[Sequence[str]], str],
    prefixed: Callable[[], bool],
) -> MakeStream:
    """Choose the stream of a tokenizer.json.

    Args:
        spec: the section `decoder` of the file.
        pieces: pieces of the vocabulary, without added tokens; a sample will do.
        decode_ids: the library's decoding, for the kinds of decoder that have no stream of their own.
        decode_tokens: the library's decoding of tokens given as text.
        prefixed: whether the tokenizer puts a mark before a text that starts without a space.
    """
    if _is_byte_level(pieces):
        if "Ġ" not in decode_tokens(["a", "Ġa"]):
            return _stream(spec, decode_ids)
        alphabet = byte_alphabet()
        return lambda: ByteLevelStream(alphabet)
    marked, bytewise = _is_sentencepiece(pieces)
    left = (marked and MARK in decode_tokens(["a", f"{MARK}a"])) or (bytewise and decode_tokens(["<0x41>"]) != "A")
    return sentencepiece_stream(prefixed()) if left else _stream(spec, decode_ids)


def _is_byte_level(pieces: Sequence[str]) -> bool:
    """Whether pieces are spelled in the byte alphabet and have its mark for the space.

    A few special tokens among them may be spelled otherwise. In a vocabulary of whole characters, Ġ can be the Maltese
    letter; but such a vocabulary has characters of other scripts, or the mark of SentencePiece.
    """
    alphabet = byte_alphabet().keys()
    others = sum(not alphabet >= set(piece) for piece in pieces)
    return any("Ġ" in piece for piece in pieces) and others * 200 <= len(pieces) and MARK not in pieces


def _is_sentencepiece(pieces: Sequence[str]) -> tuple[bool, bool]:
    """Whether pieces begin with SentencePiece's mark for the space, and whether there is a piece for every byte.

    Pieces that begin with byte-level's mark make both doubtful: then the file's decoder is followed.
    """
    if any(piece.startswith("Ġ") and len(piece) > 1 for piece in pieces):
        return False, False
    return sum(piece.startswith(MARK) for piece in pieces) * 100 >= len(pieces) > 0, set(_BYTE_PROBES) <= set(pieces)


def _stream(spec: Mapping[str, Any] | None, decode: Callable[[Sequence[int]], str]) -> MakeStream:
    """The stream that does what the decoder in the file does."""
    steps = _steps(spec)
    kinds = [step["type"] for step in steps]
    if kinds and kinds[0] == "ByteLevel" and set(kinds[1:]) <= {"Fuse"}:
        alphabet = byte_alphabet()
        return lambda: ByteLevelStream(alphabet)
    arguments = _piece_arguments(steps)
    if arguments is None:
        return lambda: WindowStream(decode)
    return lambda: PieceStream(**vars(arguments))


def _steps(spec: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """The steps of a decoder in order, with nested sequences flattened."""
    if spec is None:
        return []
    if spec["type"] == "Sequence":
        return [inner for step in spec["decoders"] for inner in _steps(step)]
    return [spec]


@dataclass(kw_only=True)
class _PieceArguments:
    """Arguments of a `PieceStream`, collected step by step."""

    before: list[TextStep]
    after: list[TextStep]
    fused: list[TextStep]
    byte_fallback: bool = False
    strip: str = " "
    strip_start: int = 0
    strip_stop: int = 0


def _piece_arguments(steps: Sequence[Mapping[str, Any]]) -> _PieceArguments | None:
    """Arguments of the `PieceStream` that does these steps; None if it can't do them.

    It can do Replace, Metaspace and Strip for each token, then ByteFallback, then Fuse, after which the whole text is
    one token. A Strip of the whole text must be the last step.
    """
    found = _PieceArguments(before=[], after=[], fused=[])
    fused = stripped = False
    for step in steps:
        target = found.fused if fused else found.after if found.byte_fallback else found.before
        # Past the bytes a token comes in parts, and only a pattern of one character can't reach from one to the next.
        whole = target is found.before
        match step:
            case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)} if old and (
                whole or len(old) == 1
            ):
                target.append(replacement(old, new))
            case {"type": "Metaspace", "replacement": str(mark), "prepend_scheme": scheme}:
                target.append(metaspace(mark, drop_first=scheme != "never"))
            case {"type": "Strip", "content": str(character), "start": int(start), "stop": int(stop)} if whole:
                target.append(strip_each(character, start, stop))
            case {"type": "Strip", "content": str(character), "start": int(start), "stop": int(stop)} if fused:
                found.strip, found.strip_start, found.strip_stop = character, start, stop
            case {"type": "ByteFallback"} if whole and not fused:
                found.byte_fallback = True
            case {"type": "Fuse"}:
                fused = True
            case _:
                return None
        if stripped:
            return None
        stripped = fused and step["type"] == "Strip"
    return found if steps else None
