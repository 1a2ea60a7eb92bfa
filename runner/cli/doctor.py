"""`runner doctor`: reports what this machine has, what is missing, and the commands that fix it."""

from __future__ import annotations

import json
import os
import platform
import sys
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal

import typer

from runner import installation
from runner.cli import terminal
from runner.cli.options import AsJson

if TYPE_CHECKING:
    from runner.ops.backend import BackendReport

# distribution -> what does not work without it; None: nothing works without it
PACKAGES: dict[str, str | None] = {
    "tokenizers": None,
    "safetensors": None,
    "jinja2": None,
    "huggingface-hub": "models can only be read from local directories",
    "sentencepiece": "models that have only a tokenizer.model cannot be read",
}
MARKS = {"ok": ("✓", "ok", "green"), "note": ("·", "--", "yellow"), "missing": ("✗", "NO", "red")}


@dataclass(frozen=True)
class Check:
    """One line of the report.

    Attributes:
        state: "missing" if the program cannot be used without it; "note" for a missing part or for information.
        fix: the command that fixes it.
        needs: what must be installed before `fix` is run.
    """

    name: str
    state: Literal["ok", "note", "missing"]
    value: str
    fix: str | None = None
    needs: str | None = None


def doctor(*, as_json: AsJson = False) -> None:
    """Check this machine: python, MLX and its device, packages, cache. Exits 1 if models cannot run."""
    from runner.ops.backend import describe

    checks = [check_python(), *check_mlx(describe()), *map(check_package, PACKAGES), *check_hub()]
    usable = all(check.state != "missing" for check in checks)
    if as_json:
        rows = {"usable": usable, "checks": [asdict(check) for check in checks]}
        terminal.Output().line(json.dumps(rows, indent=2))
    else:
        print_checks(checks, usable)
    if not usable:
        raise typer.Exit(1)


def check_python() -> Check:
    """Check Python's version; also shows the system, the processor and the number of cores."""
    where = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    state: Literal["ok", "missing"] = "ok" if sys.version_info >= (3, 11) else "missing"
    fix = None if state == "ok" else "install Python 3.11 or later"
    return Check("python", state, f"{platform.python_version()}   {where}", fix)


def check_mlx(report: BackendReport) -> list[Check]:
    """Check MLX, its device, its memory and our kernels; if MLX cannot run, one line says why."""
    if report.problem is not None:
        return [Check("mlx", "missing", report.problem, report.fix)]
    from runner.cli.tables import size

    gpu = "" if report.working_set is None else f", of which macOS gives the GPU {size(report.working_set)}"
    return [
        Check("mlx", "ok", report.mlx_version or "version unknown"),
        Check("device", "ok", report.device),
        Check("memory", "ok", size(report.memory_bytes) + gpu),
        check_kernels(report),
        *(Check(remark.name, "note", remark.text, remark.fix) for remark in report.remarks),
    ]


def check_kernels(report: BackendReport) -> Check:
    """Check our kernels; without them plain MLX computes, which is slower but no failure."""
    if report.notice is None:
        return Check("kernels", "ok", report.kernels)
    return Check("kernels", "note", report.notice, report.fix, report.needs)


def check_package(name: str) -> Check:
    """Check that a distribution is installed, by its metadata: nothing is imported."""
    from importlib.metadata import PackageNotFoundError, version  # late, as in `runner.ops.backend`

    try:
        return Check(name, "ok", version(name))
    except PackageNotFoundError:
        consequence = PACKAGES[name]
        state: Literal["note", "missing"] = "missing" if consequence is None else "note"
        value = "not installed" if consequence is None else f"not installed: {consequence}"
        return Check(name, state, value, installation.pip(name))


def check_hub() -> list[Check]:
    """Report the cache directory and the hub's environment variables; a token's value is never printed."""
    home = os.environ.get("HF_HOME") or os.path.join("~", ".cache", "huggingface")
    cache = os.path.expanduser(os.environ.get("HF_HUB_CACHE") or os.path.join(home, "hub"))
    checks = [Check("hub cache", "ok", cache)]
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        checks.append(
            Check("hub", "note", "offline (HF_HUB_OFFLINE is set): only cached models load", "unset HF_HUB_OFFLINE")
        )
    if os.environ.get("HF_TOKEN"):
        checks.append(Check("hub token", "ok", "set (HF_TOKEN)"))
    return checks


def print_checks(checks: list[Check], usable: bool) -> None:
    """Print marks, names and values in columns, each fix under its line, and a verdict at the end."""
    from runner.cli import tables

    unicode = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    table = tables.columns("", "", "")
    for check in checks:
        symbol, word, style = MARKS[check.state]
        table.add_row(
            tables.cell(symbol if unicode else word, style), tables.cell(check.name), tables.cell(check.value)
        )
        if check.needs is not None:
            table.add_row("", "", tables.cell(f"install {check.needs}, then run:"))
        if check.fix is not None:
            table.add_row("", "", tables.cell(check.fix, "cyan"))
    mark = MARKS["missing"][0 if unicode else 1]
    verdict = "ready" if usable else f"not usable yet: run the command under each line marked {mark}"
    tables.show(table, "", tables.cell(verdict, "green" if usable else "red"))
