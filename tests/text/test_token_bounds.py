"""The least number of tokens of a text is never more than the number it has, and known where it can be."""

from __future__ import annotations

import json
import sys
import unicodedata
from functools import cache
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from places import TESTS
from tokenizers import AddedToken, models, normalizers, pre_tokenizers

from runner.text.detokenizer import byte_alphabet
from runner.text.token_bounds import _SHRINKS
from runner.text.tokenizer import Tokenizer
from runner.text.tokenizer_backends import JsonBackend
from runner.text.tokenizer_files import TokenizerFiles

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
LONG = "the cat "  # the longest piece
NORMALIZERS: dict[str, Any] = {
    "none": None,
    **{name: getattr(normalizers, name)() for name in ("NFC", "NFD", "NFKC", "NFKD", "Lowercase")},
    "replaced": normalizers.Replace("abc", "x"),
    "several": normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase(), normalizers.Replace("aa", "b")]),
}
UNKNOWN: dict[str, Any] = {
    "deleted": normalizers.Replace("a", ""),
    "by expression": normalizers.Replace(tokenizers.Regex("a+"), "a"),
    "stripped": normalizers.Strip(),
    "accents": normalizers.StripAccents(),
    "one of several": normalizers.Sequence([normalizers.NFC(), normalizers.Strip()]),
}


@cache
def tokenizer_with(kind: str, normalizer: str, strips: bool = False) -> Tokenizer:
    """A vocabulary of single bytes and the one long piece, whose halves merge, with added tokens of 12 bytes."""
    singles = list(byte_alphabet()) if kind == "byte level" else BYTES
    long = LONG.replace(" ", "Ġ" if kind == "byte level" else "▁")
    merges = [(long[:n], long[n]) for n in range(1, len(long))]
    names = dict.fromkeys([*singles, *long, *(long[:n] for n in range(1, len(long) + 1))])
    vocab = {name: index for index, name in enumerate(names)}
    library = tokenizers.Tokenizer(models.BPE(vocab, merges, byte_fallback=kind == "byte fallback"))
    steps = [] if NORMALIZERS[normalizer] is None else [NORMALIZERS[normalizer]]
    if kind == "byte level":
        library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    else:
        steps.append(normalizers.Replace(" ", "▁"))
    if steps:
        library.normalizer = normalizers.Sequence(steps)
    library.add_tokens([AddedToken("<a token日>", lstrip=strips, rstrip=strips, normalized=False)])
    return Tokenizer(JsonBackend(library, TokenizerFiles()), TokenizerFiles())


PARTS = st.sampled_from(
    [LONG, LONG * 3, "a", " ", "   ", "abc", "aaaa", "<a token日>", "가", unicodedata.normalize("NFD", "각"), "Ａ", "𝐀",
     "𝛀\u0314\u0300\u0345", "\u212a", "\u212b\u0301", "\u1fbe\u0308\u0301", "\u1fef", "ﷺ", "日", "😀"]
)  # fmt: skip


@pytest.mark.parametrize("kind", ["byte level", "byte fallback"])
@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("strips", [False, True])
@settings(max_examples=25, deadline=None)
@given(text=st.lists(st.one_of(PARTS, PARTS, st.text(max_size=3)), max_size=12).map("".join))
def test_no_text_has_fewer_tokens(kind: str, normalizer: str, strips: bool, text: str) -> None:
    tokenizer = tokenizer_with(kind, normalizer, strips)
    assert tokenizer.least_tokens(text) <= len(tokenizer.encode(text, add_special_tokens=False))


@pytest.mark.parametrize("name", _SHRINKS)
def test_no_character_shrinks_more_than_is_said(name: str) -> None:
    """Every character alone; and for the composing forms, every composed one spelled in the longest way."""
    if name in ("Prepend", "ByteLevel"):
        return
    longest: dict[str, str] = {}
    for code in range(sys.maxunicode + 1):
        if not 0xD800 <= code < 0xE000:
            character = chr(code)
            normal = character.lower() if name == "Lowercase" else unicodedata.normalize(name, character)
            assert len(character.encode()) <= _SHRINKS[name] * len(normal.encode())
            if len(character.encode()) > len(longest.get(normal, "").encode()):
                longest[normal] = character
    if name not in ("NFC", "NFKC"):
        return
    spelled: dict[str, str] = {}  # the longest way to write a character of a decomposed form
    for normal, character in longest.items():
        full = unicodedata.normalize("NFD", normal)
        if len(full) == 1:
            spelled[full] = character
    for code in range(0xC0, 0x30000):
        if not 0xD800 <= code < 0xE000:
            full = "".join(spelled.get(part, part) for part in unicodedata.normalize("NFD", chr(code)))
            assert len(full.encode()) <= _SHRINKS[name] * len(unicodedata.normalize(name, full).encode()), hex(code)


