"""`runner list`, `alias`, `rm` and `pull` from outside, and the names that other commands take."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from command_line import own, run
from hub_cache import COMMIT, cached
from places import ROOT, TESTS
from pseudo_terminal import Terminal

from runner.errors import UsageError

MODEL = TESTS / "fixtures" / "llama" / "llama-gqa"
GREEDY = ["--temperature", "0", "--max-tokens", "4"]


class Account:
    """A user with a data directory and a hub cache of their own."""

    def __init__(self, home: Path) -> None:
        self.home = home

    def run(self, *arguments: str, **environment: str) -> CompletedProcess[str]:
        own_places = {"XDG_DATA_HOME": str(self.home / "data"), "XDG_CONFIG_HOME": str(self.home / "config")}
        cache = {"HF_HUB_CACHE": str(self.home / "hub"), "HF_HUB_OFFLINE": "1"}
        return run(*arguments, **{**own_places, **cache, **environment})

    def has_alias(self, name: str) -> None:
        """Let `name` stand for the fixture, as `runner alias` does."""
        table = self.home / "data" / "runner" / "names.json"
        table.parent.mkdir(parents=True, exist_ok=True)
        table.write_text(json.dumps({"version": 1, "aliases": {name: str(MODEL)}, "stored": {}}))

    def done(self, *arguments: str, **environment: str) -> str:
        done = self.run(*arguments, **environment)
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture
def account(tmp_path: Path) -> Account:
    return Account(tmp_path)


def test_a_converted_model_is_listed_used_and_deleted_by_its_name(account: Account) -> None:
    path = account.home / "Tiny-Llama"
    account.done("convert", str(MODEL), str(path))
    (row,) = json.loads(account.done("list", "--json"))
    assert (row["name"], row["id"], row["path"]) == ("tiny", str(path), str(path)) and row["stored_by_runner"]
    assert row["bytes"] == sum(file.stat().st_size for file in path.iterdir())
    assert account.done("generate", "tiny", "abc", *GREEDY) == account.done("generate", str(MODEL), "abc", *GREEDY)
    refused = account.run("rm", "tiny")
    assert refused.returncode == 2 and "--yes" in refused.stderr and path.exists()
    assert f"deleted {path}" in account.run("rm", "tiny", "--yes").stderr
    assert not path.exists() and json.loads(account.done("list", "--json")) == []


@pytest.mark.parametrize("out", ["none/../Tiny", "link", "link/../Tiny", "Tiny/"])
def test_a_converted_model_is_runners_however_its_path_is_written(account: Account, out: str) -> None:
    (account.home / "elsewhere/empty").mkdir(parents=True)
    (account.home / "link").symlink_to("elsewhere/empty")
    path = account.done("convert", str(MODEL), f"{account.home}/{out}").removesuffix("\n")
    (row,) = json.loads(account.done("list", "--json"))
    assert row["path"] == os.path.realpath(path) and row["stored_by_runner"] and row["bytes"] > 0
    assert "deleted" in account.run("rm", path, "--yes").stderr and not os.path.exists(path)


def test_a_model_of_another_program_is_listed_and_not_deleted(account: Account) -> None:
    files = {file.name: file.read_bytes() for file in MODEL.iterdir()}
    path = cached(account.home / "hub", "org/Tiny-1B", files)
    shown = account.done("list").splitlines()
    assert shown[0].split() == ["name", "model", "revision", "size"]
    assert shown[1].split()[:3] == ["tiny", "org/Tiny-1B", COMMIT[:12]]
    pulled = account.run("pull", "org/Tiny-1B")
    assert pulled.stdout == f"{path}\n" and pulled.stderr == "(its name here: tiny)\n"
    done = account.run("rm", "tiny", "--yes")
    assert done.returncode == 2 and "another program" in done.stderr and path.exists()


def test_aliases_are_made_shown_changed_and_dropped(account: Account) -> None:
    shutil.copytree(MODEL, account.home / "m")
    assert account.done("alias", "mine", str(account.home / "m")) == f"mine = {account.home}/m\n"
    assert account.done("generate", "mine", "abc", *GREEDY) != ""
    done = account.run("alias", "mine", "org/name")
    assert done.stdout == "mine = org/name\n" and f"was {account.home}/m until now" in done.stderr
    assert account.done("alias") == account.done("alias", "mine") == "mine = org/name\n"
    assert account.done("list").splitlines()[1].split() == ["mine", "org/name", "not", "here"]
    account.done("rm", "mine", "--yes")
    assert account.done("alias") == "" and (account.home / "m").exists()
    assert account.run("alias", "mine").returncode == 2


def test_a_model_that_only_aliases_name_is_listed_as_others_are(account: Account) -> None:
    model = shutil.copytree(MODEL, account.home / "m")
    size = sum(file.stat().st_size for file in model.iterdir())
    account.done("alias", "mine", str(model))
    account.done("alias", "ours", str(model))
    account.done("alias", "theirs", "org/name")
    mine, theirs = json.loads(account.done("list", "--json", RUNNER_MODEL="ours"))
    assert (mine["name"], mine["aliases"], mine["path"], mine["bytes"]) == ("mine", ["ours"], str(model), size)
    assert mine["default"] and not mine["stored_by_runner"] and not theirs["default"]
    assert (theirs["name"], theirs["id"], theirs["path"], theirs["bytes"]) == ("theirs", "org/name", None, None)
    line = account.done("list", RUNNER_MODEL="ours").splitlines()[1]
    assert line.startswith(f"mine, ours (default)   {model} ") and line.endswith("kB")


def test_an_alias_is_dropped_where_a_path_of_others_has_its_name(
    account: Account, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = shutil.copytree(MODEL, account.home / "mine")
    account.done("alias", "mine", str(model))
    monkeypatch.chdir(account.home)
    assert "mine is no name for" in account.run("rm", "mine", PYTHONPATH=str(ROOT)).stderr
    assert model.exists() and account.done("alias", PYTHONPATH=str(ROOT)) == ""


def test_rm_asks_on_a_terminal(account: Account) -> None:
    path = account.home / "Tiny"
    account.done("convert", str(MODEL), str(path))
    places = {"XDG_DATA_HOME": str(account.home / "data"), "HF_HUB_CACHE": str(account.home / "hub")}
    for answer, there in (("\n", True), ("no\n", True), ("y\n", False)):
        terminal = Terminal("rm", "tiny", columns=80, **places)
        terminal.expect(r"delete [\s\S]*\[y/N\] ")
        terminal.send(answer)
        assert terminal.process.wait(timeout=60) == int(there) and path.exists() == there
        os.close(terminal.master)


def test_list_and_alias_load_nothing_heavy(account: Account) -> None:
    heavy = ["mlx", "numpy", "huggingface_hub.hf_api", "httpx", "jinja2", "tokenizers", "safetensors"]
    code = (
        "import sys\nfrom runner.cli.app import run\nassert run(['list', '--json']) == run(['alias']) == 0\n"
        f"print([name for name in {heavy!r} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert "[]" in done.stderr.splitlines()


def test_nothing_is_deleted_where_one_of_several_may_not_be(account: Account) -> None:
    path = account.home / "Tiny"
    account.done("convert", str(MODEL), str(path))
    done = account.run("rm", "tiny", "nonesuch", "--yes")
    assert done.returncode == 1 and "nonesuch" in done.stderr and path.exists()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["generate", "tinny", "x"], 1, "no model is called 'tinny': did you mean tiny?"),
        (["pull", "./"], 2, "'./' is a path, and it is on this machine already"),
        (["pull", "tiny"], 2, "a path"),
        (["alias", "a/b", "tiny"], 2, "'a/b' cannot be an alias"),
        (["alias", "x", "none"], 1, "no model is called 'none'"),
        (["generate", "tinny"], 1, "no model is called 'tinny': did you mean tiny?"),
        (["generate", "tiny"], 2, "the prompt is empty: 'tiny' is the model"),
        (["generate", "org/name"], 2, "the prompt is empty: 'org/name' is the model"),
        (["rm", "."], 2, "was not stored by runner"),
    ],
)
def test_a_wrong_name_is_one_line_with_the_right_one(
    account: Account, arguments: list[str], code: int, words: str
) -> None:
    account.has_alias("tiny")
    done = account.run(*arguments)
    assert (done.returncode, done.stdout) == (code, "")
    assert words in own(done.stderr) and own(done.stderr).count("\n") == 1


# --- the default model ------------------------------------------------------------------------------------------------


def test_with_a_default_a_single_argument_is_the_prompt_unless_it_names_a_model(account: Account) -> None:
    wanted = account.done("generate", str(MODEL), "abc", *GREEDY)
    default = {"RUNNER_MODEL": str(MODEL)}
    assert account.done("generate", "abc", *GREEDY, **default) == wanted
    assert account.done("generate", "-p", "abc", *GREEDY, **default) == wanted
    assert account.done("generate", str(MODEL), "abc", *GREEDY, RUNNER_MODEL="org/other") == wanted
    account.has_alias("tiny")
    for named in ("tiny", str(MODEL), "org/name", "./none", "x.gguf"):
        done = account.run("generate", named, *GREEDY, **default)
        assert done.returncode in (1, 2) and done.stdout == "", (
            named
        )  # a model without a prompt, or one that is missing
    near = account.run("generate", "tinny", *GREEDY, **default)
    assert near.returncode == 0 and "tiny is one" in near.stderr


def test_the_default_comes_from_the_variable_or_the_file(account: Account) -> None:
    wanted = account.done("inspect", str(MODEL), "--json")
    settings = account.home / "config/runner/config.toml"
    settings.parent.mkdir(parents=True)
    settings.write_text(f'model = "{MODEL}"\n')
    assert account.done("inspect", "--json") == wanted == account.done("inspect", "--json", RUNNER_MODEL="")
    done = account.run("inspect", RUNNER_MODEL="nope")
    assert done.returncode == 1 and "'nope'" in done.stderr and "set as the default in RUNNER_MODEL" in done.stderr
    for text, words in [
        ("model = ", "not valid TOML"),
        ("model = 1", "must be a text"),
        ('modell = "x"', "'modell' is not a setting: there is model"),
        ('model = "./none"', f"./none: no such file or directory (set as the default in {settings})"),
    ]:
        settings.write_text(text)
        done = account.run("generate", "abc")
        assert done.returncode == 1 and words in done.stderr and str(settings) in done.stderr
        # It concerns nobody who names a model.
        done = account.run("generate", str(MODEL), "abc", *GREEDY)
        assert done.returncode == 0 and own(done.stderr) == ""
    settings.write_text(f'model = "{MODEL}"\ntheme = "dark"\n')
    done = account.run("inspect", "--json")  # of a later version, say
    assert done.stdout == wanted and "'theme' is not a setting" in done.stderr
    assert account.run("generate", "abc", *GREEDY).stderr.count("'theme' is not a setting") == 1


def test_list_marks_the_default(account: Account) -> None:
    account.done("convert", str(MODEL), str(account.home / "Tiny-Llama"))
    assert "tiny (default) " in account.done("list", RUNNER_MODEL="tiny")
    done = account.run("list", RUNNER_MODEL="nope")
    assert done.returncode == 0 and "'nope'" in done.stderr and "(default)" not in done.stdout


@pytest.mark.parametrize(
    ("arguments", "default", "words"),
    [
        (["generate", "What is it?"], "", "'What is it?' is no model: name one before the text, or set a default"),
        (["generate", "tiny", "What", "is", "it"], "", 'needs quotes, as in "What is it"'),
        (["generate", "What", "is", "it"], "tiny", 'needs quotes, as in "What is it"'),
        (["generate", "tiny", "What", "is", "it"], "tiny", 'needs quotes, as in "What is it"'),
        (["generate", "-m", "tiny", "What", "is", "it"], "", 'needs quotes, as in "What is it"'),
        (["generate", "-m", "tiny", "What", "is"], "", "needs quotes"),
        (["generate", "What", "is"], "tiny", 'needs quotes, as in "What is"'),
        (["generate", "tiny", "x", "--preset", "blanced"], "", "'blanced': did you mean balanced?"),
        (["bench", "Llama-3.2-1b"], "", "'Llama-3.2-1b': did you mean Llama-3.2-1B?"),
        (["bench", "shape:Llama-3.2-1b"], "", "'Llama-3.2-1b': did you mean Llama-3.2-1B?"),
    ],
)
def test_a_slip_of_the_hand_is_named_with_what_was_meant(
    account: Account, arguments: list[str], default: str, words: str
) -> None:
    account.has_alias("tiny")
    done = account.run(*arguments, RUNNER_MODEL=default)
    assert (done.returncode, done.stdout) == (2, "") and words in own(done.stderr), done.stderr
    assert own(done.stderr).count("\n") == 1


def test_a_models_name_comes_before_a_published_shape(account: Account, monkeypatch: pytest.MonkeyPatch) -> None:
    from runner.bench.models import published

    account.done("convert", str(MODEL), str(account.home / "SmolLM2-135M-mine"))
    monkeypatch.setenv("XDG_DATA_HOME", str(account.home / "data"))
    assert published("SmolLM2-360M") == published("shape:SmolLM2-360M") == "SmolLM2-360M"
    assert published("smollm2") is None and published("org/SmolLM2-360M") is None
    with pytest.raises(UsageError, match=r"could be .*-mine, or the published shape: write shape:SmolLM2-135M"):
        published("SmolLM2-135M")
    assert published("shape:SmolLM2-135M") == "SmolLM2-135M"
    account.done("alias", "SmolLM2-135M", str(MODEL))
    assert published("SmolLM2-135M") is None
    monkeypatch.chdir(account.home)
    Path("SmolLM2-360M").mkdir()
    assert published("SmolLM2-360M") is None
