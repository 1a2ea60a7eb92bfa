"""How many tokens a text has at least, from its bytes alone, so that a text far too long is refused before it is split.

A token stands for at most as many bytes as the longest piece of the vocabulary has, if every byte of a text ends up in
some token. Where bytes may vanish (normalisers that delete, splits that drop, one token for many unknown characters),
nothing is known, and the bound is 0.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from fractions import Fraction
from typing import Any

import tokenizers
from tokenizers import models

from runner.text.detokenizer import byte_alphabet
from runner.text.special_tokens import AddedToken

_SHRINKS = {"NFC": 4, "NFD": 3, "NFKC": 4, "NFKD": 4, "Lowercase": 3, "Prepend": 1, "ByteLevel": 1}
"""The most bytes that become one byte, rounded up: NFC turns the 7 bytes of U+1FBE U+0308 U+0301 into the 2 of U+0390,
and NFKC the 4 of a mathematical letter into 1. The tests go through all characters."""

_SPLITS = frozenset(["ByteLevel", "Metaspace", "Digits", "UnicodeScripts"])
"""Pre-tokenizers that keep every character; Split and Punctuation may drop what they split at."""


class TokenBound:
    """The least number of tokens of a text; see `least_tokens`."""

    def __init__(self, library: tokenizers.Tokenizer, added: Iterable[AddedToken]) -> None:
        self._width, self._dropped = _widest(library, added := list(added))
        # White space around such a token is part of it, however much there is.
        self._spaces_vanish = any(token.lstrip or token.rstrip for token in added)

    def least_tokens(self, text: str) -> int:
        """Number of tokens that `text` has at least; 0 if nothing is known."""
        if self._width is None:
            return 0
        counted = "".join(text.split()) if self._spaces_vanish else text
        return -(-len(counted.encode("utf-8").translate(None, self._dropped)) // self._width)


def _widest(library: tokenizers.Tokenizer, added: Iterable[AddedToken]) -> tuple[Fraction | None, bytes]:
    """The most bytes of a text that become one token, None if there is no limit; and the bytes that become none."""
    model, normalizer, splitter = library.model, _state(library.normalizer), _state(library.pre_tokenizer)
    shrink = _shrink(normalizer)
    if shrink is None or not _keeps(splitter) or not isinstance(model, models.BPE):
        return None, b""
    byte_level = _has(splitter, "ByteLevel") or _has(normalizer, "ByteLevel")
    # What has no piece of its own is dropped, or shares a token with all of its kind.
    singles = byte_alphabet() if byte_level else {f"<0x{byte:02X}>": byte for byte in range(256)}
    dropped = bytes(byte for single, byte in singles.items() if model.token_to_id(single) is None)
    # SmolLM2 lacks bytes that UTF-8 never has. Which bytes a normalised text has can't be told beforehand.
    if (dropped and not (byte_level and normalizer is None)) or not (byte_level or model.byte_fallback):
        return None, b""
    pieces = library.get_vocab(with_added_tokens=False)
    # In the byte alphabet a letter is a byte.
    widths = map(len, pieces) if byte_level else (len(piece.encode("utf-8")) for piece in pieces)
    contents = (len(token.content.encode("utf-8")) for token in added)
    return shrink * max(1, *widths, *contents), dropped


def _state(part: Any) -> dict[str, Any] | None:
    """A part of the library's tokenizer as it stands in a tokenizer.json."""
    state: dict[str, Any] | None = None if part is None else json.loads(part.__getstate__())
    return state


def _shrink(normalizer: Mapping[str, Any] | None) -> Fraction | None:
    """The most bytes that a normaliser makes one byte of; None if it may delete any number."""
    match normalizer:
        case None:
            return Fraction(1)
        case {"type": "Sequence", "normalizers": steps}:
            result = Fraction(1)
            for step in steps:
                factor = _shrink(step)
                if factor is None:
                    return None
                result *= factor
            return result
        case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)} if new:
            return max(Fraction(1), Fraction(len(old.encode("utf-8")), len(new.encode("utf-8"))))
        case {"type": kind} if kind in _SHRINKS:
            return Fraction(_SHRINKS[kind])
    return None


def _keeps(splitter: Mapping[str, Any] | None) -> bool:
    """Whether a pre-tokenizer keeps every character."""
    match splitter:
        case None:
            return True
        case {"type": "Sequence", "pretokenizers": steps}:
            return all(map(_keeps, steps))
        case {"type": "Split" | "Punctuation", "behavior": behavior}:
            return bool(behavior != "Removed")
        case {"type": kind}:
            return kind in _SPLITS
    return False


def _has(part: Mapping[str, Any] | None, kind: str) -> bool:
    """Whether a part is of this kind, or a step of it is."""
    if part is None:
        return False
    return part["type"] == kind or any(
        _has(step, kind) for step in part.get("pretokenizers", part.get("normalizers", ()))
    )
