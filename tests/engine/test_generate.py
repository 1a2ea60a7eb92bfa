"""Generation: what is computed, what is cached, and that stopping and continuing never change an answer."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from places import TESTS

import runner
from runner.cache.kv import KVCache
from runner.engine.prompt_cache import PromptCache
from runner.errors import RunnerError, UsageError
from runner.families import Model
from runner.language_model import LanguageModel
from runner.nn.batch import Batch

FIXTURES = TESTS / "fixtures" / "llama"
PROMPT = [1 + i % 40 for i in range(20)]


class Watched:
    """A model that records how many rows each forward pass and each product with the head have."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.passes: list[int] = []
        self.rows: list[int] = []

    def __call__(self, batch: Batch, caches: list[KVCache]) -> mx.array:
        self.passes.append(batch.ids.shape[1])
        return self.model(batch, caches)

    def logits(self, hidden: mx.array) -> mx.array:
        self.rows.append(hidden.shape[1])
        return self.model.logits(hidden)


def greedy(lm: LanguageModel, ids: list[int], kept: PromptCache | None = None, count: int = 8) -> list[int]:
    never = dict.fromkeys(lm.eos_token_ids, -1e9)
    chunks = lm.stream(ids, max_tokens=count, temperature=0, logit_bias=never, prompt_cache=kept)
    return [chunk.token for chunk in chunks]


@pytest.fixture(scope="module", params=["llama-gqa", "mistral-window", "llama-mlx-4bit"])
def lm(request: pytest.FixtureRequest) -> Iterator[LanguageModel]:
    yield runner.load(FIXTURES / request.param, dtype="float32")


def watched(lm: LanguageModel, chunk: int = 8) -> tuple[Watched, LanguageModel]:
    """The same model, watched, with prompts in chunks."""
    device = dataclasses.replace(lm.device, chunk=chunk)
    seen = Watched(lm.model)
    return seen, dataclasses.replace(lm, engine=dataclasses.replace(lm.engine, device=device, model=seen))


def test_the_head_sees_the_last_row_and_decoding_is_one_token_ahead() -> None:
    seen, lm = watched(runner.load(FIXTURES / "llama-gqa"))
    done: list[tuple[int, int]] = []
    bias = dict.fromkeys(lm.eos_token_ids, -1e9)
    chunks = lm.stream(PROMPT, max_tokens=4, logit_bias=bias, on_prefill=lambda *steps: done.append(steps))
    next(chunks)
    assert (seen.passes, seen.rows) == ([8, 8, 4], [1])
    assert done == [(8, 20), (16, 20), (20, 20)]
    for ahead in (5, 6, 6):  # when a token is read, the pass after it has been started; the last one starts none
        next(chunks)
        assert len(seen.passes) == ahead


def test_a_prompt_is_cancelled_between_chunks() -> None:
    seen, lm = watched(runner.load(FIXTURES / "llama-gqa"))
    asked = iter([False, False, True])
    (chunk,) = lm.stream(PROMPT, cancelled=lambda: next(asked))
    assert chunk.finish_reason == "cancelled" and chunk.token == -1
    assert (seen.passes, seen.rows) == ([8, 8], [])


