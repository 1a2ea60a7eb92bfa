"""Builds tokenizers of the `tokenizers` library without a tokenizer.json, from the other files of byte-level BPE.

Those are vocab.json + merges.txt, tiktoken's lists of ranks, and tekken.json. Ranks are byte strings in the order in
which they were learnt. Two neighbours merge if their joined bytes have a rank, lowest rank first; so every split of a
token into two tokens is a merge with the priority of that token (as in openai/tiktoken).
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors

from runner.errors import TokenizerError
from runner.local_files import path_in, read_file
from runner.text.detokenizer import byte_alphabet
from runner.text.tokenizer_files import TokenizerFiles

MAX_FILE = 64 << 20
MAX_TOKENS = 1 << 20
MAX_TOKEN_BYTES = 1024
MAX_PATTERN = 4096

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST
QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST

RANK_PATTERNS: Mapping[int, str] = {128_000: LLAMA3, 100_256: LLAMA3}
"""Regular expression that cuts text before merging, by the number of ranks, because a file of ranks does not have it.

The vocabularies are those of Llama 3 (meta-llama/llama-models, tokenizer.py) and of OpenAI's cl100k_base
(openai/tiktoken, openai_public.py).
"""

_BYTE_LEVEL = frozenset(["GPT2Tokenizer", "CodeGenTokenizer", "GPTNeoXTokenizer"])


def byte_level(directory: Path, files: TokenizerFiles) -> tokenizers.Tokenizer:
    """Build the tokenizer of a vocab.json and a merges.txt; the config's `tokenizer_class` decides how text is cut.

    Raises:
        TokenizerError: how the class cuts text is not known here, or a file is malformed.
    """
    name = (files.tokenizer_class or "GPT2Tokenizer").removesuffix("Fast")
    cut: Any
    if name == "Qwen2Tokenizer":
        cut = _split(QWEN2)
    elif name in _BYTE_LEVEL:
        cut = pre_tokenizers.ByteLevel(add_prefix_space=bool(files.add_prefix_space))
    else:
        raise TokenizerError(
            f"{directory}: how a {name} cuts text is not known, so its vocab.json and merges.txt are of no use without "
            f"a tokenizer.json; known are {', '.join(sorted(_BYTE_LEVEL | {'Qwen2Tokenizer'}))}"
        )
    path = path_in(directory, "vocab.json")
    vocab = _json(path)
    if not all(isinstance(index, int) and 0 <= index < MAX_TOKENS for index in vocab.values()):
        raise TokenizerError(f"{path}: every token needs an id from 0 to {MAX_TOKENS - 1}")
    result = _assemble(vocab, _merges(path_in(directory, "merges.txt")), cut, ignore_merges=False, path=path)
    if name == "Qwen2Tokenizer":
        result.normalizer = normalizers.NFC()
    return result


def tiktoken(path: Path, files: TokenizerFiles) -> tokenizers.Tokenizer:
    """Build the tokenizer of a list of tiktoken ranks: lines of base64 and rank, such as Llama 3's `tokenizer.model`.

    The list has no special tokens; those of tokenizer_config.json are added by the backend.

    Raises:
        TokenizerError: a line is malformed, or how text is cut is not known for this number of ranks.
    """
    lines = read_file(path, MAX_FILE).split(b"\n")
    ranks = [_ranked(line, index, path) for index, line in enumerate(lines) if line.strip()]
    pattern = RANK_PATTERNS.get(len(ranks))
    if pattern is None:
        known = ", ".join(map(str, RANK_PATTERNS))
        raise TokenizerError(
            f"{path}: how text is cut for a vocabulary of {len(ranks)} ranks is not known ({known} are)"
        )
    return from_ranks(ranks, pattern, path)


def tekken(path: Path, files: TokenizerFiles) -> tokenizers.Tokenizer:
    """Build the tokenizer of Mistral's tekken.json, whose special tokens have the first ids.

    The format is that of mistral-common, tekken.py.

    Raises:
        TokenizerError: the file is malformed.
    """
    data = _json(path)
    config, entries = data.get("config"), data.get("vocab")
    if not isinstance(config, dict) or not isinstance(entries, list) or len(entries) > MAX_TOKENS:
        raise TokenizerError(
            f"{path} is not a tekken file: it needs a config and a vocab of at most {MAX_TOKENS} tokens"
        )
    size, reserved = _count(config, "default_vocab_size", path), _count(config, "default_num_special_tokens", path)
    pattern = config.get("pattern")
    if reserved >= size or not isinstance(pattern, str) or len(pattern) > MAX_PATTERN:
        raise TokenizerError(f"{path}: config needs a pattern, and fewer special tokens than tokens")
    ranks = [_decoded(entry.get("token_bytes") if isinstance(entry, dict) else None, path) for entry in entries]
    special = _tekken_special(data.get("special_tokens"), reserved, path)
    # The file may list more ranks than the model uses.
    result = from_ranks(ranks[: size - reserved], pattern, path, special)
    result.add_special_tokens([tokenizers.AddedToken(text, special=True, normalized=False) for text in special])
    result.post_processor = _bos("<s>", 1)
    return result


def _count(config: dict[str, Any], name: str, path: Path) -> int:
    """The number of tokens that the config has under `name`."""
    value = config.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= MAX_TOKENS:
        raise TokenizerError(f"{path}: config needs {name}, from 1 to {MAX_TOKENS}, not {value!r:.40}")
    return value


def _tekken_special(listed: Any, reserved: int, path: Path) -> list[str]:
    """Texts of the `reserved` special tokens in the order of their ids.

    Files before 2024-11 list none and mean `TEKKEN_SPECIAL`; ids without a text get a placeholder.
    """
    names: dict[Any, Any] = dict(enumerate(TEKKEN_SPECIAL))
    if listed is not None:
        if not isinstance(listed, list) or not all(isinstance(item, dict) for item in listed):
            raise TokenizerError(f"{path}: special_tokens must be a list of objects")
        names = {item.get("rank"): item.get("token_str") for item in listed}
    filled = [names.get(index, f"<SPECIAL_{index}>") for index in range(reserved)]
    if not all(isinstance(text, str) and 0 < len(text) <= MAX_TOKEN_BYTES for text in filled):
        raise TokenizerError(f"{path}: a special token has no text")
    return filled


TEKKEN_SPECIAL = (
    "<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]", "[SUFFIX]",
    "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]",
)  # fmt: skip
"""Special tokens of a tekken.json that lists none, fixed in mistral-common."""


def from_ranks(ranks: Sequence[bytes], pattern: str, path: Path, before: Sequence[str] = ()) -> tokenizers.Tokenizer:
    """Build a byte-level BPE tokenizer of `ranks`, whose ids follow those of the tokens `before`.

    Args:
        ranks: tokens as bytes, lowest rank first.
        pattern: regular expression whose matches are merged separately.
        path: the file that error messages name.
        before: tokens with the first ids (special tokens).

    Raises:
        TokenizerError: a token is there twice, or `pattern` is not a regular expression.
    """
    letters = {byte: letter for letter, byte in byte_alphabet().items()}
    spelled = ["".join(letters[byte] for byte in token) for token in ranks]
    vocab = {text: index for index, text in enumerate([*before, *spelled])}
    if len(vocab) != len(before) + len(ranks):
        raise TokenizerError(f"{path}: a token is listed twice")
    return _assemble(vocab, _splits(spelled, vocab, path), _split(pattern), ignore_merges=True, path=path)


def _splits(spelled: Sequence[str], vocab: Mapping[str, int], path: Path) -> list[tuple[str, str]]:
    """Every split of a token into two tokens, as merges.

    Merges of one token stand together, in the order of its rank; among them the split with the lowest ids first.

    Raises:
        TokenizerError: there are many times the splits that a vocabulary learnt from text has (2.2 for each token of
            Llama 3, o200k and Mistral Nemo). All runs of one letter would have 500,000 for 1,000 tokens, of 500 bytes.
    """
    most = 5 * len(spelled) + 50_000
    most_characters = 8 * sum(map(len, spelled)) + (4 << 20)
    same = {text: text for text in spelled}  # a merge shares the strings of its tokens
    merges: list[tuple[str, str]] = []
    characters = 0
    for text in spelled:
        halves = ((text[:place], text[place:]) for place in range(1, len(text)))
        splits = [(same[left], same[right]) for left, right in halves if left in same and right in same]
        merges += sorted(splits, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
        characters += len(splits) * len(text)
        if len(merges) > most or characters > most_characters:
            raise TokenizerError(
                f"{path}: its tokens are made of each other in more than {most} ways, as no vocabulary that was learnt "
                "from text: fetch it again"
            )
    return merges


def _assemble(
    vocab: dict[str, int], merges: list[tuple[str, str]], cut: Any, *, ignore_merges: bool, path: Path
) -> tokenizers.Tokenizer:
    try:
        result = tokenizers.Tokenizer(models.BPE(vocab, merges, ignore_merges=ignore_merges))
    except Exception as error:  # the library raises bare exceptions, for example for a merge of unknown tokens
        raise TokenizerError(f"{path}: {error}") from error
    result.pre_tokenizer = cut
    result.decoder = decoders.ByteLevel()
    return result


def _split(pattern: str) -> Any:
    """Pre-tokenizer that cuts text by `pattern` and spells each piece in the byte alphabet."""
    try:
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
    except Exception as error:  # an invalid expression is a bare exception of the library
        raise TokenizerError(f"the pattern that cuts text is not a valid regular expression ({error})") from error
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _bos(text: str, index: int) -> Any:
    """Post-processor that puts BOS first."""
    return processors.TemplateProcessing(
        single=f"{text}:0 $A:0", pair=f"{text}:0 $A:0 $B:1", special_tokens=[(text, index)]
    )


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(read_file(path, MAX_FILE).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{path} cannot be read as JSON ({error}): fetch it again") from error
    if not isinstance(value, dict) or len(value) > MAX_TOKENS:
        raise TokenizerError(f"{path} must hold an object of at most {MAX_TOKENS} entries")
    return value


def _merges(path: Path) -> list[tuple[str, str]]:
    """Read a merges.txt: one pair of tokens per line, after an optional first line `#version`."""
    result: list[tuple[str, str]] = []
    for number, line in enumerate(read_file(path, MAX_FILE).decode("utf-8", "replace").split("\n")):
        if not line.strip() or (number == 0 and line.startswith("#version")):
            continue
        pair = line.rstrip("\r").split(" ")
        if len(pair) != 2 or len(result) >= MAX_TOKENS:
            raise TokenizerError(f"{path}: line {number + 1} is not a pair of tokens: {line!r:.60}")
        result.append((pair[0], pair[1]))
    return result


def _ranked(line: bytes, index: int, path: Path) -> bytes:
    """Token in a line of base64 and rank; the rank must be the line's own index."""
    parts = line.split()
    if len(parts) != 2 or parts[1] != str(index).encode() or index >= MAX_TOKENS:
        raise TokenizerError(f"{path}: line {index + 1} is not base64 and the rank {index}: {line!r:.60}")
    return _decoded(parts[0].decode("ascii", "replace"), path)


def _decoded(text: Any, path: Path) -> bytes:
    """Bytes of a token in base64."""
    try:
        token = base64.b64decode(text, validate=True) if isinstance(text, str) else b""
    except (binascii.Error, ValueError):
        token = b""
    if not 0 < len(token) <= MAX_TOKEN_BYTES:
        raise TokenizerError(f"{path}: {text!r:.60} is not a token: expected base64 of 1 to {MAX_TOKEN_BYTES} bytes")
    return token
