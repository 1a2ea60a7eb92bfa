"""README.md and the usage pages: every command and example runs, and quoted help texts and code are current."""

from __future__ import annotations

import ast
import inspect
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from places import ROOT

from runner.cli.app import COMMANDS
from runner.keywords import ChatOptions
from runner.language_model import LanguageModel

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = ROOT / "docs" / "usage"
MODEL = ROOT / "tests" / "fixtures" / "llama" / "llama-gqa"
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


LIBRARY = (ROOT / "docs" / "library.md").read_text(encoding="utf-8")


def blocks(language: str, page: str = README) -> list[str]:
    return [text for name, text in FENCE.findall(page) if name == language]


def test_every_command_has_a_page_with_its_help() -> None:
    for entry in COMMANDS:
        page = (PAGES / f"{entry.name}.md").read_text(encoding="utf-8")
        assert f"$ runner {entry.name} --help\n" in page
        assert f"(docs/usage/{entry.name}.md)" in README


def test_the_commands_of_readme_and_pages_run_and_copies_are_current() -> None:
    """scripts/docs/make_docs runs each command with a tiny checkpoint, and compares help texts and generated parts."""
    command = [sys.executable, str(ROOT / "scripts" / "docs" / "make_docs"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_moving_picture_is_whole() -> None:
    """Every command of the recording stands in it, its pieces in the order of their moments."""
    root = ElementTree.parse(ROOT / "docs" / "demo.svg").getroot()
    pieces = [each for each in root if each.tag.endswith("}text")]
    moments = [float(each[0].attrib["keyTimes"].partition(";")[2]) for each in pieces]
    assert moments == sorted(moments) and moments[0] > 0 and moments[-1] < 1
    shown = "".join(each.text or "" for each in pieces).replace(" ", "")
    assert "$runnergeneratesmollm2" in shown and "$runnerchatsmollm2" in shown and "/bye" in shown


def test_the_check_finds_a_stale_page_and_a_failing_command(tmp_path: Path) -> None:
    def check(text: str) -> subprocess.CompletedProcess[str]:
        (tmp_path / "page.md").write_text(f"```console\n{text}```\n")
        command = [sys.executable, str(ROOT / "scripts" / "docs" / "make_docs"), "--check", str(tmp_path / "page.md")]
        return subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)

    stale = check("$ runner list --help\nUsage: of another time\n")
    assert stale.returncode == 1 and "-Usage: of another time" in stale.stdout
    failing = check("$ runner list --nonsense\n")
    assert failing.returncode != 0 and "exit code 2" in failing.stderr
    assert check("$ echo one\ntwo\n").returncode == 0  # its output is not compared


def test_the_library_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = [text for text in blocks("python") if "runner.load(" in text]
    assert example.count('"path-or-hub-id"') == 1
    exec(compile(example.replace('"path-or-hub-id"', repr(str(MODEL))), "README.md", "exec"), {})
    assert len(capsys.readouterr().out) > 10


def test_the_librarys_page_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Block after block, as one program; each shows something or defines what the next ones use."""
    model = shutil.copytree(MODEL, tmp_path / "model")
    raw = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**raw, "max_position_embeddings": 4096}))
    names: dict[str, object] = {"__name__": "__main__"}
    found = blocks("python", LIBRARY)
    assert len(found) >= 8
    for text in found:
        exec(compile(text.replace('"MODEL"', repr(str(model))), "docs/library.md", "exec"), names)
    shown = capsys.readouterr().out
    for words in (
        "LanguageModel('model', llama",
        "Timings(prompt: ",
        "tokens were there",
        "did you mean 'temperature'",
    ):
        assert words in shown, words


def test_the_librarys_page_has_every_option_and_method() -> None:
    for name in ChatOptions.__annotations__:
        assert re.search(rf"`{name}\b|\b{name}=", LIBRARY), name
    for name, member in vars(LanguageModel).items():
        if inspect.isfunction(member) and not name.startswith("_"):
            assert re.search(rf"\b{name}\b", LIBRARY), name


def test_the_other_python_examples_parse() -> None:
    for text in blocks("python"):
        ast.parse(text)


RUN_BY = {
    "scripts/demo": ".ci/run",
    "scripts/test": ".ci/run",
    'pip install ".[cpu]"': "scripts/setup_venv",
    "scripts/setup_venv": "scripts/test",
    "scripts/wheel": "tests/project/test_packaging.py",
    "scripts/check_mac": "tests/project/test_check_mac.py",
    "scripts/check_cuda": "tests/ops/cuda/test_compiling.py",
    "scripts/fixtures/make_fixtures": "scripts/fixtures/requirements-oracle.txt",
    "scripts/fixtures/make_config_keys": "scripts/fixtures/requirements-oracle.txt",
    "scripts/compare/compare_configs": "scripts/fixtures/requirements-oracle.txt",
    "brew install python@3.13": "scripts/setup_venv",
    "uv python install 3.13": "scripts/setup_venv",
}
"""What runs a command that is no `runner ...`: CI, a test, a script that one of them runs. The last five take a machine
or an environment that no test has: transformers' (they are run by hand when a family is added), or a Mac."""
COMMAND = re.compile(r"(runner [a-z]|scripts/(?!\S*\.py\b)|pip |brew |uv ).*")


def commands(page: str) -> list[str]:
    """Every command of a page: lines of console and shell blocks, and what stands between backticks in its text."""
    found = [line[2:] for text in blocks("console", page) for line in text.splitlines() if line.startswith("$ ")]
    found += [line.split("  #")[0].strip() for text in blocks("sh", page) for line in text.splitlines()]
    prose = FENCE.sub("", page)
    return found + [span for span in re.findall(r"`([^`\n]+)`", prose) if COMMAND.fullmatch(span)]


def not_run(page: str, *, recorded: bool) -> list[str]:
    """The commands of a page that nothing runs.

    Args:
        recorded: whether scripts/docs/make_docs --check runs the console blocks of the page (the test above).
    """
    console = {line[2:] for text in blocks("console", page) for line in text.splitlines() if line.startswith("$ ")}
    left = []
    for command in commands(page):
        name, _, rest = command.removeprefix("runner ").partition(" ")
        usage = PAGES / f"{name}.md"
        if command.startswith("runner ") and not (recorded and command in console):
            # Beside the text: the command's own page runs it, with these options among others.
            ran = usage.exists() and [line for line in commands(usage.read_text()) if line.startswith(f"runner {name}")]
            options = [word for word in rest.split() if word.startswith("-")]
            if not ran or not all(any(option in line for line in ran) for option in options):
                left.append(command)
        elif not command.startswith("runner ") and not (recorded and command in console):
            where = ROOT / RUN_BY.get(command, "nowhere")
            if not where.exists() or (command in console):
                left.append(command)
    return left


def test_every_command_of_the_readme_is_run_by_something() -> None:
    assert len(commands(README)) >= 15
    assert not_run(README, recorded=True) == []
    for page in ("install.md", "limits.md"):
        assert not_run((ROOT / "docs" / page).read_text(encoding="utf-8"), recorded=False) == []


@pytest.mark.parametrize(
    "command", ["runner chatt", "`runner bench x --nope`", "scripts/nothing", "```sh\nmake install\n```"]
)
def test_a_command_that_nothing_runs_is_found(command: str) -> None:
    text = command if command.startswith("`") else f"`{command}`"
    assert len(not_run(f"{README}\n{text}\n", recorded=True)) == 1


def test_what_runs_them_names_them() -> None:
    """.ci/run runs `scripts/test` and `scripts/demo`; setup_venv runs pip's line, same directory and extras."""
    ci = (ROOT / ".ci" / "run").read_text()
    for name in ("test", "demo"):
        assert f'"$scripts/{name}"' in ci and (ROOT / "scripts" / name).stat().st_mode & 0o100
    for command, where in RUN_BY.items():
        text = (ROOT / where).read_text(encoding="utf-8")
        if command.startswith("scripts/") and where.startswith(("tests/", "scripts/test")):
            assert command.rpartition("/")[2] in text, command
        elif command.startswith(("brew", "uv")):
            assert command in text, command
    setup = (ROOT / "scripts" / "setup_venv").read_text()
    # What pip is given: this directory, with the extras that were there and those that are missing of the wanted ones.
    (installs,) = [line.strip() for line in setup.splitlines() if line.strip().startswith("pip -e")]
    assert installs == 'pip -e "$root${has:+[$has]}"' and "else backend=cpu; fi" in setup
    assert 'wanted="$(echo "$backend,${1:-}"' in setup and "for extra in ${wanted//,/ }; do" in setup
    assert 'has="$(echo "$has,$missing"' in setup.split(installs)[0]


def test_links_lead_somewhere() -> None:
    for page in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")):
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert "://" in target or (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_tree_of_the_package_is_complete() -> None:
    (tree,) = [text for text in blocks("text") if text.startswith("runner/\n")]
    named = set(re.findall(r"\w+(?:/|\.py)", tree.partition("\n")[2]))
    package = ROOT / "runner"
    found = [*package.iterdir(), *(path.parent for path in package.glob("*/*/__init__.py"))]
    there = {f"{path.name}/" if path.is_dir() else path.name for path in found if path.suffix in ("", ".py")}
    assert named == there - {"__pycache__/", "__init__.py", "__main__.py"}
