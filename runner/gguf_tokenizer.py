"""The tokenizer inside a GGUF file, written as `tokenizer.json` and `tokenizer_config.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from runner.errors import CheckpointError

_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_CONTROL, _USER_DEFINED, _BYTE = 3, 4, 6


def _byte_level(use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _split(pattern: str) -> dict[str, Any]:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, _byte_level(False)]}


_DIGITS = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, _byte_level(True)]}
PRE_TOKENIZERS: Mapping[str, dict[str, Any]] = {
    "default": _byte_level(True),
    "gpt-2": _byte_level(True),
    "smollm": _DIGITS,
    "llama-bpe": _split(_LLAMA3),
    "llama3": _split(_LLAMA3),
    "qwen2": _split(_QWEN2),
}
"""llama.cpp's names of pre-tokenisers, as the models' own `tokenizer.json` files spell them."""


def tokenizer_files(metadata: Mapping[str, Any]) -> tuple[dict[str, str], dict[str, Any]]:
    """The tokenizer's files by name, and the special ids that config.json carries.

    Raises:
        CheckpointError: a kind of tokenizer that is not supported, or lists that do not fit.
    """
    values = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items()}
    kind, tokens = values.get("model"), values.get("tokens")
    types = values.get("token_type") or [1] * len(tokens or [])
    if not isinstance(tokens, list) or not tokens or len(types) != len(tokens) or len(set(tokens)) != len(tokens):
        raise CheckpointError("GGUF: tokenizer.ggml.tokens is missing, repeats a token, or does not fit token_type")
    vocab = {token: index for index, token in enumerate(tokens)}
    if kind == "gpt2":
        model, parts = _gpt2(values, vocab)
    elif kind == "llama":
        model, parts = _sentencepiece(values, vocab)
    else:
        raise CheckpointError(f"GGUF: tokenizer {kind!r} is not supported; gpt2 and llama are")
    added = [
        {
            "id": index,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": types[index] == _CONTROL,
        }
        for token, index in vocab.items()
        if types[index] in (_CONTROL, _USER_DEFINED)
    ]
    special: dict[str, Any] = {}
    names: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        index = values.get(f"{key}_token_id")
        if isinstance(index, int) and 0 <= index < len(tokens):
            names[f"{name}_token"] = tokens[index]
            if name != "unk":
                special[f"{name}_token_id"] = index
    add_bos = values.get("add_bos_token", kind == "llama")
    processor = (
        _bos_processor(names["bos_token"], special["bos_token_id"]) if add_bos and "bos_token" in names else None
    )
    template = metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        names["chat_template"] = template
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": parts["normalizer"],
        "pre_tokenizer": parts["pre_tokenizer"],
        "post_processor": processor,
        "decoder": parts["decoder"],
        "model": model,
    }
    end = {values[key] for key in ("eos_token_id", "eot_token_id") if isinstance(values.get(key), int)}
    if len(end) > 1:
        special["eos_token_id"] = sorted(end)
    files = {
        "tokenizer.json": json.dumps(document, ensure_ascii=False),
        "tokenizer_config.json": json.dumps(names, ensure_ascii=False, indent=2),
    }
    return files, special


def _bpe(vocab: Mapping[str, int], merges: list[list[str]], **options: Any) -> dict[str, Any]:
    base = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None}
    rest = {"end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
    return {**base, **rest, **options, "vocab": dict(vocab), "merges": merges}


def _gpt2(values: Mapping[str, Any], vocab: Mapping[str, int]) -> tuple[dict[str, Any], dict[str, Any]]:
    pre, merges = values.get("pre", "default"), values.get("merges")
    if pre not in PRE_TOKENIZERS:
        raise CheckpointError(f"GGUF: pre-tokeniser {pre!r} is not known; known are {', '.join(PRE_TOKENIZERS)}")
    if not isinstance(merges, list) or any(merge.count(" ") != 1 for merge in merges):
        raise CheckpointError("GGUF: tokenizer.ggml.merges is missing or malformed")
    llama3 = pre in ("llama-bpe", "llama3")
    model = _bpe(vocab, [merge.split(" ") for merge in merges], ignore_merges=llama3)
    return model, {"normalizer": None, "pre_tokenizer": PRE_TOKENIZERS[pre], "decoder": _byte_level(True)}


def _sentencepiece(values: Mapping[str, Any], vocab: Mapping[str, int]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Sentencepiece BPE merges the adjacent pair whose result scores highest: the same as merges sorted by score."""
    scores = values.get("scores")
    if not isinstance(scores, list) or len(scores) != len(vocab):
        raise CheckpointError("GGUF: tokenizer.ggml.scores is missing or does not fit tokens")
    merges: list[tuple[float, int, str, str]] = []
    for piece, index in vocab.items():
        for cut in range(1, min(len(piece), 256)):
            left, right = piece[:cut], piece[cut:]
            if left in vocab and right in vocab:
                merges.append((-scores[index], vocab[left], left, right))
    merges.sort()
    unknown = values.get("unknown_token_id", 0)
    tokens = list(vocab)
    model = _bpe(
        vocab,
        [[left, right] for _, _, left, right in merges],
        unk_token=tokens[unknown],
        fuse_unk=True,
        byte_fallback=True,
    )
    prefix = {"type": "Prepend", "prepend": "\u2581"}
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    steps = [prefix, spaces] if values.get("add_space_prefix", True) else [spaces]
    back = {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    decoders = [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *([strip] if len(steps) == 2 else [])]
    return model, {
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
    }


def _bos_processor(token: str, index: int) -> dict[str, Any]:
    first = {"SpecialToken": {"id": token, "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [first, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [first, {"Sequence": {"id": "A", "type_id": 0}}, first, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {token: {"id": token, "ids": [index], "tokens": [token]}},
    }
