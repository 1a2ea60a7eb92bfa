"""Tokenizers built without a tokenizer.json give the ids of a tokenizer.json with the same vocabulary.

`scripts/compare/compare_tokenizers` makes the same comparison on the real files of Llama 3, cl100k and Mistral Nemo;
here a small byte-level BPE is trained with `tokenizers` on this file's own text, with the same result on every machine.
"""

from __future__ import annotations

import base64
import json
import random
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from runner.errors import TokenizerError
from runner.text import tokenizer_rebuilt
from runner.text.detokenizer import byte_alphabet
from runner.text.tokenizer import Tokenizer
from runner.text.tokenizer_rebuilt import LLAMA3

CORPUS = [Path(__file__).read_text(), "Köln, 東京 und 🙂🙃 naïve — don't I'LL we've 1234567  \n\n\t x" * 20]


def trained(pattern: str | None) -> tokenizers.Tokenizer:
    result = tokenizers.Tokenizer(models.BPE())
    whole = pattern is None
    split: Any = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=whole)
    if pattern is not None:
        split = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), split])
    result.pre_tokenizer, result.decoder = split, decoders.ByteLevel()
    alphabet = sorted(byte_alphabet())
    result.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet))
    return result


def texts() -> list[str]:
    rng = random.Random(7)
    pool = [*"abcdefgh ETAOIN\n\t'.,0123456789é日🙂", "don't", " 3.14", "  ", "def test", "\u200d", "import ", "🙃"]
    return ["", " ", *("".join(rng.choices(pool, k=rng.randint(1, 20))) for _ in range(300)), *CORPUS]


def write_config(directory: Path, **values: Any) -> None:
    (directory / "tokenizer_config.json").write_text(json.dumps(values))


def ranks_of(reference: tokenizers.Tokenizer) -> list[bytes]:
    alphabet = byte_alphabet()
    vocab = reference.get_vocab(with_added_tokens=False)
    return [bytes(alphabet[letter] for letter in text) for text in sorted(vocab, key=lambda text: vocab[text])]


def equal(ours: Tokenizer, reference: tokenizers.Tokenizer, first_id: int = 0) -> None:
    for text in texts():
        ids = ours.encode(text, add_special_tokens=False)
        assert [index - first_id for index in ids] == reference.encode(text).ids, text
        assert ours.decode(ids) == text


def test_vocab_and_merges(tmp_path: Path) -> None:
    reference = trained(None)
    reference.model.save(str(tmp_path))
    write_config(
        tmp_path, tokenizer_class="GPT2Tokenizer", bos_token="<|end|>", eos_token="<|end|>", add_bos_token=True
    )
    ours = Tokenizer.from_directory(tmp_path)
    assert ours.kind == "vocab.json + merges.txt"
    equal(ours, reference)
    assert ours.encode("a")[0] == ours.bos_token_id == reference.get_vocab_size()


def test_an_unknown_class_is_refused(tmp_path: Path) -> None:
    trained(None).model.save(str(tmp_path))
    write_config(tmp_path, tokenizer_class="RobertaTokenizer")
    with pytest.raises(TokenizerError, match="RobertaTokenizer"):
        Tokenizer.from_directory(tmp_path)


def test_tiktoken_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = trained(LLAMA3)
    ranks = ranks_of(reference)
    lines = [base64.b64encode(token) + f" {rank}\n".encode() for rank, token in enumerate(ranks)]
    (tmp_path / "tokenizer.model").write_bytes(b"".join(lines))
    bos = {"content": "<|begin|>", "special": True}
    write_config(tmp_path, bos_token="<|begin|>", add_bos_token=True, added_tokens_decoder={str(len(ranks)): bos})
    with pytest.raises(TokenizerError, match=f"vocabulary of {len(ranks)} ranks is not known"):
        Tokenizer.from_directory(tmp_path)
    monkeypatch.setattr(tokenizer_rebuilt, "RANK_PATTERNS", {len(ranks): LLAMA3})
    ours = Tokenizer.from_directory(tmp_path)
    assert ours.kind == "tiktoken"
    equal(ours, reference)
    assert ours.encode("a")[0] == len(ranks)


def tekken(reference: tokenizers.Tokenizer, **changes: Any) -> dict[str, Any]:
    ranks = ranks_of(reference)
    config = {"pattern": LLAMA3, "default_vocab_size": 30 + len(ranks), "default_num_special_tokens": 30}
    extra = [{"rank": len(ranks), "token_bytes": base64.b64encode(b"never used").decode()}]
    vocab = [{"rank": i, "token_bytes": base64.b64encode(token).decode()} for i, token in enumerate(ranks)]
    return {"config": config, "vocab": vocab + extra, **changes}


