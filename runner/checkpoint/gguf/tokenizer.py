"""The tokenizer inside a GGUF file, turned into the `tokenizer.json` and `tokenizer_config.json` of a hub repository.

The supported architectures use three kinds. `gpt2`: byte-level BPE with merges, which `tokenizer.ggml.pre` tells how to
cut text into words. `llama`: sentencepiece BPE, where scores rank the pieces. `gemma4`: the same with merges instead of
scores. Sentencepiece's unigram models are another kind (`t5`), which no supported architecture uses and which is
refused.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from runner.checkpoint.gguf.container import brief
from runner.checkpoint.gguf.pretokenizers import PRE_TOKENIZERS, PreTokenizer
from runner.errors import TokenizerError
from runner.local_files import quoted
from runner.text.template_files import bounded_template
from runner.text.tokenizer import Tokenizer
from runner.text.tokenizer_backends import JsonBackend, parse_json
from runner.text.tokenizer_files import TokenizerFiles

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_SPACE = "\u2581"
_NO_ID = (-1, 0xFFFFFFFF)  # what some converters write as the id of a token that does not exist
_MAX_PIECE = 256  # longer pieces are not split into merges: none exists, and the work grows with the square
_NAMED = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding", "sep": "seperator", "mask": "mask"}

ENDS = frozenset(
    [
        "<|eot_id|>",
        "<|im_end|>",
        "<|end|>",
        "<|return|>",
        "<|call|>",
        "<end_of_turn>",
        "<turn|>",
        "<|endoftext|>",
        "<|eom_id|>",
        "<EOT>",
        "<|end_of_text|>",
        "<end_of_utterance>",
        "</s>",
        "<eos>",
        "<｜end▁of▁sentence｜>",
    ]
)
"""Tokens that end an answer wherever they are control tokens: many files name only one of two such tokens."""


@dataclass(frozen=True)
class Vocabulary:
    """The metadata `tokenizer.ggml.*`, checked: as many types as tokens, no token twice, ids within the vocabulary.

    Attributes:
        kind: "gpt2", "llama" or "gemma4".
        tokens: text of each token, by id.
        types: llama.cpp's type of each token (normal, control, byte, ...), by id.
        values: every key below `tokenizer.ggml.`.
        ids: ids of bos, eos, unk, pad, sep and mask, where the file names them.
        ends: every id that ends an answer.
        templates: chat templates by name.
    """

    kind: str
    tokens: list[str]
    types: list[int]
    values: Mapping[str, Any]
    ids: Mapping[str, int]
    ends: frozenset[int]
    templates: Mapping[str, str]

    @property
    def config(self) -> dict[str, Any]:
        """The token ids that config.json and generation_config.json hold."""
        found: dict[str, Any] = {f"{name}_token_id": self.ids[name] for name in ("bos", "pad") if name in self.ids}
        if self.ends:
            found["eos_token_id"] = min(self.ends) if len(self.ends) == 1 else sorted(self.ends)
        return found

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences for the user about what is a guess; none for most files."""
        if self.kind != "gpt2" or not _is_default(self.values.get("pre")):
            return ()
        said = "names the pre-tokenizer 'default'" if self.values.get("pre") else "has no tokenizer.ggml.pre"
        return (
            f"GGUF: the file {said}, so text is cut into words by llama.cpp's default, which may not be how the model "
            "was trained and can make answers worse; a newer conversion names the model's own",
        )

    @property
    def named(self) -> dict[str, str]:
        """Text of the named tokens, by their keys in tokenizer_config.json (`bos_token`, ...)."""
        return {f"{name}_token": self.tokens[index] for name, index in self.ids.items()}


