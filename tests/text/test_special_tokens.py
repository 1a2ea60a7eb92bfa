"""A user's text never becomes a special token, whatever a normaliser or a vocabulary makes of it; in linear time."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from places import TESTS
from tokenizers import AddedToken as LibraryToken
from tokenizers import Regex, models, normalizers, pre_tokenizers

from runner.errors import TokenizerError
from runner.text.sentencepiece_backend import SentencePieceBackend
from runner.text.special_tokens import AddedToken, TokenScanner, choose_markers
from runner.text.tokenizer import Tokenizer
from runner.text.tokenizer_backends import JsonBackend
from runner.text.tokenizer_files import TokenizerFiles

DATA = TESTS / "data" / "tokenizers"
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
NORMALIZERS: dict[str, tuple[Any, str]] = {
    "full-width letters": (normalizers.NFKC(), "＜|im_end|＞ ＜｜ｉｍ＿ｅｎｄ｜＞"),
    "capitals": (normalizers.Lowercase(), "<|IM_END|> <|Im_End|>"),
    "replaced": (normalizers.Replace("§", "<|im_end|>"), "§ a§§b"),
    "replaced in part": (normalizers.Replace("§", "|"), "<§im_end|> <|im_end§> <§im_end§>"),
    "prepended": (normalizers.Prepend("<"), "|im_end|> a"),
    "removed": (normalizers.Replace(Regex("[ _]"), ""), "<| im_e nd |>"),
    "accents": (normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()]), "<|ím_énd|>"),
    "control characters": (normalizers.BertNormalizer(lowercase=False), "<|im\u0000_end|>"),
    "stripped": (normalizers.Sequence([normalizers.Strip(), normalizers.Prepend("<|im_")]), "end|> x"),
}


def library_with(normalizer: Any, *, normalized: bool, to: Path) -> Tokenizer:
    """The byte-level fixture with a normaliser, before which or after which its special tokens are matched."""
    spec = json.loads((DATA / "chatml" / "tokenizer.json").read_text(encoding="utf-8"))
    for token in spec["added_tokens"]:
        token["normalized"] = normalized
    library = tokenizers.Tokenizer.from_str(json.dumps(spec))
    library.normalizer = normalizer
    library.save(str(to / "tokenizer.json"))
    return Tokenizer.from_directory(to)


def special_in(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    return [index for index in ids if index in set(tokenizer.special_tokens.values())]


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("name", NORMALIZERS)
def test_what_a_normaliser_makes_of_a_text_is_no_special_token(tmp_path: Path, name: str, normalized: bool) -> None:
    normalizer, content = NORMALIZERS[name]
    tokenizer = library_with(normalizer, normalized=normalized, to=tmp_path)
    start, end = (tokenizer.special_tokens[token] for token in ("<|im_start|>", "<|im_end|>"))
    for text in (content, f"say {content} now", f"{content}<|im_end|>{content}", f"<|pad{content}"):
        ids = tokenizer.apply_chat_template([{"role": "user", "content": text}] * 2, template=TEMPLATE)
        found = special_in(tokenizer, ids)
        # The library misses normalised tokens after which text is prepended to; a user's text adds none all the same.
        harmless = tokenizer.apply_chat_template([{"role": "user", "content": "x"}] * 2, template=TEMPLATE)
        assert found in ([start, end] * 2, special_in(tokenizer, harmless)), text
        assert special_in(tokenizer, tokenizer.encode(text, add_special_tokens=False)) == []


@pytest.mark.parametrize("normalized", [True, False])
@settings(max_examples=60, deadline=None)
@given(text=st.text("＜<|｜>＞imｉ_endEND s", max_size=16))
def test_no_text_becomes_a_special_token_under_compatibility_forms(
    tmp_path_factory: pytest.TempPathFactory, normalized: bool, text: str
) -> None:
    both = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer = library_with(both, normalized=normalized, to=tmp_path_factory.mktemp("t"))
    ids = tokenizer.apply_chat_template([{"role": "user", "content": text}], template=TEMPLATE)
    assert len(special_in(tokenizer, ids)) == 2


def test_the_templates_tokens_equal_the_librarys_where_normalised_ones_are_missed(tmp_path: Path) -> None:
    """Old Llama files match `<s>` after a prepended mark, so only at the start of a text: as transformers does."""
    tokenizer = library_with(normalizers.Prepend("▁"), normalized=True, to=tmp_path)
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    text = "<|im_start|>hello<|im_end|>"
    found = tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], template=TEMPLATE)
    assert found == library.encode(text, add_special_tokens=False).ids


def whole_word_vocabulary() -> Tokenizer:
    """A vocabulary whose special tokens are ordinary pieces too, and which keeps text between spaces whole."""
    pieces = [*"<>/s|abunk", "<unk>", "<s>", "</s>", "<s"]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    library = tokenizers.Tokenizer(models.BPE(vocab, [("<", "s")], ignore_merges=True, unk_token="<unk>"))
    library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    library.add_special_tokens(["<unk>", "<s>", "</s>"])
    return Tokenizer(JsonBackend(library, TokenizerFiles()), TokenizerFiles())


def test_special_tokens_that_are_ordinary_pieces_too() -> None:
    tokenizer = whole_word_vocabulary()
    for text in ("<s>", "a <s> </s> b", "<s><s> <s>", " <s> <unk> </s> " * 500):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert special_in(tokenizer, ids) == [], text[:20]
        assert tokenizer.decode(ids).replace(" ", "") == text.replace(" ", "")
        chat = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], template="<s> {{ messages[0].content }} </s>"
        )
        assert special_in(tokenizer, chat) == [11, 12]
    # What is unknown is still unknown.
    assert tokenizer.encode("a ż b") == [5, 10, 6]


def test_a_special_token_that_is_the_only_piece_for_a_character_is_refused() -> None:
    library = tokenizers.Tokenizer(models.WordLevel({"$": 0, "a": 1, "?": 2}, unk_token="?"))
    library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    library.add_special_tokens([LibraryToken("$")])
    tokenizer = Tokenizer(JsonBackend(library, TokenizerFiles()), TokenizerFiles())
    with pytest.raises(TokenizerError, match=r"'\$'.*special token only"):
        tokenizer.encode("a $ a")


def test_tekken_special_tokens_that_the_pattern_keeps_whole(tmp_path: Path) -> None:
    import base64

    ranks = [bytes([value]) for value in range(256)]
    vocab = [{"rank": rank, "token_bytes": base64.b64encode(token).decode()} for rank, token in enumerate(ranks)]
    config = {"pattern": r"\S+|\s+", "default_vocab_size": 276, "default_num_special_tokens": 20}
    (tmp_path / "tekken.json").write_text(json.dumps({"config": config, "vocab": vocab}))
    tokenizer = Tokenizer.from_directory(tmp_path)
    for text in ("<s>", "a [INST] b", "</s> </s>"):
        assert tokenizer.encode(text, add_special_tokens=False) == [20 + byte for byte in text.encode()]


def test_special_pieces_of_a_sentencepiece_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma's model file has `<start_of_turn>` as a user-defined piece, which the library matches in any text."""
    import io

    import sentencepiece

    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the turn of the start of model", "a turn start"] * 20), model_writer=written,
        vocab_size=60, model_type="bpe", user_defined_symbols=["<start_of_turn>", "<extra>"], hard_vocab_limit=False,
        character_coverage=1.0, byte_fallback=False, minloglevel=2,
    )  # fmt: skip
    (tmp_path / "tokenizer.model").write_bytes(written.getvalue())
    token = {"content": "<start_of_turn>", "special": True}
    tokenizer = Tokenizer.from_directory(tmp_path)
    index = tokenizer._backend.token_id("<start_of_turn>")
    assert index is not None and index in tokenizer.encode("a <start_of_turn> b")  # no file says that it is special
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": {str(index): token}}))
    tokenizer = Tokenizer.from_directory(tmp_path)
    assert isinstance(tokenizer._backend, SentencePieceBackend)
    for text in (
        "a <start_of_turn> b",
        "＜start_of_turn＞",
        "<start_of_turn>" * 3000,
    ):  # NFKC is the model's normaliser
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert index not in ids
        assert "turn" in tokenizer.decode(ids)
        chat = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], template="<start_of_turn>{{ messages[0].content }}"
        )
        assert chat.count(index) == 1
    # Added tokens that are not special are recognised in any text, as ever.
    extra = tokenizer._backend.token_id("<extra>")
    assert extra in tokenizer.encode("a <extra>")


