"""What generation_config.json sets: honoured, said, or refused by the file's name; arguments override it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from places import TESTS

import runner
from runner.engine.defaults import GenerationDefaults
from runner.errors import ConfigError, UsageError

PROMPT = [1, 9, 10, 11]


def model(to: Path, **settings: Any) -> runner.LanguageModel:
    """A tiny Llama whose generation_config.json has `settings`, and no end token to cut its answers short."""
    shutil.copytree(TESTS / "fixtures" / "llama" / "llama-gqa", to / "model")
    (to / "model" / "generation_config.json").write_text(json.dumps(settings))
    return runner.load(to / "model")


def answer(lm: runner.LanguageModel, **options: Any) -> runner.Generation:
    return lm.generate(PROMPT, temperature=0, logit_bias=dict.fromkeys(lm.eos_token_ids, -1e9), **options)


def test_max_new_tokens_is_the_default_budget(tmp_path: Path) -> None:
    lm = model(tmp_path, max_new_tokens=5, max_length=2)  # the first wins, as in transformers
    assert (len(answer(lm).tokens), answer(lm).finish_reason) == (5, "length")
    assert len(answer(lm, max_tokens=7).tokens) == 7


def test_max_length_counts_the_prompt(tmp_path: Path) -> None:
    lm = model(tmp_path, max_length=9)
    assert len(answer(lm).tokens) == 5
    assert len(answer(lm, max_tokens=7).tokens) == 7
    with pytest.raises(UsageError, match=r"9 tokens, .* generation_config\.json .* 9 \(max_length\)"):
        lm.generate([1, *range(9, 17)])


def test_stop_strings_end_an_answer_unless_the_caller_has_others(tmp_path: Path) -> None:
    lm = model(tmp_path)
    text = answer(lm, max_tokens=12).text
    stop = text[len(text) // 2 :][:2]
    shutil.rmtree(tmp_path / "model")
    lm = model(tmp_path, stop_strings=[stop])
    stopped = answer(lm, max_tokens=12)
    assert (stopped.text, stopped.finish_reason) == (text[: text.find(stop)], "stop")
    assert answer(lm, max_tokens=12, stop=()).text == text
    assert answer(lm, max_tokens=12, stop="\0").text == text


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": "hot"},
        {"top_k": -1},
        {"top_p": 7},
        {"repetition_penalty": 0},
        {"do_sample": "yes"},
        {"max_new_tokens": 0},
        {"max_new_tokens": True},
        {"max_length": 2.5},
        {"stop_strings": 3},
        {"stop_strings": ["a", ""]},
        {"stop_strings": ["a", None]},
    ],
)
def test_an_error_names_the_file_and_the_key(settings: dict[str, Any]) -> None:
    (key,) = settings
    with pytest.raises(ConfigError, match=rf"^generation_config\.json: .*{key}"):
        GenerationDefaults.read(settings)


def test_nothing_set_and_null_is_no_limit() -> None:
    for raw in ({}, dict.fromkeys(["max_new_tokens", "max_length", "stop_strings", "top_k", "do_sample"])):
        read = GenerationDefaults.read(raw)
        assert (read.stop, read.budget(1000), read.sampling.temperature, read.ignored) == ((), None, 0.0, ())


def test_what_is_not_honoured_is_said() -> None:
    raw = {"max_time": 3.0, "num_beams": 4, "forced_eos_token_id": 2, "min_length": 0}
    assert set(GenerationDefaults.read(raw).ignored) == {"max_time = 3.0", "num_beams = 4", "forced_eos_token_id = 2"}


@pytest.mark.parametrize("raw", [{"do_sample": False}, {"temperature": 0.6}, {"top_k": 1}, {"do_sample": True}])
def test_whether_the_file_says_anything_of_sampling(raw: dict[str, Any]) -> None:
    assert GenerationDefaults.read({**raw, "max_new_tokens": 5}).says_sampling
    silent = {**dict.fromkeys(raw), "max_new_tokens": 5, "eos_token_id": 2}
    assert not GenerationDefaults.read(silent).says_sampling
