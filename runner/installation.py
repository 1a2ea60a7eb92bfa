"""How this package came to this machine, and the pip commands that therefore bring what is missing."""

from __future__ import annotations

import json
import shlex
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

NAME = "mlx-runner"


def extra() -> str:
    """The extra with the MLX backend that fits this machine; "" on a Mac, whose MLX has one built in."""
    if sys.platform == "darwin":
        return ""
    import shutil

    return "cuda13" if shutil.which("nvidia-smi") else "cpu"


def requirement(extras: str, package: Path | None = None, origin: dict[str, Any] | None = None) -> list[str]:
    """What pip must be given to install this package again: from the source tree, or the place, it came from.

    Args:
        extras: in brackets behind the name; "" for none.
        package: the directory of the package; None: this one's.
        origin: direct_url.json of the installed distribution (https://packaging.python.org/specifications/direct-url/),
            empty for one from an index; None: read it.
    """
    brackets = f"[{extras}]" if extras else ""
    root = (package or Path(__file__).parent).parent
    if (root / "pyproject.toml").is_file() and (root / "setup.py").is_file():
        return ["-e", f"{root}{brackets}"]
    source = _origin() if origin is None else origin
    url = str(source.get("url", ""))
    if "dir_info" in source and (directory := Path(unquote(urlsplit(url).path))).is_dir():
        return [f"{directory}{brackets}"]
    if "vcs_info" in source:
        return [f"{NAME}{brackets} @ {source['vcs_info'].get('vcs', 'git')}+{url}"]
    return [f"{NAME}{brackets}"]


def install(extras: str) -> str:
    """The command that adds an extra ("cpu", "plot", "cpu,dev") to this installation."""
    return pip(*requirement(extras))


def rebuild(*, dependencies: bool) -> str:
    """The command that compiles the CPU kernels again; with `dependencies`, against the MLX that they are made for.

    A wheel that pip built earlier, or that an index has, was built without what is missing now: neither is taken.
    """
    options = ["--force-reinstall", "--no-cache-dir", "--no-binary", NAME]
    if not dependencies:
        options.append("--no-deps")
    return pip(*options, *requirement("cpu" if dependencies else ""))


def _origin() -> dict[str, Any]:
    """direct_url.json of the installed distribution; empty where there is none, or no distribution."""
    try:
        text = distribution(NAME).read_text("direct_url.json")
    except PackageNotFoundError:
        return {}
    found: dict[str, Any] = json.loads(text) if text else {}
    return found


def pip(*words: str) -> str:
    """A line for a shell: pip of the interpreter that runs now, whatever `pip` is on the path."""
    return shlex.join([sys.executable, "-m", "pip", "install", *words])
