"""The tokenizer of a model whose adapters bring tokens of their own: the one saved beside the adapter."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from runner.adapters.model import Adapters
from runner.checkpoint.hub import resolve_adapter
from runner.checkpoint.model_files import ModelFiles
from runner.checkpoint.side_files import TEMPLATES, side_files
from runner.text.tokenizer import Tokenizer

TEMPLATE = "chat_template.jinja"


def with_added_tokens(files: ModelFiles, adapters: Adapters, *, progress: bool = False) -> ModelFiles:
    """`files` with the tokenizer of an adapter where that has tokens which the base's lacks; otherwise as they are.

    Only adapters that change embeddings or head are asked: the others were trained with the base's tokens. The
    adapter's tokenizer must not have more tokens than the model has rows. Where it has no chat template, the base's
    stays.

    Raises:
        TokenizerError: a tokenizer beside an adapter is malformed.
        HubError: the adapter has added tokens, and its tokenizer cannot be fetched from the hub.
    """
    rows = int(adapters.base.raw.get("vocab_size") or 0)
    for adapter in adapters.vocabulary:
        if rows > int(files.config.get("vocab_size") or rows):
            resolve_adapter(adapter.spec or str(adapter.source.directory), progress=progress, tokenizer=True)
        if not Tokenizer.is_in(adapter.source.directory):
            continue
        base, own = files.tokenizer(), Tokenizer.from_directory(adapter.source.directory)
        if base.vocab_size < own.vocab_size <= rows:
            chosen = own if own.has_chat_template else own.with_templates(base.template_sources)
            return dataclasses.replace(
                files,
                tokenizer=partial(_same, chosen),
                side_files=partial(_side_files, files, adapter.source.directory, own, base),
            )
    return files


def _same(tokenizer: Tokenizer) -> Tokenizer:
    return tokenizer


def _side_files(files: ModelFiles, directory: Path, own: Tokenizer, base: Tokenizer) -> dict[str, bytes | str]:
    """The base's generation config, and the adapter's tokenizer, with the base's chat templates if it has none."""
    kept = {name: data for name, data in files.side_files().items() if name == "generation_config.json"}
    others = {name: data for name, data in side_files(directory).items() if name not in kept}
    templates: Mapping[str, str] = {} if own.has_chat_template else base.template_sources
    written = {
        TEMPLATE if name == "default" else f"{TEMPLATES}/{name}.jinja": source for name, source in templates.items()
    }
    return {**kept, **others, **written}