def vocabulary_of(metadata: Mapping[str, Any]) -> Vocabulary:
    """Read and check the vocabulary in a file's metadata.

    Raises:
        TokenizerError: the kind of tokenizer is not supported, or its lists do not fit each other.
    """
    prefix = "tokenizer.ggml."
    values = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
    kind = values.get("model")
    if not isinstance(kind, str) or kind not in ("gpt2", "llama", "gemma4"):
        raise TokenizerError(f"GGUF: tokenizer {brief(kind)} is not supported; gpt2, llama and gemma4 are")
    tokens = values.get("tokens")
    if not isinstance(tokens, list) or not tokens:
        raise TokenizerError("GGUF: tokenizer.ggml.tokens is missing or not a list of strings")
    # Files without types have only normal tokens.
    types = _numbers(values, "token_type", len(tokens), "iu")
    kinds = [_NORMAL] * len(tokens) if types is None else types.tolist()
    if kind == "llama":
        # User-defined pieces are matched in the raw text, which has spaces where the vocabulary writes "▁".
        tokens = [t.replace(_SPACE, " ") if k == _USER_DEFINED else t for t, k in zip(tokens, kinds, strict=True)]
    if len(set(tokens)) != len(tokens):
        twice = Counter(tokens).most_common(1)[0][0]
        raise TokenizerError(f"GGUF: tokenizer.ggml.tokens holds {quoted(twice)} twice")
    ids = {name: _id(values, f"{key}_token_id", len(tokens)) for name, key in _NAMED.items()}
    # The named ends, and every well-known end token: many files name only one of the two that their model writes.
    ends = [_id(values, f"{name}_token_id", len(tokens)) for name in ("eos", "eot", "eom")]
    if not ENDS.isdisjoint(tokens):
        ends += [index for index, token in enumerate(tokens) if token in ENDS and kinds[index] == _CONTROL]
    return Vocabulary(
        kind,
        tokens,
        kinds,
        values,
        {name: index for name, index in ids.items() if index is not None},
        frozenset(index for index in ends if index is not None),
        _templates(metadata),
    )


def _numbers(values: Mapping[str, Any], key: str, count: int, kinds: str) -> Any:
    """The array of `count` numbers under a key, None where it is missing; `kinds`: allowed NumPy kinds, as "iu"."""
    found = values.get(key)
    if found is None:
        return None
    if not isinstance(found, np.ndarray) or found.dtype.kind not in kinds or len(found) != count:
        raise TokenizerError(f"GGUF: tokenizer.ggml.{key} is not one number for each of {count} tokens")
    return found


def _id(values: Mapping[str, Any], key: str, count: int) -> int | None:
    """The token id under a key, None where the file has none."""
    index = values.get(key)
    if index is None:
        return None
    if not isinstance(index, int) or isinstance(index, bool) or not (0 <= index < count or index in _NO_ID):
        raise TokenizerError(f"GGUF: tokenizer.ggml.{key} is {brief(index)}, expected an id below {count}")
    return index if 0 <= index < count else None


def _flag(values: Mapping[str, Any], key: str, default: bool) -> bool:
    """The boolean under a key, `default` where it is missing."""
    value = values.get(key, default)
    if not isinstance(value, bool):
        raise TokenizerError(f"GGUF: tokenizer.ggml.{key} is {brief(value)}, expected true or false")
    return value


