"""Tiny tokenizers of each kind, trained here, and what transformers makes of texts and chats with them.

`expected_text.json` holds, for each text: `ids` (beginning-of-sequence added, special tokens in the text recognised:
transformers' default), `ids_plain` (special tokens in the text are plain text), `ids_bare` (the latter, nothing added),
`decoded` and `decoded_all` (without and with special tokens, of `ids`); then random strings with `ids_bare`, and chats.
For a lone tokenizer.model, `sentencepiece_differs` lists texts and ids of the sentencepiece library where they differ.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
from fixtures_files import RECIPE, write_config, write_json
from fixtures_texts import ALPHABETS, CHATML, CHATS, CORPUS, HEADERS, INSTRUCT, TEXTS, TOOL_USE
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast


def byte_level(pattern: str | None, specials: list[str], size: int) -> Tokenizer:
    """Byte-level BPE as Llama 3 and SmolLM have it: all 256 bytes, then merges up to `size`."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=pattern is not None))
    if pattern is None:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    else:
        split = pre_tokenizers.Split(Regex(pattern), behavior="isolated", invert=False)
        byte = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=[AddedToken(s, special=True, normalized=False) for s in specials],
        initial_alphabet=alphabet, show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def with_bos(tokenizer: Tokenizer, bos: str) -> Tokenizer:
    """The post-processor that puts the beginning-of-sequence token first, once."""
    template = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    return tokenizer


LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
HEADER_SPECIALS = [
    "<|unused|>", "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
    "<|im_start|>", "<|im_end|>",
]  # fmt: skip


def bpe(directory: Path) -> Any:
    """Llama-3 style, as save_pretrained writes it: the template in chat_template.jinja."""
    tokenizer = with_bos(byte_level(LLAMA3_PATTERN, HEADER_SPECIALS, 320), "<|begin_of_text|>")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>",
        clean_up_tokenization_spaces=False, model_max_length=128,
    )  # fmt: skip
    fast.chat_template = HEADERS
    fast.save_pretrained(directory)
    return AutoTokenizer.from_pretrained(directory)


