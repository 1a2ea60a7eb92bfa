"""`runner generate --file`: prompts of a file, in order, gone on with where the last run was left."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from command_line import run
from places import TESTS

import runner
from runner.cli.prompt_file import Answers, Asked, read
from runner.errors import UsageError
from runner.ops.device import current

MODEL = str(TESTS / "fixtures" / "llama" / "llama-spm")
DTYPE = None if current().ops.one_form else "float32"  # in 16 bits, GPUs' sums depend on what is computed beside them
OPTIONS = ("--raw", "--max-tokens", "6", "--temperature", "0.8", "--seed", "3", *(("--dtype", DTYPE) if DTYPE else ()))


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    lines: list[Any] = ["The cat", {"prompt": "Of all", "id": "second"}, {"prompt": "x " * 400}, *map(str, range(9))]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    return path


def test_answers_are_those_of_single_prompts_in_order(prompts: Path) -> None:
    done = run("generate", MODEL, "--file", str(prompts), *OPTIONS)
    assert done.returncode == 1
    assert "1 of 12 prompts could not be answered" in done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["index"] for line in lines] == list(range(12))
    assert lines[1]["id"] == "second"
    assert "128" in lines[2]["error"]
    lm = runner.load(MODEL, dtype=DTYPE)
    for line, text in zip(lines[3:], map(str, range(9)), strict=True):
        alone = lm.generate(text, max_tokens=6, temperature=0.8, seed=3)
        assert (line["text"], line["tokens"]) == (alone.text, len(alone.tokens))


def test_verbose_counts_all_answers_together(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(text) + "\n" for text in ("a cat", "a dog", "a cat")))
    done = run("generate", MODEL, "--file", str(path), "--verbose", *OPTIONS)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    prompt, made, memory = re.findall(r"(?m)^(?:Prompt|Generation): (\d+) tokens|^Peak (memory)", done.stderr)
    assert int(made[0]) == sum(line["tokens"] for line in lines) > 0 and memory[1]
    assert 0 < int(prompt[0]) <= sum(line["prompt_tokens"] for line in lines)


def test_a_run_goes_on_where_the_last_one_was_left(prompts: Path, tmp_path: Path) -> None:
    whole, part = tmp_path / "whole.jsonl", tmp_path / "part.jsonl"
    assert run("generate", MODEL, "--file", str(prompts), "--output", str(whole), *OPTIONS).returncode == 1
    text = whole.read_bytes()
    part.write_bytes(text[: len(text) // 2])
    done = run("generate", MODEL, "--file", str(prompts), "--output", str(part), *OPTIONS)
    assert "are answered already" in done.stderr
    assert part.read_bytes() == text
    prompts.write_text(json.dumps("another") + "\n")
    refused = run("generate", MODEL, "--file", str(prompts), "--output", str(part), *OPTIONS)
    assert refused.returncode == 2 and "answers another prompt" in refused.stderr
    assert part.read_bytes() == text


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 2 is no JSON"),
        ("[1]", "line 2 must be a text"),
        ('{"promt": "a"}', "'promt'"),
        ('{"id": 3}', 'either "prompt" or "messages"'),
        ('{"prompt": ""}', "not empty"),
        ('{"messages": "a"}', "must be a list"),
    ],
)
def test_lines_of_another_form_are_named_before_anything_runs(line: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(f'"fine"\n{line}\n')
    done = run("generate", "/nowhere", "--file", str(path))
    assert done.returncode == 2 and words in done.stderr and not done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--file", "a.jsonl", "--json"], "--json is for one prompt"),
        (["a prompt", "--file", "a.jsonl"], "the prompts are those of --file"),
        (["a prompt", "--output", "a.jsonl"], "--output is for the answers to --file"),
        (["--file", "/nowhere/a.jsonl"], "/nowhere/a.jsonl"),
    ],
)
def test_options_that_do_not_go_together(arguments: list[str], words: str) -> None:
    done = run("generate", MODEL, *arguments)
    assert done.returncode == 2 and words in done.stderr


ASKED = [Asked("The cat", None, "ab12"), Asked("Of all", None, "cd34")]


def begun(path: Path) -> Answers:
    answers = Answers(path)
    answers.open(ASKED)
    return answers


@pytest.mark.parametrize(
    "content", ["precious", "a\nprecious", '{"index": 0, "prompt_sha256": "ab13", "te', '"The cat"']
)
def test_what_is_no_answer_stays(content: str, tmp_path: Path) -> None:
    """A text without a line's end is no line that was broken off."""
    path = tmp_path / "notes.txt"
    path.write_text(content)
    with pytest.raises(UsageError, match=r"is no answer|ends with what is no answer"):
        begun(path)
    assert path.read_text() == content


def test_the_beginning_of_an_answer_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    line = json.dumps({"index": 0, "prompt_sha256": "ab12", "text": "sat"}) + "\n"
    for count in range(len(line)):
        path.write_text(line[:count])
        begun(path).close()
        assert path.read_text() == ""
    path.write_text(line + '{"index": 1, "prompt_sha256": "cd34", "text": "th')
    begun(path).close()
    assert path.read_text() == line


def test_one_run_at_a_time_writes_and_only_to_files(tmp_path: Path) -> None:
    answers = begun(tmp_path / "answers.jsonl")
    with pytest.raises(UsageError, match="another run"):
        begun(tmp_path / "answers.jsonl")
    answers.close()
    begun(tmp_path / "answers.jsonl").close()
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/null")):
        with pytest.raises(UsageError, match="no regular file"):
            begun(path)


@pytest.mark.parametrize("number", ["1e999", "NaN", '"\\ud800"', "[-1e999]"])
def test_an_id_that_cannot_be_written_is_named(number: str, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(f'"fine"\n{{"prompt": "x", "id": {number}}}\n')
    with pytest.raises(UsageError, match="line 2: the id cannot be written"):
        read(path)
