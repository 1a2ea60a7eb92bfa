"""Shell scripts: words that macOS's bash 3.2 and BSD tools lack, and what they say on machines unlike this one."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from places import ROOT

LINUX_ONLY = {"sanitize"}
SCRIPTS = {
    path.name: path.read_text(encoding="utf-8")
    for path in sorted((ROOT / "scripts").glob("*"))
    if path.is_file() and re.match(rb"#!.*\b(ba)?sh\n", path.read_bytes()[:64])
}
NEWER_THAN_BASH_3 = {
    r"\b(mapfile|readarray|coproc|wait -n)\b": "bash 4's builtins",
    r"\b(declare|local|typeset) -[aAinrx]*[An]\b": "maps and references",
    r"\$\{\w+(,,?|\^\^?|@)": "changes of case",
    r"\|&|&>>|\$\{\w+: -": "redirections and offsets from the end",
    r"\$\([^)]*<<|<\([^)]*<<|\$\([^)]*<\(": "documents and processes in substitutions, which bash 3.2 misreads",
}
GNU_ALONE = {
    r"(^|[;&|(]|\b\w+=\S+) *(timeout|nproc|tac|shuf|numfmt|realpath|sha256sum|md5sum)\b": "programs",
    r"\b(readlink -f|sed -[Ei]*i|sed -r|grep -[a-z]*P|stat -c|date -d|sort -V|xargs -r|head -c -|du -b)": "flags",
    r"\bmktemp( -d)?( *$|\))": "a template that BSD's mktemp needs",
}


@pytest.mark.parametrize("name", sorted(SCRIPTS))
def test_scripts_use_what_a_mac_has(name: str) -> None:
    text = re.sub(r"^ *#.*|\s# .*", "", SCRIPTS[name], flags=re.MULTILINE)
    if name in LINUX_ONLY:
        assert '[ "$(uname -s)" = Linux ] ||' in text.split("\n\n")[0]
        return
    for pattern, what in (NEWER_THAN_BASH_3 | GNU_ALONE).items():
        found = re.search(pattern, text, re.MULTILINE)
        assert found is None, f"{name}: {found[0]!r} ({what})"


def test_the_patterns_find_what_they_name() -> None:
    """What the scripts had, and its like."""
    had = [
        "mapfile -t needs",
        'x="$(A=3 timeout 300 x)"',
        "readlink -f x",
        'a="${b,,}"',
        "declare -A map",
        'x="$(cat <(ls))"',
    ]
    for line in had:
        assert any(re.search(pattern, line) for pattern in NEWER_THAN_BASH_3 | GNU_ALONE), line
    assert "setup_venv" in SCRIPTS and "fetch_demo" in SCRIPTS


def stub(place: Path, name: str, body: str) -> None:
    place.mkdir(exist_ok=True)
    (place / name).write_text(f"#!/bin/sh\n{body}\n")
    (place / name).chmod(0o755)


def on_a_mac(
    tmp_path: Path, *, chip: str = "1", macos: str = "14.5", **pythons: str
) -> subprocess.CompletedProcess[str]:
    """setup_venv on a machine that calls itself a Mac; `pythons`: the machine each names, "" if it is too old."""
    tools = tmp_path / "tools"
    stub(tools, "uname", "echo Darwin")
    stub(tools, "sysctl", f"echo {chip}")
    stub(tools, "sw_vers", f"echo {macos}")
    for name, machine in pythons.items():
        # Asked for its version: by its exit code; for its machine: by its word; for modules: that it has none.
        body = (
            f'case "$2" in *version_info*) exit {0 if machine else 1} ;; *machine*) echo {machine} ;; *) exit 1 ;; esac'
        )
        stub(tools, name.replace("_", "."), body)
    for name in ("dirname", "cat", "grep", "sed", "cksum", "bash", "env"):
        (tools / name).symlink_to(shutil.which(name) or name)
    environment = {"PATH": str(tools), "RUNNER_VENV": str(tmp_path / "venv")}
    command = [str(ROOT / "scripts" / "setup_venv")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, check=False)
    assert not (tmp_path / "venv").exists()
    return done


def test_setup_notices_a_python_under_rosetta(tmp_path: Path) -> None:
    done = on_a_mac(tmp_path, python3_12="x86_64", python3="")
    assert done.returncode == 1
    assert f"{tmp_path}/tools/python3.12 is built for Intel and runs under Rosetta" in done.stderr
    assert "arm64 Python 3.11 to 3.13: brew install python@3.13, or uv python install 3.13" in done.stderr


def test_setup_passes_over_a_python_under_rosetta(tmp_path: Path) -> None:
    """An arm64 one further down the list is taken: the stub has no venv module, which is what fails next."""
    done = on_a_mac(tmp_path, python3_13="x86_64", python3_11="arm64")
    assert done.returncode == 1 and "cannot make virtual environments" in done.stderr and "Rosetta" not in done.stderr


@pytest.mark.parametrize(
    ("machine", "said"),
    [
        ({"chip": "0", "python3": "x86_64"}, "Macs with Apple silicon only"),
        ({"macos": "13.6.1", "python3": "arm64"}, "macOS 14 or later, this is macOS 13.6.1"),
        ({"python3": ""}, "Python 3.11, 3.12 or 3.13 is needed: brew install python@3.13"),
    ],
)
def test_setup_says_what_a_mac_lacks(tmp_path: Path, machine: dict[str, str], said: str) -> None:
    done = on_a_mac(tmp_path, **machine)
    assert done.returncode == 1 and said in done.stderr


def on_debian(tmp_path: Path, *, lacks: str = "") -> subprocess.CompletedProcess[str]:
    """setup_venv on a Linux with a Python 3.11 and all that it needs but the things named in `lacks`."""
    tools, include = tmp_path / "tools", tmp_path / "include"
    shutil.rmtree(tools, ignore_errors=True)
    stub(tools, "uname", "echo Linux")
    if "compiler" not in lacks:
        stub(tools, "g++", "")
    include.mkdir(exist_ok=True)
    (include / "Python.h").unlink(missing_ok=True)
    if "headers" not in lacks:
        (include / "Python.h").touch()
    body = f"""case "$*" in
    *version_info*) exit {int("python" in lacks)} ;;
    *ensurepip*) exit {int("venv" in lacks)} ;;
    *sysconfig*) echo "{include}" ;;
    --version) echo Python 3.11.2 ;;
    *-m\\ venv*) mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; cp "$0" "$3/bin/runner" ;;
    *-m\\ pip*) echo "pip $*" >>{tmp_path}/pips ;;
