"""pip accepts the commands that errors and `doctor` suggest, for each way the package can have been installed."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT

from runner import installation

DIRECTORY = {"url": ROOT.as_uri(), "dir_info": {}}
GIT = {"url": "https://example.org/r.git", "vcs_info": {"vcs": "git", "commit_id": "1" * 40}}
WHEEL = {"url": "file:///tmp/mlx_runner-0.1.0-py3-none-linux_x86_64.whl", "archive_info": {}}


@pytest.mark.parametrize(
    ("package", "origin", "wanted"),
    [
        (ROOT / "runner", {}, ["-e", f"{ROOT}[cpu]"]),
        (Path("/site/runner"), DIRECTORY, [f"{ROOT}[cpu]"]),
        (Path("/site/runner"), {"url": "file:///gone", "dir_info": {}}, ["mlx-runner[cpu]"]),
        (Path("/site/runner"), GIT, ["mlx-runner[cpu] @ git+https://example.org/r.git"]),
        (Path("/site/runner"), WHEEL, ["mlx-runner[cpu]"]),
        (Path("/site/runner"), {}, ["mlx-runner[cpu]"]),
    ],
)
def test_what_pip_is_given(package: Path, origin: dict[str, object], wanted: list[str]) -> None:
    assert installation.requirement("cpu", package, origin) == wanted


def test_commands_are_lines_for_a_shell(tmp_path: Path) -> None:
    checkout = tmp_path / "with space"
    checkout.mkdir()
    for name in ("pyproject.toml", "setup.py"):
        (checkout / name).touch()
    words = installation.requirement("", checkout / "runner")
    assert shlex.split(installation.pip(*words)) == [sys.executable, "-m", "pip", "install", "-e", str(checkout)]


@pytest.mark.parametrize("dependencies", [True, False])
def test_pip_understands_the_options_of_a_rebuild(dependencies: bool) -> None:
    """Without the requirement, pip complains that there is nothing to install, and about no option."""
    words = shlex.split(installation.rebuild(dependencies=dependencies))
    assert ("--no-deps" in words) is not dependencies
    done = subprocess.run(words[: words.index("-e")], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode != 0 and "at least one requirement" in done.stderr


def test_requirements_that_are_not_met(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.metadata

    def version(name: str) -> str:
        if name == "missing":
            raise importlib.metadata.PackageNotFoundError(name)
        return {"typer": "0.21.0", "rich": "15.0", "mlx": "0.32.4rc1"}[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    needed = ["typer>=0.29.2,<0.30", "rich>=15,<16", "mlx (>=0.32.4,<0.33)", "missing>=1", "extra>=1; extra == 'x'"]
    found = ["typer 0.21.0 (>=0.29.2,<0.30 is needed)", "missing (it is not installed)"]
    assert installation.unmet(needed) == found


def test_this_installation_has_what_it_needs() -> None:
    assert installation.unmet() == []


def test_a_bug_of_an_installation_without_its_requirements(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from runner.cli import app

    assert app.report(AttributeError("get_runtime_param"), []) == 1
    assert "this is a bug" in capsys.readouterr().err
    monkeypatch.setattr(installation, "unmet", lambda: ["typer 0.21.0 (>=0.29.2,<0.30 is needed)"])
    assert app.report(AttributeError("get_runtime_param"), []) == 1
    said = capsys.readouterr().err
    assert "typer 0.21.0 (>=0.29.2,<0.30 is needed)" in said and "pip install" in said
