"""`runner.Engine`: the chunks of many answers at once are those of a stream alone."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from places import TESTS

import runner
from runner.answer import gather
from runner.errors import UsageError

SPM = TESTS / "fixtures" / "llama" / "llama-spm"
TEXTS = ["The cat", "The cat sat on", "A", "Of all the"]


@pytest.fixture(scope="module")
def lm() -> runner.LanguageModel:
    return runner.load(SPM, dtype="float32")


@pytest.fixture
def engine(lm: runner.LanguageModel) -> Iterator[runner.Engine]:
    with runner.Engine(lm) as made:
        yield made


OPTIONS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.8, "seed": 3, "logprobs": 2},
    {"temperature": 1.1, "seed": 4, "lookup": True},
    {"temperature": 0.9, "seed": 5, "repetition_penalty": 1.2},
]


def plain(chunks: list[runner.Chunk]) -> list[tuple[Any, ...]]:
    return [(c.text, c.token, c.finish_reason, [i for i, _ in c.top_logprobs or ()]) for c in chunks]


def test_chunks_are_those_of_a_stream(lm: runner.LanguageModel, engine: runner.Engine) -> None:
    answers = [engine.submit(text, max_tokens=20, **options) for text, options in zip(TEXTS, OPTIONS, strict=True)]
    for answer, text, options in zip(answers, TEXTS, OPTIONS, strict=True):
        found = list(answer)
        assert plain(found) == plain(list(lm.stream(text, max_tokens=20, **options)))
        assert found[-1].timings is not None
        assert answer.reused + answer.read == found[-1].timings.prompt_tokens + found[-1].timings.cached_tokens


def test_a_stop_text_ends_an_answer(lm: runner.LanguageModel, engine: runner.Engine) -> None:
    whole = lm.generate(TEXTS[0], max_tokens=30, temperature=0.0)
    stop = whole.text[6:9]
    found = gather(engine.submit(TEXTS[0], max_tokens=30, temperature=0.0, stop=stop))
    assert (found.text, found.finish_reason) == (whole.text[: whole.text.index(stop)], "stop")


def test_coroutines(lm: runner.LanguageModel, engine: runner.Engine) -> None:
    async def ask(text: str) -> list[runner.Chunk]:
        return [chunk async for chunk in engine.submit(text, max_tokens=9, temperature=0.0)]

    async def all_of_them() -> Any:
        return await asyncio.gather(*map(ask, TEXTS))

    for found, text in zip(asyncio.run(all_of_them()), TEXTS, strict=True):
        assert plain(found) == plain(list(lm.stream(text, max_tokens=9, temperature=0.0)))


def test_an_answer_that_is_broken_off_says_why(engine: runner.Engine) -> None:
    *_, last = engine.submit(TEXTS[0], temperature=0.0, timeout=0.0)
    assert (last.token, last.finish_reason) == (-1, "timeout")
    answer = engine.submit(TEXTS[1], temperature=0.0)
    answer.cancel()
    *_, last = answer
    assert last.finish_reason in ("cancelled", "length")
    assert list(answer) == []


def test_choices_read_their_prompt_once(engine: runner.Engine) -> None:
    answers = [engine.submit("Of all the " * 12, max_tokens=6, temperature=1.0, seed=1, choice=n) for n in range(3)]
    found = [gather(answer).tokens for answer in answers]
    assert len(set(map(tuple, found))) > 1
    assert answers[0].reused == 0
    assert all(answer.read == 1 for answer in answers[1:])


def test_a_closed_engine_says_so(lm: runner.LanguageModel) -> None:
    engine = runner.Engine({"one": lm})
    answer = engine.submit(TEXTS[0], model="one", temperature=0.0)
    engine.close()
    with pytest.raises(UsageError, match="closed"):
        for _ in range(1000):
            list(answer)
    with pytest.raises(UsageError, match="closed"):
        engine.submit(TEXTS[0], model="one")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"prompt_cache": None, "cancelled": lambda: False}, "cancelled is not for an engine"),
        ({"temprature": 1.0}, "temperature"),
        ({"model": "other"}, "no model is called"),
    ],
)
def test_wrong_options(engine: runner.Engine, options: dict[str, Any], message: str) -> None:
    with pytest.raises((UsageError, TypeError), match=message):
        engine.submit("A", **options)
