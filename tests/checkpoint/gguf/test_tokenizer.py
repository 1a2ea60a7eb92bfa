"""Tokenizers inside GGUF files: ids compared with sentencepiece, tokenizers and llama.cpp, and what is refused."""

from __future__ import annotations

import json
import random
import unicodedata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import sentencepiece
from gguf_bytes import substring_vocabulary
from places import TESTS

from runner.checkpoint.gguf.pretokenizers import PRE_TOKENIZERS
from runner.checkpoint.gguf.tokenizer import _merges, tokenizer_files, tokenizer_of, vocabulary_of
from runner.errors import TokenizerError
from runner.text.tokenizer import Tokenizer

SPM = TESTS / "fixtures/llama/llama-spm"
Metadata = dict[str, Any]
USER = {"role": "user", "content": "x"}


def tokenizer(metadata: Metadata, rstrip: tuple[str, ...] | None = None) -> Tokenizer:
    return tokenizer_of(vocabulary_of(metadata), Path("x.gguf"), rstrip)


def keys(**values: Any) -> Metadata:
    return {f"tokenizer.ggml.{name}": value for name, value in values.items()}


def texts(count: int, alphabet: list[str], seed: int) -> list[str]:
    rng = random.Random(seed)
    return ["".join(rng.choices(alphabet, k=rng.randrange(1, 30))) for _ in range(count)]


# --- sentencepiece ----------------------------------------------------------------------------------------------------


def sentencepiece_keys(path: Path = SPM, **changes: Any) -> Metadata:
    """The metadata that llama.cpp's converter makes of a tokenizer.model."""
    library = sentencepiece.SentencePieceProcessor(model_file=str(path / "tokenizer.model"))
    kinds = []
    for index in range(library.get_piece_size()):
        special = 2 if library.is_unknown(index) else 3 if library.is_control(index) else 1
        kinds.append(5 if library.is_unused(index) else 6 if library.is_byte(index) else special)
    pieces = range(len(kinds))
    return keys(
        **{
            "model": "llama",
            "pre": "default",
            "tokens": [library.id_to_piece(index) for index in pieces],
            "scores": np.float32([library.get_score(index) for index in pieces]),
            "token_type": np.int32(kinds),
            "bos_token_id": library.bos_id(),
            "eos_token_id": library.eos_id(),
            "unknown_token_id": library.unk_id(),
            **changes,
        }
    )


def test_ids_are_sentencepieces() -> None:
    library = sentencepiece.SentencePieceProcessor(model_file=str(SPM / "tokenizer.model"))
    found = tokenizer(sentencepiece_keys())
    pieces = [library.id_to_piece(index).replace("▁", " ") for index in range(300, library.get_piece_size())]
    alphabet = [*pieces, *"abcdefghij klmnop\n\t  0123", "é", "中", "😀", "▁", "   "]
    for text in [*texts(2000, alphabet, 1), "", " ", "a", " a", "\n", "  two  spaces "]:
        wanted = library.encode(text)
        assert found.encode(text, add_special_tokens=False) == wanted, text
        assert found.encode(text) == [library.bos_id(), *wanted], text
        assert found.decode(found.encode(text)) == text.replace("▁", " "), text


def test_ids_are_the_references(tmp_path: Path) -> None:
    """Ids equal transformers' for the same tokenizer.model (fixture llama-spm), where it agrees with sentencepiece."""
    data = json.loads((SPM / "expected_text.json").read_text())
    differs = {text for text, _ in data["sentencepiece_differs"]}
    found = tokenizer(sentencepiece_keys())
    rows = [row for row in data["encode"] if row["text"] not in differs and "<" not in row["text"]]
    assert len(rows) > 10
    for row in rows:
        assert found.encode(row["text"]) == row["ids_plain"], row["text"]


