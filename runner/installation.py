"""pip commands that add what an installation lacks, in the way in which this package was installed."""

from __future__ import annotations

import json
import operator
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

NAME = "mlx-runner"


def extra() -> str:
    """Name of the extra with the MLX backend for this machine; "" on a Mac, where MLX comes with its backend."""
    if sys.platform == "darwin":
        return ""
    import shutil

    return "cuda13" if shutil.which("nvidia-smi") else "cpu"


def requirement(extras: str, package: Path | None = None, origin: dict[str, Any] | None = None) -> list[str]:
    """Arguments with which pip installs this package again, from the source tree or other place that it came from.

    Args:
        extras: names of extras, separated by commas; "" for none.
        package: the directory of the package; None: the directory of this one.
        origin: direct_url.json of the installed distribution (https://packaging.python.org/specifications/direct-url/),
            empty if it came from an index; None: read it from the installation.
    """
    brackets = f"[{extras}]" if extras else ""
    # A source tree: the package runs from it, whatever an installed distribution says.
    root = (package or Path(__file__).parent).parent
    if (root / "pyproject.toml").is_file() and (root / "setup.py").is_file():
        return ["-e", f"{root}{brackets}"]
    # Otherwise the directory or repository that pip recorded, and last the index.
    source = _origin() if origin is None else origin
    url = str(source.get("url", ""))
    if "dir_info" in source and (directory := Path(unquote(urlsplit(url).path))).is_dir():
        return [f"{directory}{brackets}"]
    if "vcs_info" in source:
        return [f"{NAME}{brackets} @ {source['vcs_info'].get('vcs', 'git')}+{url}"]
    return [f"{NAME}{brackets}"]


def install(extras: str) -> str:
    """Shell command that adds extras ("cpu", "plot", "cpu,dev") to this installation."""
    return pip(*requirement(extras))


def rebuild(*, dependencies: bool) -> str:
    """Shell command that compiles the CPU kernels again; with `dependencies`, also installs the MLX that they need.

    Wheels that pip built earlier or that an index has are not used: they were built without what is missing now.
    """
    options = ["--force-reinstall", "--no-cache-dir", "--no-binary", NAME]
    if not dependencies:
        options.append("--no-deps")
    return pip(*options, *requirement("cpu" if dependencies else ""))


def unmet(requirements: Sequence[str] | None = None) -> list[str]:
    """What is installed in a version that this package does not work with: `typer 0.21 (>=0.29.2,<0.30 is needed)`.

    Args:
        requirements: lines such as `typer>=0.29.2,<0.30`; None: those of this package, extras left out.
    """
    from importlib.metadata import PackageNotFoundError, version  # late, as in `runner.ops.backend`

    found = []
    for line in _requirements() if requirements is None else requirements:
        match = re.fullmatch(r"([A-Za-z0-9._-]+)\s*\(?([<>=!~0-9.,\s]*)\)?", line.strip())
        if match is None:  # of an extra, or with a condition
            continue
        name, bounds = match[1], [bound.strip() for bound in match[2].split(",") if bound.strip()]
        try:
            have = version(name)
        except PackageNotFoundError:
            found.append(f"{name} (it is not installed)")
            continue
        fits = {">=": operator.ge, "<": operator.lt, "==": operator.eq}
        tests = [(fits.get(bound.rstrip("0123456789. ")), bound.lstrip("<>=!~ ")) for bound in bounds]
        if any(test is not None and not test(_numbers(have), _numbers(bound)) for test, bound in tests):
            found.append(f"{name} {have} ({','.join(bounds)} is needed)")
    return found


def _numbers(version: str) -> list[int]:
    """The numbers that a version begins with, without zeros at the end."""
    numbers = [int(number) for number in re.findall(r"\d+", re.split(r"[^\d.]", version, maxsplit=1)[0])]
    while numbers and not numbers[-1]:
        numbers.pop()
    return numbers


def _requirements() -> list[str]:
    """What this package needs: as its source tree says, or its installation."""
    from importlib.metadata import PackageNotFoundError, requires

    project = Path(__file__).parent.parent / "pyproject.toml"
    if project.is_file():
        import tomllib

        stated: list[str] = (
            tomllib.loads(project.read_text(encoding="utf-8")).get("project", {}).get("dependencies", [])
        )
        return stated
    try:
        return requires(NAME) or []
    except PackageNotFoundError:
        return []


def _origin() -> dict[str, Any]:
    """Contents of direct_url.json of the installed distribution; empty if there is no such file or no distribution."""
    from importlib.metadata import PackageNotFoundError, distribution  # late, as in `runner.ops.backend`

    try:
        text = distribution(NAME).read_text("direct_url.json")
    except PackageNotFoundError:
        return {}
    found: dict[str, Any] = json.loads(text) if text else {}
    return found


def pip(*words: str) -> str:
    """Shell command that runs `pip install` in the running interpreter, whichever `pip` is on the path."""
    return shlex.join([sys.executable, "-m", "pip", "install", *words])