def bpe_hub(directory: Path) -> Any:
    """The same tokenizer in the older layout: named templates in tokenizer_config.json, special_tokens_map.json."""
    tokenizer = with_bos(byte_level(LLAMA3_PATTERN, HEADER_SPECIALS, 320), "<|begin_of_text|>")
    tokenizer.save(str(directory / "tokenizer.json"))
    added = {
        str(tokenizer.token_to_id(s)): {
            "content": s, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True,
        }
        for s in HEADER_SPECIALS
    }  # fmt: skip
    config = {
        "added_tokens_decoder": added,
        "bos_token": "<|begin_of_text|>",
        "chat_template": [{"name": "default", "template": HEADERS}, {"name": "tool_use", "template": TOOL_USE}],
        "clean_up_tokenization_spaces": True,
        "eos_token": "<|end_of_text|>",
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": 128,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    write_config(directory / "tokenizer_config.json", config)
    write_config(
        directory / "special_tokens_map.json", {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
    )
    return AutoTokenizer.from_pretrained(directory)


def ascii_only(directory: Path) -> Any:
    """The least: printable ASCII, no merges, no beginning-of-sequence, ChatML in a plain string (128 ids)."""
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|reserved_{i}|>" for i in range(5))]
    letters = [*"ĠĊĉ", *(chr(code) for code in range(33, 127))]
    vocab = {token: index for index, token in enumerate([*specials, *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in specials])
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "bos_token": "<|im_start|>",
        "chat_template": CHATML,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "model_max_length": 128,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<|endoftext|>",
    }
    write_config(directory / "tokenizer_config.json", config)
    return AutoTokenizer.from_pretrained(directory)


def spm(directory: Path) -> Any:
    """Llama-2 style: tokenizer.model alone, byte fallback, one token added after the vocabulary."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=model, model_type="bpe", vocab_size=380, byte_fallback=True,
        character_coverage=0.99, normalization_rule_name="identity", remove_extra_whitespaces=False,
        add_dummy_prefix=True, split_digits=True, allow_whitespace_only_pieces=True, num_threads=1,
        unk_surface=" \u2047 ", minloglevel=2,
    )  # fmt: skip
    (directory / "tokenizer.model").write_bytes(model.getvalue())
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "added_tokens_decoder": {
            "0": {"content": "<unk>", **plain},
            "1": {"content": "<s>", **plain},
            "2": {"content": "</s>", **plain},
            "380": {"content": "<|im_end|>", **plain},
        },
        "bos_token": "<s>",
        "chat_template": INSTRUCT,
        "clean_up_tokenization_spaces": False,
        "eos_token": "</s>",
        "legacy": False,
        "model_max_length": 1000000000000000019884624838656,
        "pad_token": None,
        "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizer",
        "unk_token": "<unk>",
        "use_default_system_prompt": False,
    }
    write_config(directory / "tokenizer_config.json", config)
    return LlamaTokenizer.from_pretrained(directory)


def spm_json(directory: Path) -> Any:
    """The tokenizer of `spm` as transformers converts it, with a template of each new kind."""
    tokenizer = spm(directory)
    tokenizer.chat_template = {"default": INSTRUCT, "tool_use": TOOL_USE}
    (directory / "tokenizer.model").unlink()
    (directory / "tokenizer_config.json").unlink()
    tokenizer.save_pretrained(directory)
    return AutoTokenizer.from_pretrained(directory)


KINDS: dict[str, Callable[[Path], Any]] = {
    "bpe": bpe,
    "bpe-hub": bpe_hub,
    "ascii": ascii_only,
    "spm": spm,
    "spm-json": spm_json,
}
RANDOM_STRINGS = {"bpe": 500, "spm": 500}


def random_strings(count: int) -> list[str]:
    """Short strings that mix letters, punctuation, spaces, other scripts and emoji, with breaks in odd places."""
    rng = np.random.default_rng(20260901)
    found = []
    for _ in range(count):
        pieces = []
        for _ in range(int(rng.integers(1, 4))):
            alphabet = ALPHABETS[int(rng.integers(len(ALPHABETS)))]
            pieces.append("".join(alphabet[int(i)] for i in rng.integers(0, len(alphabet), int(rng.integers(1, 9)))))
        found.append("".join(pieces))
    return found


def encoded(tokenizer: Any, text: str) -> dict[str, Any]:
    ids = tokenizer.encode(text)
    return {
        "text": text,
        "ids": ids,
        "ids_plain": tokenizer.encode(text, split_special_tokens=True),
        "ids_bare": tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True),
        "decoded": tokenizer.decode(ids, skip_special_tokens=True),
        "decoded_all": tokenizer.decode(ids, skip_special_tokens=False),
    }


def rendered(tokenizer: Any, name: str | None) -> list[dict[str, Any]]:
    """Each chat under one template: the text and its ids, or the message of the template's own refusal."""
    rows: list[dict[str, Any]] = []
    for messages, options in CHATS:
        row: dict[str, Any] = {"template": name, "messages": messages, "options": options}
        try:
            extra = {} if name is None else {"chat_template": name}
            text = tokenizer.apply_chat_template(messages, tokenize=False, **options, **extra)
            row |= {"rendered": text, "ids": tokenizer.encode(text, add_special_tokens=False)}
        except Exception as error:  # a template may fail in any way; its own refusals are what we keep
            row["error"] = f"{type(error).__name__}: {error}"
        rows.append(row)
    return rows


def sentencepiece_ids(model: Path, texts: list[str]) -> dict[str, list[int]]:
    """What the sentencepiece library itself makes of plain text, which is also what the slow tokenizers of
    transformers 4 gave; transformers 5 adds no second space mark before a text that starts with a space."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    return {text: processor.encode(text) for text in texts}


def write(kind: str, directory: Path, *, expect_text: bool) -> None:
    """The tokenizer's files, and expected_text.json where asked for."""
    tokenizer = KINDS[kind](directory)
    if not expect_text:
        return
    named = tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else {}
    chats = [row for name in [None, *named] for row in rendered(tokenizer, name)]
    content: dict[str, Any] = {
        "recipe": {**RECIPE, "kind": kind},
        "special": {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id, "size": len(tokenizer)},
        "encode": [encoded(tokenizer, text) for text in TEXTS],
        "random": [
            [text, tokenizer.encode(text, add_special_tokens=False)]
            for text in random_strings(RANDOM_STRINGS.get(kind, 0))
        ],
        "chats": chats,
    }
    model = directory / "tokenizer.model"
    if model.exists():
        found = sentencepiece_ids(model, [*TEXTS, *random_strings(RANDOM_STRINGS[kind])])
        theirs = dict(content["random"]) | {row["text"]: row["ids_bare"] for row in content["encode"]}
        content["sentencepiece_differs"] = [[text, ids] for text, ids in found.items() if ids != theirs[text]]
    write_json(directory / "expected_text.json", content)