def test_scores_decide_and_not_lengths_or_order() -> None:
    """A case by hand: in "▁abc", "bc" scores higher than "ab", so b and c join first although "ab" is listed first."""
    tokens = ["<unk>", "<s>", "▁", "a", "b", "c", "ab", "bc", "abc"]
    scores = np.float32([0, 0, -9, -9, -9, -9, -5, -2, -7])
    kinds = np.int32([2, 3, 1, 1, 1, 1, 1, 1, 1])
    metadata = keys(model="llama", tokens=tokens, scores=scores, token_type=kinds, bos_token_id=1)
    assert tokenizer(metadata).encode("abc") == [1, 2, 8]  # a + bc = abc
    assert tokenizer(metadata).encode("abb") == [1, 2, 6, 4]
    scores[8] = -1
    kinds[8] = 5  # an unused piece is never made
    assert tokenizer({**metadata, "tokenizer.ggml.token_type": kinds}).encode("abc") == [1, 2, 3, 7]
    assert tokenizer({**metadata, "tokenizer.ggml.add_bos_token": False}).encode("abb") == [2, 6, 4]
    no_prefix = {**metadata, "tokenizer.ggml.add_space_prefix": False, "tokenizer.ggml.add_eos_token": True}
    assert tokenizer({**no_prefix, "tokenizer.ggml.eos_token_id": 0}).encode("abb") == [1, 6, 4, 0]


def test_merges_of_the_file_stand_for_scores_in_gemma_4() -> None:
    """The same ids from the merges that the scores make, in their order; and no space before the text by default."""
    scored = sentencepiece_keys()
    document = json.loads(tokenizer_files(vocabulary_of(scored), None)["tokenizer.json"])
    merges = [" ".join(pair) for pair in document["model"]["merges"]]
    given = {key: value for key, value in scored.items() if not key.endswith(("scores", ".pre"))}
    given |= keys(model="gemma4", merges=merges)
    spaced, plain = tokenizer({**given, **keys(add_space_prefix=True)}), tokenizer(given)
    found = tokenizer(scored)
    for text in [*texts(300, [*"abcdefghij klmnop\n\t  0123", "é", "中", "😀"], 4), "", " a", "two\n\n\nlines"]:
        assert spaced.encode(text) == found.encode(text), text
        assert plain.decode(plain.encode(text)) == text
        assert plain.encode(f" {text}")[1:] == found.encode(text)[1:] or not text, text
    with pytest.raises(TokenizerError, match="merges is missing"):
        tokenizer({key: value for key, value in given.items() if not key.endswith("merges")})


def test_user_defined_pieces_match_text_with_its_spaces() -> None:
    tokens = ["<unk>", "<s>", "▁", "a", "▁▁", "▁a"]
    metadata = keys(model="llama", tokens=tokens, scores=np.float32([0, 0, -3, -3, -1, -2]), add_space_prefix=False,
                    token_type=np.int32([2, 3, 1, 1, 4, 1]))  # fmt: skip
    assert tokenizer(metadata).encode("a  a a") == [3, 4, 3, 5]


def test_special_tokens_swallow_spaces_where_the_architecture_says_so() -> None:
    metadata = sentencepiece_keys()
    metadata["tokenizer.ggml.tokens"][-1] = "<|end|>"
    metadata["tokenizer.ggml.token_type"][-1] = 3
    last = len(metadata["tokenizer.ggml.tokens"]) - 1
    plain, strips = tokenizer(metadata), tokenizer(metadata, ("<s>",))
    word = plain.encode("a", add_special_tokens=False)
    assert strips.encode("<|end|>\n\na", add_special_tokens=False, parse_special=True) == [last, *word]
    assert len(plain.encode("<|end|>\n\na", add_special_tokens=False, parse_special=True)) > 1 + len(word)
    bos = metadata["tokenizer.ggml.bos_token_id"]
    assert len(strips.encode("<s>\na", add_special_tokens=False, parse_special=True)) > 2 and bos == 1


# --- byte-level BPE ---------------------------------------------------------------------------------------------------


def bpe_keys(directory: Path, pre: str, **changes: Any) -> Metadata:
    """The metadata that llama.cpp's converter makes of a tokenizer.json."""
    document = json.loads((directory / "tokenizer.json").read_text())
    special = Tokenizer.from_directory(directory).special_tokens
    vocab = dict(document["model"]["vocab"])
    kinds = dict.fromkeys(vocab.values(), 1)
    for token in document["added_tokens"]:
        vocab[token["content"]] = token["id"]
        kinds[token["id"]] = 3 if token["content"] in special else 4
    tokens = sorted(vocab, key=vocab.__getitem__)
    assert [vocab[token] for token in tokens] == list(range(len(tokens)))
    merges = [" ".join(merge) if isinstance(merge, list) else merge for merge in document["model"]["merges"]]
    types = np.int32([kinds[index] for index in range(len(tokens))])
    return keys(**{"model": "gpt2", "pre": pre, "tokens": tokens, "token_type": types, "merges": merges, **changes})


