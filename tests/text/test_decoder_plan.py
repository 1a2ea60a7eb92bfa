"""Where a vocabulary and the decoder beside it contradict each other, text is decoded by what the vocabulary is."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from places import TESTS
from tokenizers import decoders, models, normalizers, trainers

from runner.text.tokenizer import Tokenizer
from runner.text.tokenizer_backends import JsonBackend
from runner.text.tokenizer_files import TokenizerFiles

DATA = TESTS / "data" / "tokenizers"
LLAMA = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
TEXTS = ["the cat sat", "the\n\tcat", "Köln 日本 🙂", " two  spaces", ""]
FOREIGN_TO_BYTES = [decoders.Sequence(LLAMA), decoders.Metaspace(), decoders.Fuse(), decoders.WordPiece(), None]
FOREIGN_TO_PIECES = [decoders.ByteLevel(), decoders.Fuse(), decoders.WordPiece(), None]


def over(library: tokenizers.Tokenizer) -> Tokenizer:
    return Tokenizer(JsonBackend(library, TokenizerFiles()), TokenizerFiles())


def streamed(tokenizer: Tokenizer, ids: list[int]) -> str:
    stream = tokenizer.detokenizer()
    return "".join([*(stream.add(index) for index in ids), stream.flush()])


def sentencepiece_like(prefix: bool) -> tokenizers.Tokenizer:
    """A BPE with byte tokens, as Llama's is written in a tokenizer.json."""
    result = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    result.normalizer = normalizers.Sequence(
        [*([normalizers.Prepend("▁")] if prefix else []), normalizers.Replace(" ", "▁")]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))], show_progress=False
    )
    result.train_from_iterator(["the cat sat on the mat \n\t"] * 3, trainer)
    spec = json.loads(result.to_str())
    spec["added_tokens"] = spec["added_tokens"][:1]
    return tokenizers.Tokenizer.from_str(json.dumps(spec))


@pytest.mark.parametrize("decoder", FOREIGN_TO_BYTES)
def test_byte_level_pieces_under_a_foreign_decoder(decoder: Any) -> None:
    library = tokenizers.Tokenizer.from_file(str(DATA / "chatml" / "tokenizer.json"))
    right = over(tokenizers.Tokenizer.from_file(str(DATA / "chatml" / "tokenizer.json")))
    if decoder is None:
        spec = {**json.loads(library.to_str()), "decoder": None}
        library = tokenizers.Tokenizer.from_str(json.dumps(spec))
    else:
        library.decoder = decoder
    tokenizer = over(library)
    for text in TEXTS:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.decode(ids) == streamed(tokenizer, ids) == right.decode(ids) == text


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("decoder", FOREIGN_TO_PIECES)
def test_sentencepiece_pieces_under_a_foreign_decoder(decoder: Any, prefix: bool) -> None:
    library = sentencepiece_like(prefix)
    if decoder is not None:
        library.decoder = decoder
    tokenizer = over(library)
    for text in TEXTS:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.decode(ids) == streamed(tokenizer, ids) == text


def test_byte_tokens_that_a_decoder_would_print() -> None:
    """Metaspace turns the mark into a space, but leaves `<0xE2>` as it is."""
    library = sentencepiece_like(True)
    library.decoder = decoders.Metaspace()
    tokenizer = over(library)
    assert tokenizer.decode(tokenizer.encode("the 日")) == "the 日"


def test_a_small_byte_level_vocabulary() -> None:
    library = tokenizers.Tokenizer(models.WordLevel({"Hello": 0, "Ġworld": 1, "Ċ": 2}, unk_token="Ċ"))
    library.decoder = decoders.Sequence(LLAMA)
    assert over(library).decode([0, 1, 2]) == "Hello world\n"


def test_consistent_and_doubtful_vocabularies_follow_the_file() -> None:
    """A letter that looks like a mark does not make a vocabulary byte-level: Ġ is a letter of Maltese."""
    pieces = ["▁", "▁Ġurdan", "Ġ", "a", "日", "Ċ"]
    library = tokenizers.Tokenizer(
        models.WordLevel({piece: index for index, piece in enumerate(pieces)}, unk_token="a")
    )
    library.decoder = decoders.Metaspace()
    assert over(library).decode([1, 2, 5]) == "ĠurdanĠĊ"
    words = tokenizers.Tokenizer(models.WordLevel({"a": 0, "##b": 1, "c": 2}, unk_token="a"))
    words.decoder = decoders.WordPiece()
    assert over(words).decode([0, 1, 2]) == words.decode([0, 1, 2]) == "ab c"


@pytest.mark.parametrize("kind", ["chatml"])
def test_consistent_files_decode_as_the_library_does(tmp_path: Path, kind: str) -> None:
    library = tokenizers.Tokenizer.from_file(str(DATA / kind / "tokenizer.json"))
    tokenizer = Tokenizer.from_directory(DATA / kind)
    rng = random.Random(3)
    for _ in range(100):
        ids = [rng.randrange(290) for _ in range(rng.randrange(12))]
        assert tokenizer.decode(ids, False) == streamed_all(tokenizer, ids) == library.decode(ids, False)


def streamed_all(tokenizer: Tokenizer, ids: list[int]) -> str:
    stream = tokenizer.detokenizer(skip_special_tokens=False)
    return "".join([*(stream.add(index) for index in ids), stream.flush()])
