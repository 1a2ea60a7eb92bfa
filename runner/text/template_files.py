"""Finds a model's chat templates in every file that one is published in."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runner.errors import TokenizerError
from runner.local_files import checked_path, find_file, read_file, read_json
from runner.text.template_limits import MAX_SOURCE

FOLDER = "additional_chat_templates"
_MAX_TEMPLATES = 100
_KEY = "chat_template"


def read_templates(directory: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Read the chat templates of the model in `directory`, by name; a single one is called "default".

    The first of these places that has a template gives them all: chat_template.jinja together with
    additional_chat_templates/NAME.jinja; then the key `chat_template` of tokenizer_config.json, of
    processor_config.json, and of chat_template.json. The order is that of transformers' tokenizers, followed by that of
    its processors, where repositories of models that also see images may keep the only template. A template of white
    space alone counts as none.

    Args:
        directory: the model's directory.
        config: the contents of tokenizer_config.json.

    Raises:
        TokenizerError: a template is too long, is not UTF-8, or has another shape; there are too many.
        CheckpointError: a file cannot be read, or links out of the directory.
    """
    if templates := _from_jinja_files(directory):
        return templates
    if templates := _from_value(config.get(_KEY), f"{directory / 'tokenizer_config.json'}: {_KEY}"):
        return templates
    for name in ("processor_config.json", "chat_template.json"):
        path = find_file(directory, name)
        if path is None:
            continue
        held = read_json(path)
        # A processor's config is mostly about other things, but the last file has no other purpose.
        if _KEY not in held and name == "chat_template.json":
            raise TokenizerError(f'{path} has no key "{_KEY}": expected {{"{_KEY}": "..."}}; fetch it again')
        if templates := _from_value(held.get(_KEY), f"{path}: {_KEY}"):
            return templates
    return {}


def bounded_template(text: str, where: str) -> str:
    """Return `text`, or raise `TokenizerError` if it is longer than any chat template."""
    if len(text) > MAX_SOURCE:
        raise TokenizerError(f"{where} has {len(text)} characters, more than the {MAX_SOURCE} of any chat template")
    return text


def _from_jinja_files(directory: Path) -> dict[str, str]:
    """Templates in files of their own."""
    files = sorted((directory / FOLDER).glob("*.jinja"))
    if len(files) > _MAX_TEMPLATES:
        raise TokenizerError(f"{directory / FOLDER} holds {len(files)} templates, more than {_MAX_TEMPLATES}")
    named = {"default": directory / "chat_template.jinja", **{file.stem: file for file in files}}
    found = {name: _read(directory, file) for name, file in named.items() if os.path.lexists(file)}
    return _without_blanks(found)


def _read(directory: Path, file: Path) -> str:
    # A character takes up to four bytes of UTF-8.
    data = read_file(checked_path(directory, file), 4 * MAX_SOURCE)
    try:
        return bounded_template(data.decode("utf-8"), str(file))
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{file} cannot be read as UTF-8 text ({error})") from error


def _from_value(value: Any, where: str) -> dict[str, str]:
    """Templates in JSON: source, a list of `{"name": ..., "template": ...}`, or an object of sources by name."""
    if value is None:
        return {}
    if isinstance(value, str):
        value = {"default": value}
    entries = [{"name": k, "template": v} for k, v in value.items()] if isinstance(value, dict) else value
    if not isinstance(entries, list) or not all(_is_named_template(entry) for entry in entries):
        raise TokenizerError(f'{where} must be text or a list of {{"name": ..., "template": ...}}')
    if len(entries) > _MAX_TEMPLATES:
        raise TokenizerError(f"{where} holds {len(entries)} templates, more than {_MAX_TEMPLATES}")
    return _without_blanks({e["name"]: bounded_template(e["template"], f"{where} {e['name']!r:.40}") for e in entries})


def _is_named_template(entry: Any) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("name"), str) and isinstance(entry.get("template"), str)


def _without_blanks(templates: dict[str, str]) -> dict[str, str]:
    return {name: source for name, source in templates.items() if source.strip()}