esac"""
    stub(tools, "python3", body)
    for name in ("dirname", "cat", "grep", "sed", "cksum", "bash", "env", "rm", "mkdir", "cp"):
        (tools / name).symlink_to(shutil.which(name) or name)
    environment = {"PATH": str(tools), "RUNNER_VENV": str(tmp_path / "venv")}
    command = [str(ROOT / "scripts" / "setup_venv")]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, check=False)


@pytest.mark.parametrize(
    ("lacks", "said"),
    [
        ("python", "Python 3.11, 3.12 or 3.13 is needed: apt install python3 python3-venv (Debian 12 or later)"),
        ("venv", "Python 3.11.2 cannot make virtual environments (on Debian: apt install python3-venv)"),
    ],
)
def test_setup_says_what_a_bare_debian_lacks(tmp_path: Path, lacks: str, said: str) -> None:
    done = on_debian(tmp_path, lacks=lacks)
    assert done.returncode == 1 and said in done.stderr and not (tmp_path / "venv").exists()


@pytest.mark.parametrize(
    ("lacks", "said"),
    [
        ("compiler", "no C++ compiler (on Debian: apt install g++ python3-dev): the CPU kernels are left out"),
        ("headers", "Python's headers are missing (on Debian: apt install python3-dev): the CPU kernels are left out"),
    ],
)
def test_kernels_that_a_machine_could_not_build_are_built_once_it_can(tmp_path: Path, lacks: str, said: str) -> None:
    def pips() -> int:
        return (tmp_path / "pips").read_text().count("pip -m pip install")

    done = on_debian(tmp_path, lacks=lacks)
    assert done.returncode == 0 and said in done.stderr and pips() == 1
    assert on_debian(tmp_path, lacks=lacks).stderr == "" and pips() == 1
    assert on_debian(tmp_path).stderr == "setup_venv: building the kernels anew\n" and pips() == 2
    assert on_debian(tmp_path).stderr == "" and pips() == 2


def test_the_demo_says_why_it_does_not_come_from_the_hub(tmp_path: Path) -> None:
    """Not always the network: what `pull` said last stands there, on a machine without `timeout` too."""
    tools, cache = tmp_path / "tools", tmp_path / "cache"
    for name in ("dirname", "mkdir", "mktemp", "tail", "rm", "mv", "bash", "env"):
        tools.mkdir(exist_ok=True)
        (tools / name).symlink_to(shutil.which(name) or name)
    body = f"""case "$*" in
    *"runner pull"*) [ "$1" = -m ] || exec {sys.executable} "$@"; echo "error: no space left on device" >&2; exit 1 ;;
    *"runner convert"*) mkdir -p "$5"; : >"$5/config.json" ;;
    *"-m zipfile"*) mkdir -p "$4" ;;
