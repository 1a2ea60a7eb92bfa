"""`runner generate --json-schema` and its like: the answer has that form, or the option is refused by its name."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest
from command_line import run
from places import TESTS

from runner.cli.constraint_options import ConstraintOptions
from runner.constraints import Choice, JsonObject, JsonSchema, Lark, Regex
from runner.errors import UsageError

MODEL = str(TESTS / "fixtures" / "llama" / "llama-gqa")
SCHEMA = '{"type": "object", "properties": {"n": {"type": "integer", "maximum": 99}}, "required": ["n"]}'
RAW = ("--raw", "--seed", "4", "--temp", "1", "-n", "60")


def test_what_the_options_ask_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    schema, grammar = tmp_path / "schema.json", tmp_path / "start.lark"
    schema.write_text(SCHEMA)
    grammar.write_text('start: "a" | "b"\n')
    assert ConstraintOptions().constraint() is None
    for given in (SCHEMA, str(schema)):
        assert ConstraintOptions(json_schema=given).constraint() == JsonSchema(SCHEMA)
    for given in ('start: "a" | "b"\n', str(grammar)):
        assert ConstraintOptions(grammar=given).constraint() == Lark('start: "a" | "b"\n')
    assert ConstraintOptions(json_object=True).constraint() == JsonObject()
    assert ConstraintOptions(regex="[ab]+").constraint() == Regex("[ab]+")
    assert ConstraintOptions(choice=["a", "b"]).constraint() == Choice(("a", "b"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--regex", "a", "--choice", "b"], "--regex and --choice each say what the answer must be"),
        (["--json-schema", "/nowhere.json"], "--json-schema /nowhere.json: no text of its own, and no file"),
        (["--json-schema", "{"], "the JSON schema is not JSON"),
        (["--grammar", 'root ::= "a"'], "this is GBNF"),
        (["--choice", ""], "none of them empty"),
        (["--regex", ""], "not an empty one"),
    ],
)
def test_what_is_refused_before_a_model_is_loaded(arguments: list[str], words: str) -> None:
    done = run("generate", "/nowhere", "hello", *arguments)
    assert done.returncode == 2 and words in done.stderr and not done.stdout


def test_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"--regex needs the package llguidance: .*constraints"):
        ConstraintOptions(regex="a").constraint()


def test_answers_have_their_form(tmp_path: Path) -> None:
    pytest.importorskip("llguidance")
    schema = tmp_path / "schema.json"
    schema.write_text(SCHEMA)
    forms = (["--json-schema", str(schema)], ["--regex", "[0-9]{3}"], ["--choice", "yes", "--choice", "no"])
    texts = [run("generate", MODEL, "abc", *RAW, *form).stdout.strip() for form in forms]
    assert set(json.loads(texts[0])) >= {"n"}
    assert re.fullmatch("[0-9]{3}", texts[1]) and texts[2] in ("yes", "no")
    refused = run("generate", MODEL, "abc", *RAW, "--json-schema", '{"not": {"type": "null"}}')
    assert refused.returncode == 2 and "not" in refused.stderr and not refused.stdout


def test_a_file_of_prompts_has_one_form(tmp_path: Path) -> None:
    pytest.importorskip("llguidance")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('"a"\n"b"\n"c"\n')
    done = run("generate", MODEL, "--file", str(prompts), *RAW, "--regex", "[0-9]{2}")
    assert [bool(re.fullmatch("[0-9]{2}", json.loads(line)["text"])) for line in done.stdout.splitlines()] == [True] * 3