@pytest.mark.parametrize(
    ("directory", "pre"), [("fixtures/llama/llama-gqa", "llama-bpe"), ("data/tokenizers/chatml", "gpt-2")]
)
def test_ids_are_those_of_the_tokenizer_json(directory: str, pre: str) -> None:
    wanted = Tokenizer.from_directory(TESTS / directory)
    found = tokenizer(bpe_keys(TESTS / directory, pre, add_bos_token=False))
    names = [
        name for name in found.special_tokens if name != "<|eot|>"
    ]  # it swallows spaces; GGUF has no word for that
    alphabet = [
        *"the quick brown fox jumps 0123456789",
        "'s",
        "'LL",
        "\n",
        "\n\n",
        "  ",
        "é",
        "中文",
        "😀",
        "...",
        *names,
    ]
    for text in texts(1000, alphabet, 2):
        for special in (False, True):
            ids = wanted.encode(text, add_special_tokens=False, parse_special=special)
            assert found.encode(text, parse_special=special) == ids, text
        assert found.decode(ids) == wanted.decode(ids)
    assert found.special_tokens == wanted.special_tokens


@pytest.mark.parametrize(
    ("pre", "composed"),
    [("qwen2", True), ("qwen35", True), ("command-r", True), ("llama-bpe", False), ("gpt-4o", False)],
)
def test_text_is_composed_where_the_models_own_files_say_so(pre: str, composed: bool) -> None:
    """Qwen's and Cohere's tokenizer.json name NFC: an accent of its own was a token there that they never saw."""
    found = tokenizer(bpe_keys(TESTS / "fixtures/llama/llama-gqa", pre, add_bos_token=False))
    apart, joined = (unicodedata.normalize(form, "né") for form in ("NFD", "NFC"))
    assert (found.encode(apart) == found.encode(joined)) == composed
    assert found.decode(found.encode(apart)) == (joined if composed else apart)


SPLITS: dict[str, Any] = json.loads((TESTS / "data/gguf_pretokenizers.json").read_text())
WORDS = substring_vocabulary(SPLITS["texts"])


@pytest.mark.parametrize("pre", sorted(PRE_TOKENIZERS))
def test_words_are_llama_cpps(pre: str) -> None:
    """Every substring of the texts is a token and every way to join two is a merge, so each token is a whole word;
    `scripts/fixtures/make_gguf_pretokenizers` had llama.cpp cut the same texts."""
    found = tokenizer(keys(model="gpt2", pre=pre, add_bos_token=False, **WORDS))
    for index, text in enumerate(SPLITS["texts"]):
        words = [found.decode([token]) for token in found.encode(text)]
        assert words == SPLITS["words"][pre][index], text
    assert "".join(words) == text


@pytest.mark.parametrize("pre", [None, "", "default"])
def test_without_a_pre_tokenizer_words_are_llama_cpps_default_and_a_note_says_so(pre: str | None) -> None:
    """`make_gguf_pretokenizers` checks that llama.cpp itself cuts the same without the key and under "default"."""
    metadata = {k: v for k, v in keys(model="gpt2", pre=pre, bos_token_id=0, **WORDS).items() if v is not None}
    found = tokenizer(metadata)
    for index, text in enumerate(SPLITS["texts"]):
        assert [found.decode([token]) for token in found.encode(text)] == SPLITS["words"]["default"][index], text
    (note,) = vocabulary_of(metadata).notes
    said = "the pre-tokenizer 'default'" if pre else "no tokenizer.ggml.pre"
    assert said in note and "newer conversion" in note and "\n" not in note


def test_no_note_where_the_file_says_how_text_is_cut() -> None:
    assert vocabulary_of(keys(model="gpt2", pre="qwen2", **WORDS)).notes == ()
    assert vocabulary_of(sentencepiece_keys(pre="default")).notes == ()  # sentencepiece cuts no words beforehand
    assert vocabulary_of({k: v for k, v in sentencepiece_keys().items() if not k.endswith(".pre")}).notes == ()


def test_bos_goes_first_where_the_pre_tokeniser_is_of_that_kind() -> None:
    values = {**WORDS, "model": "gpt2", "bos_token_id": 0}
    assert tokenizer(keys(pre="llama-bpe", **values)).encode("a")[0] == 0
    assert tokenizer(keys(pre="llama-bpe", add_bos_token=False, **values)).encode("a") == tokenizer(
        keys(pre="qwen2", **values)
    ).encode("a")


