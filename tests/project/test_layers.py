"""The order of the package's parts: a file imports its own folder and lower ranks, nothing beside or above itself."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

from places import ROOT

RUNNER = ROOT / "runner"
RANKS = (
    ("errors",),
    ("progress", "installation", "resources", "local_files", "reprs"),
    ("user_files",),
    ("text", "config"),
    ("cache",),
    ("weights", "ops"),
    ("nn",),
    ("models",),
    ("families",),
    ("checkpoint",),
    ("adapters",),
    ("engine", "constraints"),
    ("ranks",),
    ("guidance",),
    ("answer", "keywords", "perplexity", "convert"),
    ("asynchronous",),
    ("language_model", "bench"),
    ("many",),
    ("inspect_model", "server"),
    ("cli",),
)
"""Ranks, low to high. Above all are `runner/__init__.py`, `__main__.py`, and any file that imports `runner` itself."""

FILES = {
    ".".join(("runner", *path.relative_to(RUNNER).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in [*RUNNER.glob("**/*.py"), *RUNNER.glob("models/*.py")]
}


def rank(module: str) -> int:
    part = module.split(".")[1]
    (found,) = (index for index, parts in enumerate(RANKS) if part in parts)
    return found


def imported(path: Path, package: str, everywhere: bool) -> Iterator[str]:
    """Our modules that `path` imports: at its top level, or also in functions and for type checkers."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in FILES)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            inner = [f"{module}.{alias.name}" for alias in node.names]
            if module in FILES:
                yield from [name for name in inner if name in FILES] or [module]


def edges(everywhere: bool) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for name, path in FILES.items():
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        found[name] = set(imported(path, package, everywhere)) - {name, "runner"}
    return found


def test_every_part_has_a_rank() -> None:
    parts = {name.split(".")[1] for name in FILES if "." in name} - {"__main__"}
    assert parts == {part for parts in RANKS for part in parts}


def test_imports_go_to_lower_ranks_only() -> None:
    """Imports within functions count too: a late import must not turn the order round either."""
    wrong = []
    for name, others in edges(everywhere=True).items():
        if name in ("runner", "runner.__main__"):
            continue
        for other in others:
            same = name.split(".")[1] == other.split(".")[1]
            if not same and rank(other) >= rank(name):
                wrong.append(f"{name} imports {other}")
    assert not wrong, "\n".join(wrong)


def test_no_two_files_import_each_other() -> None:
    order = list(TopologicalSorter(edges(everywhere=False)).static_order())
    assert len(order) == len(FILES) > 100


def test_new_packages_import_nothing() -> None:
    """`import runner.ops.backend` must work where there is no MLX."""
    speaking = {"runner", "runner.cli", "runner.adapters", "runner.bench", "runner.checkpoint.gguf"}
    speaking |= {"runner.checkpoint.quantized", "runner.ops.cpu"}
    silent = [path for name, path in FILES.items() if path.name == "__init__.py" and name not in speaking]
    assert len(silent) >= 10 and not any(path.read_text() for path in silent)
