"""Turns that share a prompt cache give the same tokens as turns without one, and prefill fewer tokens."""

from __future__ import annotations

import pytest
from places import TESTS

import runner
from runner.answer import Chunk
from runner.engine.prompt_cache import PromptCache
from runner.language_model import LanguageModel

FIXTURES = TESTS / "fixtures" / "llama"
FIRST = [1, 30, 31, 32, 33, 34, 35, 36]


def answer(lm: LanguageModel, ids: list[int], kept: PromptCache | None, count: int = 6) -> list[Chunk]:
    return list(
        lm.stream(
            ids, max_tokens=count, temperature=0, logit_bias=dict.fromkeys(lm.eos_token_ids, -1e9), prompt_cache=kept
        )
    )


def tokens(chunks: list[Chunk]) -> list[int]:
    return [chunk.token for chunk in chunks]


def cached(chunks: list[Chunk]) -> int:
    timings = chunks[-1].timings
    assert timings is not None
    return timings.cached_tokens


@pytest.fixture(params=["llama-gqa", "mistral-window", "llama-rope-dynamic", "llama-rope-longrope"])
def lm(request: pytest.FixtureRequest) -> LanguageModel:
    return runner.load(FIXTURES / request.param, dtype="float32")


def turns(said: list[int]) -> list[tuple[str, list[int]]]:
    """Prompts of a second turn that may follow the first prompt and its answer."""
    history = [*FIRST, *said]
    return [
        ("goes on", [*history, 40, 41, 42]),
        ("the same again", FIRST),
        ("cut back", [*FIRST[:5], 50, 51]),
        ("shorter", FIRST[:3]),
        ("another", [2, 3, 4]),
    ]


@pytest.mark.parametrize("index", range(5))
def test_a_second_turn_equals_a_fresh_one(lm: LanguageModel, index: int) -> None:
    kept = lm.prompt_cache()
    said = tokens(answer(lm, FIRST, kept))
    assert said == tokens(answer(lm, FIRST, None))
    name, prompt = turns(said)[index]
    again = answer(lm, prompt, kept)
    assert tokens(again) == tokens(answer(lm, prompt, None)), name
    expected = {"goes on": len(FIRST) + len(said) - 1, "the same again": len(FIRST) - 1, "cut back": 5, "shorter": 2}
    wanted = 0 if lm.config.rope_depends_on_length else expected.get(name, 0)
    assert cached(again) == wanted, name


def test_an_answer_left_early_can_go_on() -> None:
    lm = runner.load(FIXTURES / "llama-gqa", dtype="float32")
    kept = lm.prompt_cache()
    stream = lm.stream(FIRST, max_tokens=20, temperature=0, prompt_cache=kept)
    said = [next(stream).token for _ in range(3)]
    stream.close()  # the caches hold a token more than was read
    prompt = [*FIRST, *said, 40, 41]
    again = answer(lm, prompt, kept)
    assert tokens(again) == tokens(answer(lm, prompt, None))
    # One kernel for whole steps reads a token when it is asked for the next one.
    assert cached(again) == len(FIRST) + len(said) - lm.engine.compiled.whole


def test_a_window_that_moved_on_starts_again() -> None:
    lm = runner.load(FIXTURES / "mistral-window", dtype="float32")
    kept = lm.prompt_cache()
    window = lm.config.cache_window(0)
    assert window is not None
    long = [1 + i % 40 for i in range(lm.context_length - 4)]
    assert len(long) > window
    for prompt in (long, long[:20], [*long[:20], 7]):
        assert tokens(answer(lm, prompt, kept, 2)) == tokens(answer(lm, prompt, None, 2))


@pytest.mark.parametrize(
    "model", ["llama-gqa", "mistral-window", "../families/llama4_text-base", "../families/qwen3_5_text-base"]
)
def test_a_chat_of_many_turns_reads_only_what_is_new(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six turns, one of them an edit of an earlier one; windows move on at every turn, so that only marks lead back."""
    monkeypatch.setattr("runner.cache.kv.STEP", 4)
    lm = runner.load(FIXTURES / model, dtype="float32")
    kept = lm.prompt_cache()
    prompt, prompts, again = list(FIRST), [], []
    for turn in range(6):
        if turn == 3:
            prompt = [*prompts[1], 37, 38]  # the second answer is asked for anew
        prompts.append(prompt)
        found = answer(lm, prompt, kept)
        assert tokens(found) == tokens(answer(lm, prompt, None)), turn
        again.append(len(prompt) - cached(found))
        # A template that drops what came last (its thinking) parts inside the answer.
        said = tokens(found)[:4] if turn % 2 else tokens(found)
        prompt = [*prompt, *said, 40 + turn, 46, 47]
    fresh = [len(prompt) for prompt in prompts]
    assert again[0] == fresh[0] and again[3] <= 3 + 1  # back to the mark at the end of the second prompt
    # At most the last answer and what is new, never the conversation.
    assert all(count <= 6 + 3 + 1 for count in again[1:]), (again, fresh)
    assert max(fresh) > 30