# --- ends, templates, refusals ----------------------------------------------------------------------------------------


def test_every_end_of_an_answer_is_known(tmp_path: Path) -> None:
    metadata = bpe_keys(
        TESTS / "fixtures/llama/llama-gqa", "llama-bpe", bos_token_id=1, eos_token_id=2, eot_token_id=299
    )
    found = vocabulary_of(metadata)
    by_name = {found.tokens.index(name) for name in ("<|eot_id|>", "<|im_end|>", "<|end_of_text|>")}
    assert found.ends == {2, 299} | by_name
    assert found.config["eos_token_id"] == sorted(found.ends)
    none = {**metadata, "tokenizer.ggml.eos_token_id": 0xFFFFFFFF}
    assert vocabulary_of(none).ends == {299} | by_name


def test_templates_by_name_and_as_files(tmp_path: Path) -> None:
    metadata = sentencepiece_keys()
    metadata |= {"tokenizer.chat_template": "a{{ bos_token }}", "tokenizer.chat_template.rag": "b"}
    assert tokenizer(metadata).chat_templates == ("default", "rag")
    assert tokenizer(metadata).apply_chat_template([USER], tokenize=False) == "a<s>"
    for name, content in tokenizer_files(vocabulary_of(metadata), None).items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    again = Tokenizer.from_directory(tmp_path)
    assert again.chat_templates == ("default", "rag") and again.bos_token_id == 1
    assert again.encode("hello  world") == tokenizer(metadata).encode("hello  world")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "t5"}, "'t5' is not supported; gpt2, llama and gemma4 are"),
        ({"model": None}, "None is not supported"),
        ({"tokens": []}, "tokens is missing"),
        ({"tokens": ["a", "b", "a"], "token_type": np.int32([1, 1, 1])}, "holds 'a' twice"),
        ({"token_type": np.int32([1])}, "token_type is not one number for each of 380 tokens"),
        ({"scores": np.float32([1])}, "scores is not one number for each"),
        ({"scores": None}, "scores is missing"),
        ({"bos_token_id": 380}, "bos_token_id is 380, expected an id below 380"),
        ({"eot_token_id": -2}, "eot_token_id is -2"),
        ({"add_bos_token": 1}, "add_bos_token is 1, expected true or false"),
        ({"remove_extra_whitespaces": True}, "remove_extra_whitespaces is not supported"),
        ({"model": "gpt2", "pre": "whale"}, "'whale' is not known; known: gpt-2"),
        ({"model": "gpt2", "pre": "Default"}, "'Default' is not known"),
        ({"model": "gpt2", "pre": 7}, "7 is not known"),
        ({"model": "gpt2", "pre": ["qwen2"]}, r"\['qwen2'\] is not known"),
        ({"model": "gpt2", "pre": "qwen2"}, "merges is missing"),
        ({"model": "gpt2", "pre": "qwen2", "merges": ["a  b"]}, "'a  b', expected two pieces"),
        ({"model": "gpt2", "pre": "qwen2", "merges": ["zz qq"]}, "'zz qq', expected two pieces"),
    ],
)
def test_what_is_wrong_is_named(changes: dict[str, Any], message: str) -> None:
    metadata = {k: v for k, v in sentencepiece_keys(**changes).items() if v is not None}
    with pytest.raises(TokenizerError, match=message):
        tokenizer(metadata)


def test_long_templates_are_refused() -> None:
    with pytest.raises(TokenizerError, match=r"tokenizer\.chat_template has 600000 characters"):
        vocabulary_of({**sentencepiece_keys(), "tokenizer.chat_template": "x" * 600_000})


def test_long_pieces_are_not_split_into_merges() -> None:
    """Of a stranger's vocabulary of letters, each piece would be split everywhere, and every half be kept."""
    tokens = ["a" * length for length in range(1, 5000)]
    vocabulary: Any = SimpleNamespace(tokens=tokens, types=[1] * len(tokens))
    merges = _merges(vocabulary, np.zeros(len(tokens), np.float32))
    assert len(merges) == 256 * 255 // 2
    assert all(half is tokens[len(half) - 1] for merge in merges for half in merge)