def test_the_bound_is_exact_for_the_longest_pieces() -> None:
    tokenizer = tokenizer_with("byte level", "none")
    assert tokenizer.least_tokens("<a token日>" * 50) == 50 == len(tokenizer.encode("<a token日>" * 50))
    assert tokenizer.least_tokens("a" * 120) == 10
    assert tokenizer_with("byte level", "NFKC").least_tokens("a" * 480) == 10
    assert tokenizer.least_tokens("") == 0
    # White space beside a token that takes it up counts for nothing.
    assert tokenizer_with("byte level", "none", True).least_tokens(f"<a token日>{' ' * 1000}") == 1


@pytest.mark.parametrize("name", UNKNOWN)
def test_nothing_is_known_where_bytes_may_vanish(name: str) -> None:
    library = tokenizers.Tokenizer(models.BPE({name: i for i, name in enumerate(BYTES)}, [], byte_fallback=True))
    assert over(library).least_tokens("a" * 1000) == 167  # a byte's piece has 6 bytes
    library.normalizer = UNKNOWN[name]
    assert over(library).least_tokens("a" * 1000) == 0


def over(library: tokenizers.Tokenizer) -> Tokenizer:
    return Tokenizer(JsonBackend(library, TokenizerFiles()), TokenizerFiles())


def test_nothing_is_known_where_one_token_stands_for_many_characters() -> None:
    """Unknown characters share a token or are dropped, splits drop what they split at, and words have any length."""
    fused = tokenizers.Tokenizer(models.BPE({"a": 0, "?": 1}, [], unk_token="?", fuse_unk=True))
    assert over(fused).least_tokens("b" * 1000) == 0 < len(over(fused).encode("b" * 1000)) == 1
    assert over(tokenizers.Tokenizer(models.BPE({"a": 0}, []))).least_tokens("b" * 1000) == 0
    assert over(tokenizers.Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))).least_tokens("b" * 1000) == 0
    for splitter in (
        pre_tokenizers.Whitespace(),
        pre_tokenizers.Split(" ", "removed"),
        pre_tokenizers.WhitespaceSplit(),
    ):
        library = tokenizers.Tokenizer(models.BPE({name: i for i, name in enumerate(BYTES)}, [], byte_fallback=True))
        library.pre_tokenizer = splitter
        assert over(library).least_tokens(" " * 1000) == 0


@settings(max_examples=100, deadline=None)
@given(text=st.text("ab\u00e9\U0001f600c", max_size=20))
def test_bytes_without_a_piece_are_not_counted(text: str) -> None:
    """SmolLM2's vocabulary lacks 21 bytes; the library drops them."""
    lacking = {"Ã", "c"}
    vocab = {letter: index for index, letter in enumerate(byte_alphabet()) if letter not in lacking}
    for normalizer in (None, normalizers.NFC()):
        library = tokenizers.Tokenizer(models.BPE(vocab, []))
        library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        if normalizer is not None:
            library.normalizer = normalizer
        tokenizer = over(library)
        assert tokenizer.least_tokens(text) <= len(tokenizer.encode(text))
        assert tokenizer.least_tokens("abc" * 100) == (200 if normalizer is None else 0)


@pytest.mark.parametrize("kind", ["chatml", "llama"])
@settings(max_examples=50, deadline=None)
@given(text=st.text(max_size=60))
def test_the_bound_holds_for_the_fixtures(kind: str, text: str) -> None:
    tokenizer = fixture(kind)
    assert tokenizer.least_tokens(text) <= len(tokenizer.encode(text, add_special_tokens=False))
    assert tokenizer.least_tokens("x" * 1000) > 0 or kind == "llama"


@cache
def fixture(kind: str) -> Tokenizer:
    directory = TESTS / "data" / "tokenizers" / kind
    assert kind == "llama" or "ByteLevel" in json.dumps(json.loads((directory / "tokenizer.json").read_text()))
    return Tokenizer.from_directory(directory)
