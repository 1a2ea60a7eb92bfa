"""`runner.load`: what it says about a model's files, beside the answers."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
from places import TESTS

import runner
from runner.errors import ContextLengthError, RunnerWarning, UsageError
from runner.families import find
from runner.language_model import chosen_context

LLAMA = TESTS / "fixtures" / "llama"


def copied(name: str, to: Path, **changes: Any) -> Path:
    """A copy of a fixture whose config.json has `changes`; a value of None removes its key."""
    model = to / "model"
    shutil.copytree(LLAMA / name, model)
    raw = {**json.loads((model / "config.json").read_text()), **changes}
    (model / "config.json").write_text(json.dumps({key: value for key, value in raw.items() if value is not None}))
    return model


# --- notes ------------------------------------------------------------------------------------------------------------


def test_ignored_keys_are_one_warning_and_one_note(tmp_path: Path) -> None:
    model = copied("llama-gqa", tmp_path, use_flash_attention_2=True, neftune_noise_alpha=5)
    with pytest.warns(RunnerWarning) as caught:
        lm = runner.load(model)
    (note,) = lm.notes
    assert [str(item.message) for item in caught] == [note]
    assert caught[0].filename == __file__  # it points at the caller
    assert "'use_flash_attention_2' = True, 'neftune_noise_alpha' = 5" in note
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain = runner.load(LLAMA / "llama-gqa")
    assert plain.notes == ()
    assert lm.generate([1, 9, 10], max_tokens=5).tokens == plain.generate([1, 9, 10], max_tokens=5).tokens


# --- context length ---------------------------------------------------------------------------------------------------

LONG = [1, *range(9, 39)] * 5
"""155 tokens: more than the 64 of the fixtures' `max_position_embeddings`, fewer than 4 times as many."""


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn"])
def test_a_stretched_model_reads_more_than_the_stated_length(kind: str, tmp_path: Path) -> None:
    scaling = {"rope_type": kind, "factor": 4.0, "rope_theta": 1000.0}
    lm = runner.load(copied("llama-gqa", tmp_path, rope_parameters=scaling, max_position_embeddings=64))
    assert lm.context_length == 256 and lm.notes == ()
    assert len(lm.generate(LONG, max_tokens=3).tokens) == 3


def test_the_callers_context_length_overrides(tmp_path: Path) -> None:
    model = copied("llama-gqa", tmp_path, max_position_embeddings=64)
    with pytest.raises(ContextLengthError, match="155 tokens, but the context window holds 64"):
        runner.load(model).generate(LONG)
    with pytest.warns(RunnerWarning, match="200 tokens is beyond the 64"):
        lm = runner.load(model, context_length=200)
    assert lm.context_length == 200 and len(lm.notes) == 1
    assert len(lm.generate(LONG, temperature=0).tokens) <= 45
    shorter = runner.load(model, context_length=8)
    assert shorter.notes == ()
    with pytest.raises(ContextLengthError, match="holds 8"):
        shorter.generate([1, *range(9, 17)])


@pytest.mark.parametrize("value", [0, -1, True, 2.0, "64", 1 << 40])
def test_a_context_length_that_is_none_is_refused_before_anything_is_read(value: Any) -> None:
    with pytest.raises(UsageError, match="context_length must be an integer from 1"):
        runner.load("/nowhere", context_length=value)


@pytest.mark.parametrize("family", ["gpt2-base", "opt-base"])
def test_no_setting_exceeds_a_table_of_positions(family: str) -> None:
    raw = json.loads((TESTS / "fixtures" / "families" / family / "config.json").read_text())
    config = find(raw)[0].from_dict(raw)
    with pytest.raises(UsageError, match=r"learned \d+ positions"):
        chosen_context(config, config.context_length + 1)
    assert chosen_context(config, config.context_length) == (config.context_length, [])
