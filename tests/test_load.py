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
from runner.errors import RunnerWarning

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