esac"""
    stub(tmp_path / "venv", "unused", "")
    stub(tmp_path / "venv" / "bin", "python", body)
    environment = {"PATH": str(tools), "RUNNER_VENV": str(tmp_path / "venv"), "RUNNER_CACHE": str(cache)}
    command = [str(ROOT / "scripts" / "fetch_demo")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, check=False)
    assert "not from the hub: error: no space left on device" in done.stderr
    assert "can't be reached" not in done.stderr


def test_the_line_that_the_demo_ends_with_works(tmp_path: Path) -> None:
    """In a clone whose environment and checkpoint are there: typed where the demo was, it is a chat with the model."""
    clone, bin = tmp_path / "a clone", tmp_path / "a clone" / ".venv" / "bin"
    (clone / "scripts").mkdir(parents=True)
    for name in ("demo", "fetch_demo"):
        shutil.copy(ROOT / "scripts" / name, clone / "scripts")
    bin.mkdir(parents=True)
    for path, line in [
        (clone / "scripts" / "setup_venv", "exit 0"),
        (bin / "python", f'exec "{sys.executable}" "$@"'),
        (bin / "runner", f'exec "{sys.executable}" -m runner "$@"'),
    ]:
        path.write_text(f"#!/bin/sh\n{line}\n")
        path.chmod(0o755)
    model = ROOT / "tests" / "fixtures" / "llama" / "llama-gqa"
    shutil.copytree(model, clone / ".cache" / "SmolLM2-135M-Instruct")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_DATA_HOME": str(tmp_path / "data"), "RUNNER_VENV": ""}
    environment |= {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "RUNNER_CACHE": ""}
    options: Any = {"env": environment, "capture_output": True, "text": True, "timeout": 120}
    (tmp_path / "other").mkdir()
    for place, runner in [(clone, ".venv/bin/runner"), (tmp_path / "other", str(bin / "runner").replace(" ", "\\ "))]:
        done = subprocess.run([str(clone / "scripts" / "demo"), "abc"], cwd=place, check=True, **options)
        found = re.fullmatch(rf"next: ({re.escape(runner)} chat smollm2)", done.stderr.splitlines()[-1])
        assert found is not None and done.stdout != "", done.stderr
        chat = subprocess.run(["bash", "-c", f"{found[1]} -n 4"], cwd=place, input="hello\n", check=True, **options)
        assert chat.stdout != ""


def test_linux_only_scripts_say_so(tmp_path: Path) -> None:
    stub(tmp_path / "tools", "uname", "echo Darwin")
    environment = {**os.environ, "PATH": f"{tmp_path / 'tools'}:{os.environ['PATH']}"}
    for name in LINUX_ONLY:
        command = [str(ROOT / "scripts" / name)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, check=False)
        assert done.returncode == 1 and "on Linux only" in done.stderr


def english(place: Path) -> dict[str, str]:
    """Settings of an account in whose language isa_avx2.cpp stands before isa.h; none where they can't be made."""
    made = place / "en_US.UTF-8"
    program = shutil.which("localedef")
    if program is not None:
        subprocess.run([program, "-i", "en_US", "-f", "UTF-8", str(made)], capture_output=True, check=False)
    return {"LOCPATH": str(place), "LC_ALL": made.name} if made.is_dir() else {}


def test_setup_adds_the_requirements_of_an_extra_alone(tmp_path: Path) -> None:
    """To an environment that has the rest: each requirement is one word for pip, spaces and brackets as they are."""
    place = tmp_path / "venv"
    (place / "bin").mkdir(parents=True)
    stub(place / "bin", "runner", "")
    stub(place / "bin", "python", f'[ "$2" = pip ] || exec {sys.executable} "$@"; printf "%s\\n" "$@" >>"$0.said"')
    environment = {**os.environ, "RUNNER_VENV": str(place), "RUNNER_STRICT_BUILD": "0", **english(tmp_path)}
    packages = [(ROOT / "pyproject.toml").read_bytes()]
    packages += [line for line in (ROOT / "requirements.lock").open("rb") if not line.lstrip(b" ").startswith(b"#")]
    kernels = [path.read_bytes() for path in (ROOT / "setup.py", *sorted((ROOT / "runner/ops/cpu/src").iterdir()))]
    sums = [
        subprocess.run(["cksum"], input=b"".join(parts), capture_output=True, check=True).stdout.decode().strip()
        for parts in (packages, kernels)
    ]
    (place / "runner.stamp").write_text("\n".join([*sums, "0", "cpu,cuda13,dev"]) + "\n")
    done = subprocess.run(
        [str(ROOT / "scripts" / "setup_venv"), "dev,plot"], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0 and done.stderr == "setup_venv: adding [plot]\n"
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    said = (place / "bin" / "python.said").read_text().splitlines()
    assert said[-len(extras["plot"]) - 1 :] == [str(ROOT / "requirements.lock"), *extras["plot"]]
    assert (place / "runner.stamp").read_text().splitlines()[-1] == "cpu,cuda13,dev,plot"