@pytest.mark.parametrize("beyond", [-1, 0, 1, 16])
def test_prompts_that_reach_the_window(beyond: int) -> None:
    """With and without the cache of an earlier turn, then with a branch from the middle of the prompt, and back."""
    lm = runner.load(FIXTURES / "mistral-window", dtype="float32")
    window = lm.config.cache_window(0)
    assert window is not None
    kept = lm.prompt_cache()
    long = [1 + i % 40 for i in range(window + beyond)]
    for prompt in (long[: window // 2], long, [*long[: window // 2], 7, 8], long, [*long, 9]):
        assert greedy(lm, prompt, kept, 4) == greedy(lm, prompt, None, 4)


@pytest.mark.parametrize("steps", [*range(1, 7), 11, 17])  # built, and replayed
def test_an_answer_may_be_left_at_any_token(lm: LanguageModel, steps: int) -> None:
    kept = lm.prompt_cache()
    whole = greedy(lm, PROMPT, count=20)
    stream = lm.stream(PROMPT, temperature=0, logit_bias=dict.fromkeys(lm.eos_token_ids, -1e9), prompt_cache=kept)
    said = [next(stream).token for _ in range(steps)]
    stream.close()
    assert said == whole[:steps]
    assert said + greedy(lm, PROMPT + said, kept, 20 - steps) == whole


def test_penalties_see_a_prompt_that_was_not_read_again(lm: LanguageModel) -> None:
    liked = dict.fromkeys(PROMPT, 6.0)
    options = {
        "max_tokens": 12,
        "temperature": 0,
        "repetition_penalty": 1.5,
        "frequency_penalty": 2.0,
        "logit_bias": liked,
    }
    alone = lm.generate(PROMPT, **options)
    kept = lm.prompt_cache()
    list(lm.stream(PROMPT, max_tokens=1, prompt_cache=kept))
    again = list(lm.stream(PROMPT, prompt_cache=kept, **options))
    timings = again[-1].timings
    assert timings is not None and timings.cached_tokens == len(PROMPT) - 1
    assert [chunk.token for chunk in again] == alone.tokens
    assert (
        alone.tokens != lm.generate(PROMPT, **{**options, "repetition_penalty": 1.0, "frequency_penalty": 0.0}).tokens
    )


def test_memory_stays_flat_over_many_answers(lm: LanguageModel) -> None:
    active = []
    for number in range(90):
        lm.generate(PROMPT[: 1 + number % 20], max_tokens=1 + number % 7, seed=number, logprobs=2, presence_penalty=0.1)
        lm.engine.run(mx.synchronize)  # a GPU may be computing the token after the last one still
        active.append(mx.get_active_memory())
    assert max(active[60:]) <= max(active[:30])


def test_no_stop_strings_may_be_said_with_none(lm: LanguageModel) -> None:
    assert (
        lm.generate(PROMPT, max_tokens=2, seed=1, stop=None).tokens == lm.generate(PROMPT, max_tokens=2, seed=1).tokens
    )


@pytest.mark.parametrize(
    ("prompt", "options", "words"),
    [
        ([1.5], {}, "integer token ids"),
        (["a"], {}, "integer token ids"),
        (None, {}, "integer token ids"),
        ([], {}, "empty"),
        ([1 << 20], {}, "not 1048576"),
        ("a", {"max_tokens": 1.5}, "max_tokens must be an integer"),
        ("a", {"max_tokens": True}, "max_tokens must be an integer"),
        ("a", {"stop": [3]}, "stop strings must be text"),
        ("a", {"logit_bias": [1]}, "logit_bias maps"),
        ("a", {"logit_bias": {3: "x"}}, "logit_bias maps"),
        ("a", {"topk": 3}, "did you mean 'top_k'"),
    ],
)
def test_wrong_arguments_are_named(lm: LanguageModel, prompt: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        lm.generate(prompt, **options)


def test_ids_may_be_numpys(lm: LanguageModel) -> None:
    wanted = lm.generate(PROMPT, max_tokens=3, seed=1).tokens
    for ids in (np.array(PROMPT), [np.int64(token) for token in PROMPT], tuple(PROMPT)):
        assert lm.generate(ids, max_tokens=3, seed=1).tokens == wanted


@pytest.mark.parametrize("place", ["config.json", "generation_config.json", "tokenizer_config.json"])
def test_each_end_token_ends_an_answer(tmp_path: Path, place: str) -> None:
    """The end tokens are the union of three files' ids, each an integer or a list; one file is changed at a time."""
    model = tmp_path / "model"
    shutil.copytree(FIXTURES / "llama-gqa", model)
    before = runner.load(model)
    token = next(index for index in greedy(before, PROMPT) if index not in before.eos_token_ids)
    path = model / place
    values = json.loads(path.read_text()) if path.exists() else {}
    if place == "tokenizer_config.json":
        ids = json.loads((model / "tokenizer.json").read_text())["model"]["vocab"]
        values["eos_token"] = next(name for name, index in ids.items() if index == token)
    else:
        old = values.get("eos_token_id")
        values["eos_token_id"] = [*(old if isinstance(old, list) else [] if old is None else [old]), token]
    path.write_text(json.dumps(values))
    lm = runner.load(model)
    assert token in lm.eos_token_ids
    answer = lm.generate(PROMPT, temperature=0, max_tokens=8)
    assert (answer.finish_reason, answer.tokens[-1]) == ("stop", token)


@pytest.mark.parametrize("key", ["auto_map", "model_file"])
def test_a_config_brings_no_code(tmp_path: Path, key: str) -> None:
    """Code named by a config never runs: `auto_map`'s in transformers if allowed, `model_file`'s in old mlx-lm."""
    model = tmp_path / "model"
    shutil.copytree(FIXTURES / "llama-gqa", model)
    (model / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    config = json.loads((model / "config.json").read_text())
    config[key] = {"AutoModelForCausalLM": "evil.Evil"} if key == "auto_map" else "evil.py"
    (model / "config.json").write_text(json.dumps(config))
    if key == "auto_map":
        runner.load(model).generate(PROMPT, max_tokens=1)
    else:
        with pytest.raises(RunnerError, match="model_file"):
            runner.load(model)
    assert not (tmp_path / "ran").exists()
