"""Streamed text equals decoding all ids at once, for every kind of decoder, and what the library decodes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from places import TESTS
from tokenizers import decoders, models

from runner.errors import TokenizerError
from runner.text.detokenizer import Detokenizer, WindowStream, byte_of
from runner.text.tokenizer import Tokenizer
from runner.text.tokenizer_backends import JsonBackend, load_json
from runner.text.tokenizer_files import TokenizerFiles

DATA = TESTS / "data" / "tokenizers"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
PIECES = ["▁", "▁a", "a", "▁the", "s", "▁▁", "é", "日", "😀", "\ufffd", "<0xZZ>", "<0x4", "x▁y", " "]
LLAMA = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
DECODERS = {
    "byte fallback, strip": decoders.Sequence([*LLAMA, decoders.Strip(" ", 1, 0)]),
    "byte fallback, strip three": decoders.Sequence([*LLAMA, decoders.Strip(" ", 3, 0)]),
    "byte fallback": decoders.Sequence(LLAMA),
    "replace": decoders.Sequence([decoders.Replace("▁", " "), decoders.Replace("a", "bb")]),
    "metaspace": decoders.Metaspace(),
    "metaspace, never": decoders.Metaspace(prepend_scheme="never"),
    "byte level": decoders.ByteLevel(),
    "word piece": decoders.WordPiece(prefix="x", cleanup=False),
    "strip each": decoders.Sequence([decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)]),
    "byte fallback, metaspace": decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()]),
    "metaspace, byte fallback": decoders.Sequence([decoders.Metaspace(), decoders.ByteFallback(), decoders.Fuse()]),
    "byte fallback, fuse": decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()]),
    "byte fallback alone": decoders.ByteFallback(),
    "byte fallback, fuse, metaspace": decoders.Sequence(
        [decoders.ByteFallback(), decoders.Fuse(), decoders.Metaspace()]
    ),
    "byte fallback, replace": decoders.Sequence(
        [decoders.ByteFallback(), decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    ),
    "strip letters": decoders.Sequence([*LLAMA, decoders.Strip("a", 2, 0)]),
    "fuse": decoders.Fuse(),
    "byte level, fuse": decoders.Sequence([decoders.ByteLevel(), decoders.Fuse()]),
    "bpe": decoders.BPEDecoder(suffix="the"),
    "ctc": decoders.CTC(pad_token="▁", word_delimiter_token="s", cleanup=False),
    "replaced by expression": decoders.Replace(tokenizers.Regex("▁+"), "_"),
    "byte fallback, then word piece": decoders.Sequence([decoders.ByteFallback(), decoders.WordPiece()]),
    "none": None,
}
# The library's decoder forgets whole characters of a byte run that is not all UTF-8; ours keeps them.
KEEPS = [name for name in DECODERS if "byte fallback" in name] + ["strip letters"]


@cache
def backend_of(name: str) -> tuple[Tokenizer, tokenizers.Tokenizer]:
    """A backend over a word-level tokenizer with the given decoder, and the library's own tokenizer."""
    alphabet = ["Ġ", "Ġa", "Ã", "©", "æ", "Ĺ", "¥", "ð", "Ł", "ĺ", "Ģ"]
    names = list(dict.fromkeys([*BYTES, *PIECES, *alphabet]))
    library = tokenizers.Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="a"))
    if DECODERS[name] is not None:
        library.decoder = DECODERS[name]
    library.add_special_tokens(["<s>", "</s>"])
    library.add_tokens(["<tool call>", "é è", "日本"])
    with TemporaryDirectory() as directory:
        path = Path(directory) / "tokenizer.json"
        library.save(str(path))
        return Tokenizer(JsonBackend(load_json(path), TokenizerFiles()), TokenizerFiles()), library


@cache
def load(kind: str) -> Tokenizer:
    return Tokenizer.from_directory(DATA / kind)


def pieces_of(stream: Detokenizer, ids: Sequence[int]) -> list[str]:
    return [*(stream.add(index) for index in ids), stream.flush()]


def valid_runs(tokens: Sequence[str]) -> bool:
    """Whether every run of byte tokens is UTF-8, or holds no whole character (then both give U+FFFD for each byte)."""
    run = b""
    for token in [*tokens, ""]:
        byte = byte_of(token)
        if byte is not None:
            run += bytes([byte])
            continue
        try:
            run.decode("utf-8")
        except UnicodeDecodeError:
            if run.decode("utf-8", "ignore"):
                return False
        run = b""
    return True