def test_markers_when_all_of_private_use_area_a_is_in_use() -> None:
    private = "".join(map(chr, range(0xF0000, 0xFFFFE)))
    opening, closing = choose_markers(private)
    assert opening != closing and opening not in private and closing not in private
    tokenizer = Tokenizer.from_directory(DATA / "chatml")
    content = f"{private}<|im_end|>"
    assert content in tokenizer.decode(tokenizer.apply_chat_template([{"role": "user", "content": content}]))
    with pytest.raises(TokenizerError, match="none is left"):
        choose_markers(private, "".join(map(chr, range(0x40000, 0xE0000))))


@pytest.mark.parametrize("text", ["<", "<|", "<|im_", "<|im_end|", "<|im_end|>", "|>", "<|reserved_special", " "])
def test_a_million_characters_are_searched_in_linear_time(text: str) -> None:
    """Measured at 0.05 to 1.7 s on one core, 4.4 s on half of one; trying every length at every place took minutes."""
    contents = ["<|im_start|>", "<|im_end|>", *(f"<|reserved_special_token_{n}|>" for n in range(250))]
    contents += [f"<|{'x' * n}|>" for n in range(1, 200)]
    scanner = TokenScanner((AddedToken(content, lstrip=True, rstrip=True), n) for n, content in enumerate(contents))
    content = text * (1_000_000 // len(text))
    markers = choose_markers(content)
    start = time.thread_time()
    scanner.touches([content])
    marked = scanner.unmark(scanner.mark(content, markers), markers)
    assert scanner.find(content, marked) == []
    scanner.find(content)
    assert time.thread_time() - start < 12
