"""Reads and checks the small files beside a tokenizer's vocabulary, which come from strangers.

The files are tokenizer_config.json, special_tokens_map.json, added_tokens.json and the chat templates. Where they
disagree, the same file wins as in transformers 5.23 (`PreTrainedTokenizerBase._from_pretrained`), so that ids and
templates are the same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runner.errors import TokenizerError
from runner.local_files import find_file, read_file
from runner.text.special_tokens import AddedToken
from runner.text.template_files import read_templates

_MAX_JSON = 64 << 20
_MAX_ADDED = 100_000
_MAX_CONTENT = 1024  # characters of one token
_MAX_CHARACTERS = 1 << 20  # of all tokens; the libraries hold a hundred bytes for each
_MAX_ID = 1 << 24
_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_FLAGS = ("special", "normalized", "lstrip", "rstrip", "single_word")


@dataclass(frozen=True, kw_only=True)
class TokenizerFiles:
    """Contents of the small files; a flag is None if no file sets it."""

    added: tuple[AddedToken, ...] = ()
    """Tokens to add, in the order in which they enter the vocabulary."""
    named: Mapping[str, str] = field(default_factory=dict)
    """Text of each token that has a name (`bos_token`: "<s>"); chat templates see these as variables."""
    templates: Mapping[str, str] = field(default_factory=dict)
    """Source of each chat template, by name."""
    add_bos_token: bool | None = None
    add_eos_token: bool | None = None
    add_prefix_space: bool | None = None
    legacy: bool | None = None
    tokenizer_class: str | None = None


def read_tokenizer_files(directory: Path) -> TokenizerFiles:
    """Read those of the small files that exist in `directory`.

    Raises:
        TokenizerError: a file is malformed.
        CheckpointError: a file is a link out of the directory, or cannot be read.
    """
    path = directory / "tokenizer_config.json"
    config = _read_object(directory, path.name) or {}
    # The older name of the key, which transformers still reads.
    if config.get("extra_special_tokens") is None:
        config["extra_special_tokens"] = config.get("additional_special_tokens")
    # The two older files count only if tokenizer_config.json has no list of added tokens with ids.
    added = _added_tokens_decoder(config, path)
    if added is None:
        config, added = _legacy_files(directory, config)
    named = _named_tokens(config, path)
    added += _extra_tokens(config, named, added, path)
    characters = sum(len(token.content) for token in added)
    if characters > _MAX_CHARACTERS:
        raise TokenizerError(f"{path}: added tokens of {characters} characters, more than the {_MAX_CHARACTERS} read")
    return TokenizerFiles(
        added=tuple(added),
        named=named,
        templates=read_templates(directory, config),
        tokenizer_class=name if isinstance(name := config.get("tokenizer_class"), str) else None,
        **{
            name: _flag(config, name, path) for name in ("add_bos_token", "add_eos_token", "add_prefix_space", "legacy")
        },
    )


def _read_object(directory: Path, name: str) -> dict[str, Any] | None:
    """Read the JSON object in the file `name`; None if there is no such file."""
    path = find_file(directory, name)
    if path is None:
        return None
    data = read_file(path, _MAX_JSON)
    try:
        value = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{path} cannot be read as JSON ({error}): fetch it again") from error
    if not isinstance(value, dict):
        raise TokenizerError(f"{path} holds a {type(value).__name__}, expected a JSON object")
    return value


def _flag(config: Mapping[str, Any], name: str, path: Path) -> bool | None:
    value = config.get(name)
    if value is not None and not isinstance(value, bool):
        raise TokenizerError(f"{path}: {name} is {value!r:.80}, expected true, false or null")
    return value


def _content(value: Any, where: str) -> str:
    content = value.get("content") if isinstance(value, dict) else value
    if not isinstance(content, str) or len(content) > _MAX_CONTENT:
        raise TokenizerError(f"{where} is {value!r:.80}, expected a token: text of at most {_MAX_CONTENT} characters")
    return content


def _token(value: Any, where: str, *, token_id: int | None = None, special: bool = False) -> AddedToken:
    content = _content(value, where)
    flags = {name: value[name] for name in _FLAGS if name in value} if isinstance(value, dict) else {}
    if wrong := [name for name, flag in flags.items() if not isinstance(flag, bool)]:
        raise TokenizerError(f"{where}: {wrong[0]} is {flags[wrong[0]]!r:.80}, expected true or false")
    # `tokenizers` matches a token that is not special after normalisation unless told otherwise.
    is_special = special or flags.pop("special", False)
    flags.pop("special", None)  # still there if `special` alone decided
    return AddedToken(content, token_id, special=is_special, **{"normalized": not is_special, **flags})


def _token_id(value: Any, where: str) -> int:
    text = str(value)
    if isinstance(value, bool) or not (text.isascii() and text.isdigit() and len(text) <= 9 and int(text) < _MAX_ID):
        raise TokenizerError(f"{where}: {value!r:.80} is not a token id, expected 0 to {_MAX_ID - 1}")
    return int(text)


def _added_tokens_decoder(config: Mapping[str, Any], path: Path) -> list[AddedToken] | None:
    """Tokens in the key `added_tokens_decoder`, in the order of their ids; None if the config lacks the key."""
    decoder = config.get("added_tokens_decoder")
    if decoder is None:
        return None
    if not isinstance(decoder, dict) or len(decoder) > _MAX_ADDED:
        raise TokenizerError(f"{path}: added_tokens_decoder must be an object of at most {_MAX_ADDED} tokens")
    where = f"{path}: added_tokens_decoder"
    tokens = [_token(value, f"{where}[{key!r:.40}]", token_id=_token_id(key, where)) for key, value in decoder.items()]
    return sorted(tokens, key=lambda token: token.id or 0)


def _legacy_files(directory: Path, config: dict[str, Any]) -> tuple[dict[str, Any], list[AddedToken]]:
    """Read special_tokens_map.json and added_tokens.json, the two files used before `added_tokens_decoder` existed.

    Returns the config, with the keys of special_tokens_map.json in place of its own, and the added tokens.
    """
    found = _read_object(directory, "special_tokens_map.json")
    if found is not None:
        if "additional_special_tokens" in found:
            found.setdefault("extra_special_tokens", found.pop("additional_special_tokens"))
        config = {**config, **found}
    path = directory / "added_tokens.json"
    entries = _read_object(directory, path.name)
    if entries is None:
        return config, []
    if len(entries) > _MAX_ADDED:
        raise TokenizerError(f"{path} lists {len(entries)} tokens, more than the {_MAX_ADDED} that are read")
    # added_tokens.json has only texts and ids: a token is special if the config names it or lists it as extra.
    special = {content for name in _NAMES if isinstance(content := _text_of(config.get(name)), str)}
    extra = config.get("extra_special_tokens")
    special |= {text for item in (extra if isinstance(extra, list) else []) if isinstance(text := _text_of(item), str)}
    tokens = [
        _token(content, f"{path}: {content!r:.40}", token_id=_token_id(index, str(path)), special=content in special)
        for content, index in entries.items()
    ]
    return config, sorted(tokens, key=lambda token: token.id or 0)


def _text_of(value: Any) -> Any:
    """The text of a token given as a string or as an object; unlike `_content`, without a check."""
    return value.get("content") if isinstance(value, dict) else value


def _named_tokens(config: Mapping[str, Any], path: Path) -> dict[str, str]:
    """Texts of the tokens with standard names and of a model's own, which `*_token` keys and extra tokens name.

    A model's own `*_token` key counts only if it is a plain string, as in transformers; standard names win.
    """
    named = {name: _content(config[name], f"{path}: {name}") for name in _NAMES if config.get(name) is not None}
    own = {key: value for key, value in config.items() if key.endswith("_token") and isinstance(value, str)}
    extra = config.get("extra_special_tokens")
    own |= {
        str(key): _content(value, f"{path}: {key}") for key, value in (extra if isinstance(extra, dict) else {}).items()
    }
    return {**{key: _content(value, f"{path}: {key}") for key, value in own.items()}, **named}


def _extra_tokens(
    config: Mapping[str, Any], named: Mapping[str, str], added: list[AddedToken], path: Path
) -> list[AddedToken]:
    """Named and extra special tokens that are not in `added` yet; an empty name (`"bos_token": ""`) adds no token."""
    extra = config.get("extra_special_tokens")
    if extra is not None and not (isinstance(extra, (list, dict)) and len(extra) <= _MAX_ADDED):
        raise TokenizerError(f"{path}: extra_special_tokens must be a list or an object of at most {_MAX_ADDED} tokens")
    found = [_token(config.get(name, text), f"{path}: {name}", special=True) for name, text in named.items()]
    if isinstance(extra, list):
        found += [_token(item, f"{path}: extra_special_tokens", special=True) for item in extra]
    # Each text once, in the order of first mention, because ids are given out in this order.
    known = {token.content for token in added}
    return [token for token in {t.content: t for t in found}.values() if token.content and token.content not in known]