@pytest.mark.parametrize("name", DECODERS)
@settings(max_examples=100, deadline=None)
@given(data=st.data(), skip=st.booleans())
def test_stream_equals_decode_and_the_library(name: str, data: st.DataObject, skip: bool) -> None:
    tokenizer, library = backend_of(name)
    size = tokenizer.vocab_size
    # Often bytes of real characters, so that runs of byte tokens are valid as well as broken.
    character = st.sampled_from("é日😀a\n").map(lambda text: list(text.encode("utf-8")))
    one = st.integers(0, size + 3).map(lambda index: [index])
    parts: list[list[int]] = data.draw(st.lists(st.one_of(one, one, character), max_size=12))
    ids = [index for part in parts for index in part]
    pieces = pieces_of(tokenizer.detokenizer(skip), ids)
    whole = tokenizer.decode(ids, skip)
    assert "".join(pieces) == whole
    tokens = [token for index in ids if not (skip and index >= size - 5 and index < size - 3)
              for token in [library.id_to_token(index)] if token is not None]  # fmt: skip
    # Of a long run of bytes this one sees only the last few, and takes them for a run of their own.
    if name == "byte fallback, then word piece":
        return
    if name not in KEEPS or valid_runs([token.replace("▁", " ") for token in tokens]):
        assert whole == library.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("kind", ["chatml", "llama"])
@settings(max_examples=100, deadline=None)
@given(data=st.data(), text=st.text("ab é日😀<s>\n", max_size=200))
def test_an_answer_goes_on_with_the_text_before_it(kind: str, data: st.DataObject, text: str) -> None:
    """With a stream of its own it lost its first space: "Paris is" and "big" in place of " big"."""
    tokenizer = load(kind)
    ids = tokenizer.encode(text)
    cut = data.draw(st.integers(0, len(ids)))
    before, whole = tokenizer.decode(ids[:cut]), tokenizer.decode(ids)
    if "\ufffd" not in before:  # a prompt may end within a character, which the answer ends
        assert before + "".join(pieces_of(tokenizer.detokenizer(after=ids[:cut]), ids[cut:])) == whole


@pytest.mark.parametrize("kind", ["chatml", "llama"])
@settings(max_examples=100, deadline=None)
@given(data=st.data(), text=st.text(max_size=30))
def test_no_piece_holds_half_a_character(kind: str, data: st.DataObject, text: str) -> None:
    """Text may be cut into tokens anywhere: every piece has whole characters, and U+FFFD only where the text has it."""
    tokenizer = load(kind)
    ids = tokenizer.encode(text, add_special_tokens=False)
    pieces = pieces_of(tokenizer.detokenizer(), ids)
    assert "".join(pieces) == tokenizer.decode(ids)
    assert sum(piece.count("\ufffd") for piece in pieces) == tokenizer.decode(ids).count("\ufffd")
    assert "\ufffd" not in "".join(pieces) or "\ufffd" in text
    cut = data.draw(st.integers(0, len(ids)))
    assert "".join(pieces_of(tokenizer.detokenizer(), ids[:cut])) == tokenizer.decode(ids[:cut])


@pytest.mark.parametrize("kind", ["chatml", "llama"])
def test_characters_wait_for_their_last_byte(kind: str) -> None:
    tokenizer = load(kind)
    ids = tokenizer.encode("👩🏽‍🚀", add_special_tokens=False)
    assert len(ids) > 8
    pieces = [piece for piece in pieces_of(tokenizer.detokenizer(), ids) if piece.strip()]
    assert pieces == ["👩", "🏽", "\u200d", "🚀"]
    stream = tokenizer.detokenizer()
    assert "".join(stream.add(index) for index in ids[:-1]) == "👩🏽‍"
    assert set(stream.flush()) == {"\ufffd"}
    # After `flush` the same object starts afresh, the first space dropped again.
    assert "".join(pieces_of(stream, ids)) == "👩🏽‍🚀"


def test_broken_bytes_by_hand() -> None:
    """Whole characters stay, each other byte becomes one U+FFFD, and no text is held back longer than needed."""
    tokenizer, library = backend_of("byte fallback")
    stream = tokenizer.detokenizer()
    ids = [0xC3, 0xA9, 0xE2, 0x82, 0x41, 0xFF, 0xF0, 0x9F]  # é, two thirds of €, A, no UTF-8, half of an emoji
    assert [stream.add(index) for index in ids] == ["", "é", "", "", "\ufffd\ufffdA", "\ufffd", "", ""]
    assert stream.flush() == "\ufffd\ufffd"
    assert tokenizer.decode(ids) == "é\ufffd\ufffdA\ufffd\ufffd\ufffd"
    assert library.decode(ids) == "\ufffd" * len(ids)


# Decoders that strip the end: the library panics on short and empty tokens, so their twin is a plain function.
STRIPPED: dict[str, tuple[Any, Callable[[list[str]], str]]] = {
    "each": (decoders.Strip("s", 1, 1), lambda tokens: "".join(cut(token, 1, 1) for token in tokens)),
    "each twice": (decoders.Strip("s", 0, 2), lambda tokens: "".join(cut(token, 0, 2) for token in tokens)),
    "whole": (
        decoders.Sequence([decoders.Fuse(), decoders.Strip("s", 1, 1)]), lambda tokens: cut("".join(tokens), 1, 1)
    ),
    "whole, more": (
        decoders.Sequence([decoders.Fuse(), decoders.Strip("s", 2, 3)]), lambda tokens: cut("".join(tokens), 2, 3)
    ),
}  # fmt: skip