def _templates(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Chat templates by name: `tokenizer.chat_template` as "default", `tokenizer.chat_template.NAME` as NAME."""
    prefix = "tokenizer.chat_template"
    found: dict[str, str] = {}
    for key, value in metadata.items():
        if key == prefix or key.startswith(f"{prefix}."):
            if not isinstance(value, str):
                raise TokenizerError(f"GGUF: {quoted(key)} is not text")
            if value.strip():
                found[key.removeprefix(prefix).removeprefix(".") or "default"] = bounded_template(value, f"GGUF: {key}")
    return found


def tokenizer_of(vocabulary: Vocabulary, where: Path, rstrip: tuple[str, ...] | None) -> Tokenizer:
    """Build the tokenizer of a vocabulary.

    Args:
        where: the file, with which error messages begin.
        rstrip: see `Architecture`.

    Raises:
        TokenizerError: scores, merges or the pre-tokenizer are missing, malformed or unknown.
    """
    library = parse_json(json.dumps(document_of(vocabulary, rstrip), ensure_ascii=False), str(where))
    files = TokenizerFiles(named=vocabulary.named, templates=vocabulary.templates)
    return Tokenizer(JsonBackend(library, files, f"gguf {vocabulary.kind}"), files)


def tokenizer_files(vocabulary: Vocabulary, rstrip: tuple[str, ...] | None) -> dict[str, str]:
    """Contents of `tokenizer.json` and `tokenizer_config.json`, by name.

    Raises:
        TokenizerError: for the same reasons as in `tokenizer_of`.
    """
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **vocabulary.named,
    }
    if list(vocabulary.templates) == ["default"]:
        config["chat_template"] = vocabulary.templates["default"]
    elif vocabulary.templates:
        config["chat_template"] = [{"name": k, "template": v} for k, v in vocabulary.templates.items()]
    document = document_of(vocabulary, rstrip)
    # As libraries write them today; here, they are read from single texts in half the time.
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in document["model"]["merges"]]
    document["model"] = {**document["model"], "merges": merges}
    return {
        "tokenizer.json": json.dumps(document, ensure_ascii=False),
        "tokenizer_config.json": json.dumps(config, ensure_ascii=False, indent=2),
    }


# --- tokenizer.json ---------------------------------------------------------------------------------------------------


def document_of(vocabulary: Vocabulary, rstrip: tuple[str, ...] | None) -> dict[str, Any]:
    """The contents of `tokenizer.json`; `rstrip`: see `Architecture`."""
    parts, bos = _gpt2(vocabulary) if vocabulary.kind == "gpt2" else _sentencepiece(vocabulary)
    # Named tokens and ends of an answer are special whatever their type, as are control and unknown tokens.
    named = set(vocabulary.ids.values()) | vocabulary.ends
    added = []
    for index, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True)):
        special = kind in (_CONTROL, _UNKNOWN) or index in named
        if token and (special or kind == _USER_DEFINED):
            # Only tokens in `added_tokens` are matched before BPE; in some families they take the spaces after them.
            strips = special and rstrip is not None and vocabulary.kind == "llama" and token not in rstrip
            added.append(
                {
                    "id": index,
                    "content": token,
                    "single_word": False,
                    "lstrip": False,
                    "rstrip": strips,
                    "normalized": False,
                    "special": special,
                }
            )
    # BOS and EOS are added around each text where the file, or else the kind of tokenizer, says so.
    first = (
        [vocabulary.ids["bos"]] if "bos" in vocabulary.ids and _flag(vocabulary.values, "add_bos_token", bos) else []
    )
    last = (
        [vocabulary.ids["eos"]] if "eos" in vocabulary.ids and _flag(vocabulary.values, "add_eos_token", False) else []
    )
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "post_processor": _around(vocabulary.tokens, first, last) if first or last else None,
        **parts,
    }


def _around(tokens: Sequence[str], first: list[int], last: list[int]) -> dict[str, Any]:
    """The post-processor that puts the tokens `first` before and `last` after each text."""

    def single(sequence: str, kind: int) -> list[dict[str, Any]]:
        before = [{"SpecialToken": {"id": tokens[index], "type_id": kind}} for index in first]
        after = [{"SpecialToken": {"id": tokens[index], "type_id": kind}} for index in last]
        return [*before, {"Sequence": {"id": sequence, "type_id": kind}}, *after]

    return {
        "type": "TemplateProcessing",
        "single": single("A", 0),
        "pair": [*single("A", 0), *single("B", 1)],
        "special_tokens": {
            tokens[index]: {"id": tokens[index], "ids": [index], "tokens": [tokens[index]]} for index in [*first, *last]
        },
    }


def _bpe(vocabulary: Vocabulary, merges: list[str] | list[list[str]], **options: Any) -> dict[str, Any]:
    """The BPE model of `tokenizer.json`, with `options` in place of the defaults; merges as "left right" or pairs."""
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        **options,
        "vocab": {token: index for index, token in enumerate(vocabulary.tokens)},
        "merges": merges,
    }


def _byte_level(use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _cut(pre: PreTokenizer) -> dict[str, Any]:
    """The `pre_tokenizer` that cuts text into words by the patterns in turn, then maps bytes to letters."""
    splits = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        for pattern in pre.patterns
    ]
    return {"type": "Sequence", "pretokenizers": [*splits, _byte_level(False)]}


def _is_default(pre: object) -> bool:
    """Whether llama.cpp takes its default pre-tokenizer: for files from before May 2024, and where a file says so."""
    return pre is None or (isinstance(pre, str) and pre in ("", "default"))


def _gpt2(vocabulary: Vocabulary) -> tuple[dict[str, Any], bool]:
    """The parts of `tokenizer.json` for byte-level BPE, and whether BOS is added by default."""
    pre = vocabulary.values.get("pre")
    pre = "default" if _is_default(pre) else pre
    if not isinstance(pre, str) or pre not in PRE_TOKENIZERS:
        raise TokenizerError(f"GGUF: pre-tokenizer {brief(pre)} is not known; known: {', '.join(PRE_TOKENIZERS)}")
    merges = _stored_merges(vocabulary)
    table = PRE_TOKENIZERS[pre]
    parts = {
        "normalizer": {"type": "NFC"} if table.composed else None,
        "pre_tokenizer": _cut(table),
        "decoder": _byte_level(True),
        "model": _bpe(vocabulary, merges, ignore_merges=table.ignore_merges),
    }
    return parts, table.bos


def _stored_merges(vocabulary: Vocabulary) -> list[str]:
    """The merges in the file: each is "left right", and the two joined must be a token."""
    merges, known = vocabulary.values.get("merges"), set(vocabulary.tokens)
    if not isinstance(merges, list):
        raise TokenizerError("GGUF: tokenizer.ggml.merges is missing or not a list of strings")
    wrong = next((m for m in merges if m.count(" ") != 1 or m.replace(" ", "") not in known), None)
    if wrong is not None:
        raise TokenizerError(
            f"GGUF: tokenizer.ggml.merges holds {quoted(wrong)}, expected two pieces that make a token"
        )
    return merges


def _sentencepiece(vocabulary: Vocabulary) -> tuple[dict[str, Any], bool]:
    """The parts of `tokenizer.json` for sentencepiece BPE, and whether BOS is added by default.

    Sentencepiece joins the adjacent pair whose joined piece has the highest score: BPE with merges sorted by score,
    which files of Gemma 4 hold themselves.
    """
    merges: list[str] | list[list[str]]
    if vocabulary.kind == "gemma4":
        merges = _stored_merges(vocabulary)
    else:
        scores = _numbers(vocabulary.values, "scores", len(vocabulary.tokens), "fi")
        if scores is None or np.isnan(scores).any():
            raise TokenizerError("GGUF: tokenizer.ggml.scores is missing, or has NaN among its numbers")
        merges = _merges(vocabulary, scores)
    if _flag(vocabulary.values, "remove_extra_whitespaces", False):
        raise TokenizerError("GGUF: tokenizer.ggml.remove_extra_whitespaces is not supported")
    # A character without a piece becomes bytes where there are pieces for all 256, else the unknown token.
    unknown = vocabulary.ids.get("unk", 0)
    byte_pieces = sum(kind == _BYTE for kind in vocabulary.types)
    if byte_pieces not in (0, 256):
        raise TokenizerError(f"GGUF: {byte_pieces} byte pieces, expected none or 256")
    # Spaces become "▁" before encoding and come back after decoding, without the one put before the text.
    prefix = _flag(vocabulary.values, "add_space_prefix", vocabulary.kind == "llama")
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    steps = [{"type": "Prepend", "prepend": _SPACE}, spaces] if prefix else [spaces]
    back = {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    parts = {
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "pre_tokenizer": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *([strip] if prefix else [])],
        },
        "model": _bpe(
            vocabulary,
            merges,
            unk_token=vocabulary.tokens[unknown],
            fuse_unk=True,
            byte_fallback=byte_pieces == 256,
        ),
    }
    return parts, True


def _merges(vocabulary: Vocabulary, scores: Any) -> list[list[str]]:
    """Every way to join two pieces into a third, the highest score of the joined piece first.

    Only normal pieces take part. Merges with equal scores are sorted by the ids of their halves, as in transformers.
    """
    index = {
        token: number
        for number, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True))
        if kind == _NORMAL
    }
    # Sorting these tuples gives the order: negated score of the joined piece, then the ids of its halves.
    found: list[tuple[float, int, int]] = []
    for piece, number in index.items():
        for cut in range(1, len(piece) if len(piece) <= _MAX_PIECE else 0):
            left, right = index.get(piece[:cut]), index.get(piece[cut:])
            if left is not None and right is not None:
                found.append((-float(scores[number]), left, right))
    # The vocabulary's own texts, of which no merge holds a copy.
    return [[vocabulary.tokens[left], vocabulary.tokens[right]] for _, left, right in sorted(found)]