def test_tekken(tmp_path: Path) -> None:
    reference = trained(LLAMA3)
    (tmp_path / "tekken.json").write_text(json.dumps(tekken(reference)))
    ours = Tokenizer.from_directory(tmp_path)
    assert ours.kind == "tekken.json"
    equal(ours, reference, first_id=30)
    assert ours.special_tokens["[INST]"] == 3 and ours.special_tokens["<SPECIAL_29>"] == 29
    assert ours.encode("a", parse_special=True)[0] == 1
    assert ours.vocab_size == 30 + reference.get_vocab_size()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": {}}, "needs default_vocab_size"),
        ({"config": 5}, "not a tekken file"),
        ({"vocab": [{"token_bytes": "AA=="}, {"token_bytes": "!!"}]}, "is not a token"),
        ({"vocab": [{"token_bytes": "AA=="}, {"token_bytes": "AA=="}]}, "listed twice"),
        ({"special_tokens": ["x"]}, "list of objects"),
        ({"special_tokens": [{"rank": 0, "token_str": None}]}, "has no text"),
    ],
)
def test_damaged_tekken_files_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    (tmp_path / "tekken.json").write_text(json.dumps(tekken(trained(LLAMA3), **changes)))
    with pytest.raises(TokenizerError, match=message):
        Tokenizer.from_directory(tmp_path)


@pytest.mark.parametrize("line", ["IQ== 0\nIg== 7\n", "IQ== 0\n! 1\n", "IQ== 0\nIg==\n"])
def test_damaged_ranks_are_refused(tmp_path: Path, line: str) -> None:
    (tmp_path / "tokenizer.model").write_text(line)
    with pytest.raises(TokenizerError, match=r"tokenizer\.model: .*(line 2|is not a token)"):
        Tokenizer.from_directory(tmp_path)


@pytest.mark.parametrize(("vocab", "merges"), [({"a": -1}, "a b"), ({"a": 0}, "a b c"), ({"a": 0}, "x y"), ([], "a b")])
def test_damaged_vocabularies_are_refused(tmp_path: Path, vocab: Any, merges: str) -> None:
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "merges.txt").write_text(merges)
    with pytest.raises(TokenizerError, match=r"vocab\.json|merges\.txt"):
        Tokenizer.from_directory(tmp_path)


def runs(letters: bytes, longest: int) -> list[bytes]:
    """Every byte, and every run of each of the letters: a token of n bytes splits into two tokens in n - 1 ways."""
    return [bytes([value]) for value in range(256)] + [
        bytes([letter]) * length for letter in letters for length in range(2, longest + 1)
    ]


def written(kind: str, ranks: list[bytes], directory: Path) -> Path:
    """Write the ranks as a tekken.json or as tiktoken's lines."""
    if kind == "tekken":
        config = {"pattern": LLAMA3, "default_vocab_size": len(ranks) + 20, "default_num_special_tokens": 20}
        vocab = [{"rank": i, "token_bytes": base64.b64encode(token).decode()} for i, token in enumerate(ranks)]
        path = directory / "tekken.json"
        path.write_text(json.dumps({"config": config, "vocab": vocab}))
    else:
        path = directory / "tokenizer.model"
        path.write_bytes(b"".join(base64.b64encode(token) + f" {i}\n".encode() for i, token in enumerate(ranks)))
    return path


@pytest.mark.parametrize("kind", ["tekken", "tiktoken"])
def test_memory_for_a_list_of_ranks_is_bounded(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """523,776 merges of up to 1024 characters took a thousand times the memory of their file."""
    ranks = runs(b"a", 1024)
    monkeypatch.setattr(tokenizer_rebuilt, "RANK_PATTERNS", {len(ranks): LLAMA3})
    path = written(kind, ranks, tmp_path)
    tracemalloc.start()
    with pytest.raises(TokenizerError, match="made of each other"):
        Tokenizer.from_directory(tmp_path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20 * path.stat().st_size


@pytest.mark.parametrize("kind", ["tekken", "tiktoken"])
def test_long_runs_of_a_real_vocabulary_are_read(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Llama 3 and o200k have all runs of up to 128 spaces, and of some signs."""
    ranks = runs(b" \n=-", 128)
    monkeypatch.setattr(tokenizer_rebuilt, "RANK_PATTERNS", {len(ranks): LLAMA3})
    written(kind, ranks, tmp_path)
    tokenizer = Tokenizer.from_directory(tmp_path)
    assert len(tokenizer.encode("=" * 128, add_special_tokens=False)) == 1
