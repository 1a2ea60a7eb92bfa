"""The demo checkpoint end to end; `scripts/test` fetches it and sets RUNNER_DEMO_MODEL."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
from places import ROOT

import runner
from runner.perplexity import perplexity, read_ids

MODEL = os.environ.get("RUNNER_DEMO_MODEL")
pytestmark = pytest.mark.real
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
ANSWER = "The capital of France is Paris."


@pytest.fixture(scope="module")
def lm() -> Iterator[runner.LanguageModel]:
    assert MODEL, (
        "RUNNER_DEMO_MODEL must name the demo checkpoint: run scripts/test, or export it from scripts/fetch_demo"
    )
    yield runner.load(MODEL)


def test_it_knows_the_capital_of_france(lm: runner.LanguageModel) -> None:
    result = lm.chat(QUESTION, temperature=0, max_tokens=20)
    assert result.text == ANSWER and result.finish_reason == "stop"


def test_stop_strings_budgets_and_cancelling(lm: runner.LanguageModel) -> None:
    assert lm.chat(QUESTION, temperature=0, stop=" of France").text == "The capital"
    short = lm.chat(QUESTION, temperature=0, max_tokens=3)
    assert (len(short.tokens), short.finish_reason) == (3, "length")
    assert lm.chat(QUESTION, temperature=0, cancelled=lambda: True).finish_reason == "cancelled"


def test_perplexity_is_that_of_a_model_that_knows_the_language(lm: runner.LanguageModel) -> None:
    """The MIT License, which every model has read often, has a far lower perplexity than its words in another order."""
    words = (ROOT / "LICENSE").read_text(encoding="utf-8").split()
    found = {}
    for name, text in (("as written", " ".join(words)), ("sorted", " ".join(sorted(words)))):
        ids, bos = read_ids(lm.tokenizer, text)
        assert bos is None  # this tokenizer adds none
        found[name] = perplexity(lm.engine, ids, bos=bos, chunk=128).perplexity
    assert 1 < found["as written"].value < 10 < found["sorted"].value
    assert all(0 < estimate.error < estimate.value for estimate in found.values())


def test_too_long_a_prompt_is_refused_with_both_numbers(lm: runner.LanguageModel) -> None:
    with pytest.raises(runner.RunnerError, match=r"9000 tokens.*8192"):
        lm.generate([5] * 9000)


def test_the_command_line_streams_the_answer_to_stdout_alone() -> None:
    command = [sys.executable, "-m", "runner", "generate", str(MODEL), "What is the capital of France?", "--chat"]
    done = subprocess.run([*command, "--temperature", "0"], capture_output=True, text=True, check=True, timeout=300)
    assert done.stdout.strip() == ANSWER
    done = subprocess.run(
        [*command, "--temperature", "0", "--json"], capture_output=True, text=True, check=True, timeout=300
    )
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert "".join(row["text"] for row in rows) == ANSWER and rows[-1]["finish_reason"] == "stop"
