"""The layers of README.md's diagram: what a file imports when it is imported lies below it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

from places import ROOT

RUNNER = ROOT / "runner"
LAYERS = ("cli", "language_model", "engine", "generate", "models", "nn", "fast", "weights", "config")


def name_of(path: Path) -> str:
    return ".".join(("runner", *path.relative_to(RUNNER).with_suffix("").parts)).removesuffix(".__init__")


FILES = {name_of(path): path for path in RUNNER.glob("**/*.py")} | {
    f"runner.models.{path.stem}": path for path in (RUNNER / "models").glob("[!_]*.py")
}


def imported(path: Path, package: str) -> Iterator[str]:
    """Names of our modules that importing `path` imports: not those within functions or for type checkers."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in FILES)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            inner = [f"{module}.{alias.name}" for alias in node.names]
            if module in FILES:
                yield from [name for name in inner if name in FILES] or [module]


def graph() -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for name, path in FILES.items():
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        found[name] = set(imported(path, package)) - {name, "runner"}
    return found


def rank(name: str) -> int | None:
    """Place in the diagram; None beside it."""
    first = name.split(".")[1] if "." in name else ""
    return LAYERS.index(first) if first in LAYERS else None


def below(start: str, edges: dict[str, set[str]]) -> set[str]:
    seen: set[str] = set()
    left = [start]
    while left:
        left += edges[left.pop()] - seen
        seen.update(left)
    return seen


def test_no_two_files_import_each_other() -> None:
    order = list(TopologicalSorter(graph()).static_order())
    assert len(order) == len(FILES) > 60


def test_imports_go_down_only() -> None:
    edges = graph()
    assert "runner.nn.linear" in edges["runner.models.llama"] and "runner.cache.kv" in edges["runner.engine.generate"]
    for name in edges:
        for other in below(name, edges):
            mine, its = rank(name), rank(other)
            assert mine is None or its is None or mine <= its, f"{name} imports {other}, which is above it"
