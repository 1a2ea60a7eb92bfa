"""The pages about serving: their commands parse, their paths and files are those of the code."""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from pathlib import Path

import pytest
from places import ROOT
from typer.main import get_command

from runner.cli.app import build
from runner.server.app import paths
from runner.server.limits import Options
from runner.server.serving import Serving

PAGES = [ROOT / "docs" / "serving.md", ROOT / "docs" / "usage" / "serve.md"]
TEXT = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)


def parses(words: list[str]) -> None:
    get_command(build()).commands["serve"].make_context("serve", words)  # type: ignore[attr-defined]


def test_every_command_parses(tmp_path: Path) -> None:
    (settings,) = re.findall(r"```toml\n(.*?)```", TEXT, re.DOTALL)
    (tmp_path / "serve.toml").write_text(settings)
    assert len(tomllib.loads(settings)) >= 4
    found = re.findall(r"(?:^|`|: )(runner serve [^`\n]+)", TEXT, re.MULTILINE)
    assert len(found) >= 4
    for line in found:
        words = shlex.split(line.replace("serve.toml", str(tmp_path / "serve.toml")))[2:]
        if "--help" not in words:
            parses(words)
    with pytest.raises(Exception, match="nope"):
        parses(["--nope"])


EVERY = {
    "model": ["a", "b"], "host": "0.0.0.0", "port": 81, "uds": "/s", "root-path": "/x", "api-key-file": "k",
    "no-auth": True, "allow-host": ["h"], "allow-origin": ["https://o"], "alias": ["n=a"], "adapter": ["p=d"],
    "draft": "c", "allow-pull": True, "pin": ["a"], "keep-alive": "5m", "memory": "6GB", "context": 77,
    "cache-dir": "d", "cache-size": "1GB", "max-queue": 3, "unknown-fields": "warn", "on-engine-failure": "restart",
    "shutdown-timeout": 2.5, "log-level": "debug", "dtype": "float16", "activations": "int8",
}  # fmt: skip
"""A value for each option, other than the usual one."""


def test_a_file_has_every_option_under_its_name(tmp_path: Path) -> None:
    """And means by it what the command line means."""
    command = get_command(build()).commands["serve"]  # type: ignore[attr-defined]
    options = {max(each.opts, key=len).removeprefix("--") for each in command.params} - {"config", "help"}
    assert options == set(EVERY)
    file = tmp_path / "serve.toml"
    file.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in EVERY.items()))
    words = []
    for key, value in EVERY.items():
        for each in value if isinstance(value, list) else [value]:
            words += [str(each)] if key == "model" else [f"--{key}"] if each is True else [f"--{key}", str(each)]
    read, said = (command.make_context("serve", given).params for given in (["--config", str(file)], words))
    usual = command.make_context("serve", []).params
    assert {**read, "config": None} == {**said, "config": None}
    assert [name for name in usual if name not in ("config", "help") and read[name] == usual[name]] == []


def test_every_path_is_told() -> None:
    for path in paths(Serving([], Options())):
        shown = path.replace(":path", "")
        assert shown in TEXT or path == "/ping", path


def test_every_test_that_is_named_is_there() -> None:
    page = (ROOT / "docs" / "serving_tests.md").read_text(encoding="utf-8")
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py")]
    there = set(re.findall(r"def (test_\w+)\(", "".join(sources)))
    named = re.findall(r"`(test_\w+)`", page)
    assert len(named) > 100
    assert [name for name in named if name not in there] == []


def test_the_clients_are_those_of_the_lock_file() -> None:
    page = (ROOT / "docs" / "serving_tests.md").read_text(encoding="utf-8")
    lock = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    for client in ("openai", "anthropic", "ollama"):
        (version,) = [line.partition("==")[2] for line in lock if line.startswith(f"{client}==")]
        assert re.search(rf"{client}\s{re.escape(version)}", page), client