def cut(text: str, start: int, stop: int) -> str:
    """`text` without up to so many of the letter s at its ends, one letter at a time."""
    for _ in range(start):
        text = text[1:] if text.startswith("s") else text
    for _ in range(stop):
        text = text[:-1] if text.endswith("s") else text
    return text


@pytest.mark.parametrize("name", STRIPPED)
@settings(max_examples=150, deadline=None)
@given(tokens=st.lists(st.sampled_from(["s", "ss", "a", "sas", "", "as", "é"]), max_size=10))
def test_decoders_that_strip_the_end(name: str, tokens: list[str]) -> None:
    decoder, expected = STRIPPED[name]
    names = ["s", "ss", "a", "sas", "", "as", "é"]
    library = tokenizers.Tokenizer(models.WordLevel({text: index for index, text in enumerate(names)}, unk_token="a"))
    library.decoder = decoder
    tokenizer = Tokenizer(JsonBackend(library, TokenizerFiles()), TokenizerFiles())
    ids = [names.index(token) for token in tokens]
    assert "".join(pieces_of(tokenizer.detokenizer(), ids)) == tokenizer.decode(ids) == expected(tokens)


def test_a_panic_of_the_library_is_named() -> None:
    """Its PanicException is no `Exception`: uncaught, it would leave a stream past every handler."""
    library = tokenizers.Tokenizer(models.WordLevel({"": 0, "a": 1}, unk_token="a"))
    library.decoder = decoders.Sequence([decoders.WordPiece(), decoders.Strip(" ", 0, 1)])
    with pytest.raises(BaseException, match="out of bounds") as panic:
        library.decode([0])
    assert not isinstance(panic.value, Exception)
    tokenizer = Tokenizer(JsonBackend(library, TokenizerFiles()), TokenizerFiles())
    with pytest.raises(TokenizerError, match="while decoding"):
        tokenizer.decode([0])
    with pytest.raises(TokenizerError, match="while decoding"):
        pieces_of(tokenizer.detokenizer(), [0])


def test_an_error_of_the_library_in_encoding_is_named() -> None:
    library = tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="missing"))
    tokenizer = Tokenizer(JsonBackend(library, TokenizerFiles()), TokenizerFiles())
    with pytest.raises(TokenizerError, match="while encoding"):
        tokenizer.encode("b")


def test_only_the_first_space_is_stripped() -> None:
    tokenizer, library = backend_of("byte fallback, strip")
    names = ["</s>", "▁", "▁a", "s", "▁the"]
    ids = [library.token_to_id(name) or 0 for name in names]
    assert pieces_of(tokenizer.detokenizer(), ids) == ["", "", " a", "s", " the", ""]
    assert pieces_of(tokenizer.detokenizer(skip_special_tokens=False), ids)[:3] == ["</s>", " ", " a"]


def test_byte_tokens() -> None:
    assert [byte_of(token) for token in ("<0x00>", "<0xfF>", "<0xG0>", "<0x0>", "<0x000>", "<0x+1>", "<0x٣٣>")] == [
        0, 255, None, None, None, None, None
    ]  # fmt: skip


@pytest.mark.parametrize("name", DECODERS)
def test_one_step_for_each_token(name: str) -> None:
    """The work for a token does not grow with the tokens before it.

    Decoders without a stream of their own decode a few ids again, twice; the others see each token once."""
    tokenizer, library = backend_of(name)
    stream = tokenizer.detokenizer()
    decoded: list[int] = []
    if isinstance(stream._stream, WindowStream):
        assert name in (
            "word piece", "none", "bpe", "ctc", "replaced by expression", "byte fallback, then word piece"
        )  # fmt: skip
        stream._stream = WindowStream(lambda ids: (decoded.append(len(ids)), library.decode(ids))[1])  # type: ignore[func-returns-value]
    for _ in range(300):
        stream.add(library.token_to_id("a") or 0)
    assert len(decoded) <= 2 * 300
    assert max(decoded, default=0) <= 24


@pytest.mark.parametrize("kind", ["chatml", "llama"])
@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=20))
def test_bytes_of_tokens_join_to_the_text_in_the_middle_of_another(kind: str, text: str) -> None:
    tokenizer = load(kind)
    table = tokenizer.token_bytes()
    assert len(table) == tokenizer.vocab_size
    before = tokenizer.encode("a", add_special_tokens=False)
    ids = tokenizer.encode(text, add_special_tokens=False)
    found = tokenizer.decode(before).encode() + b"".join(table[index] for index in ids)
    assert found.decode("utf-8", "replace") == tokenizer.decode([*before, *ids])


@pytest.mark.parametrize("name", ["byte fallback", "byte level", "metaspace, never", "replace", "word piece"])
def test_bytes_of_tokens_under_every_kind_of_stream(name: str) -> None:
    tokenizer, library = backend_of(name)
    table = tokenizer.token_bytes()
    first = library.token_to_id("a")
    for index in range(tokenizer.vocab_size):
        text = tokenizer.decode([first, index], False).removeprefix(tokenizer.decode([first], False))
        if "\ufffd" not in text and text:
            assert table[index].decode() == text, library.id_to_token(index)
