#!/usr/bin/env python3
"""Runs every command in docs/usage/*.md and writes its output under it; likewise what README.md takes from the code.

    scripts/make_docs.py --model DIR --gguf FILE    rewrites the pages, README.md's generated parts and docs/demo.svg
    scripts/make_docs.py --parts                    renews what README.md takes from the code; needs no model
    scripts/make_docs.py --check                    exits 1 where a page is stale, or a command in it fails

A ```console block holds commands after `$ `, each followed by its output; `> ` begins what is typed into a chat.
--check takes a tiny checkpoint for the model, so it compares what no model decides: help texts and README.md's parts.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from terminal_session import Session, shell

ROOT = Path(__file__).resolve().parent.parent
NAME = "SmolLM2-135M-Instruct"
REVISION = "0123456789abcdef0123456789abcdef01234567"
NOTES = "The ferry leaves at nine and takes two hours. Bring a coat: it is windy on the water.\n"
CONTEXT = 1024  # tokens of the tiny checkpoint: room for every conversation in the pages
CONSOLE = re.compile(r"```console\n(.*?)```\n", re.DOTALL)
PART = re.compile(r"(<!-- from the code: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
WIDTH = 122  # columns of the drawing
CAST = (
    f'runner generate {NAME} "What is the capital of France?" --temperature 0 --verbose',
    f"runner inspect {NAME} | grep -E 'field|alike|weight '",
)


@dataclass(frozen=True)
class Step:
    """One command of a page, the lines that stand under it, and those that it types."""

    command: str
    output: str

    @property
    def typed(self) -> list[str]:
        """What a chat is told, in order."""
        return [line[2:] for line in self.output.splitlines() if line[:2] in ("> ", "… ")]

    @property
    def compared(self) -> bool:
        """Whether its output is the same on every machine, with every model."""
        return self.command.endswith(" --help")


def steps(block: str) -> Iterator[Step]:
    """The commands of one block."""
    for piece in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
        command, _, output = piece.partition("\n")
        yield Step(command, output)


def workplace(directory: Path, model: Path, gguf: Path) -> dict[str, str]:
    """Puts in `directory` what the pages' commands name; returns the environment to run them in."""
    shutil.copytree(model, directory / NAME)
    (directory / f"{NAME}.Q4_1.gguf").symlink_to(gguf)
    (directory / "notes.txt").write_text(NOTES)
    shutil.copy(ROOT / "README.md", directory / "text.txt")
    repository = directory / "cache" / f"models--HuggingFaceTB--{NAME}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(REVISION)
    shutil.copytree(model, repository / "snapshots" / REVISION)
    programs = directory / "bin"
    programs.mkdir()
    (programs / "runner").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m runner "$@"\n')
    (programs / "runner").chmod(0o755)
    kept = {name: os.environ[name] for name in ("HOME", "MLX_ENABLE_TF32", "RUNNER_NUM_THREADS") if name in os.environ}
    return {
        **kept,
        "PATH": f"{programs}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_CACHE": str(directory / "cache"),
        "LC_ALL": "C.UTF-8",
        "COLUMNS": "100",
    }


def tiny(directory: Path) -> tuple[Path, Path]:
    """A checkpoint and a GGUF file that are read in no time: a fixture with a longer context."""
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]
    import gguf_writer

    source, model = ROOT / "tests" / "fixtures" / "llama-gqa", directory / "tiny"
    shutil.copytree(source, model)
    config = json.loads((source / "config.json").read_text())
    config["max_position_embeddings"] = CONTEXT
    (model / "config.json").write_text(json.dumps(config))
    weights = gguf_writer.weights_of(source)
    return model, gguf_writer.write_model(directory / "tiny.gguf", config, weights)


class Workplace:
    """Where the commands of all pages run, one after another."""

    def __init__(self, directory: Path, environment: dict[str, str]) -> None:
        self.directory = directory
        self.environment = environment

    def output(self, step: Step) -> str:
        """What the command prints, stdout and stderr in order; SystemExit where it fails."""
        if step.typed:
            code, text = Session(step.command, self.directory, self.environment).run(step.typed)
        else:
            code, text = shell(step.command, self.directory, self.environment)
        if code:
            raise SystemExit(f"$ {step.command}\n{text}exit code {code}")
        text = text.replace(str(self.directory), "/home/me").replace(sys.executable, "python")
        return text.replace(str(ROOT), "/home/me/runner")

    def page(self, text: str, *, check: bool) -> str:
        """A page with every command's output renewed; with `check`, all run and only those of `compared` are."""

        def renewed(found: re.Match[str]) -> str:
            pieces = []
            for step in steps(found[1]):
                output = self.output(step)
                pieces.append(f"$ {step.command}\n{step.output if check and not step.compared else output}")
                if pieces[-1][-2:] != "\n\n" and not check:
                    pieces[-1] += "\n"
            return "```console\n" + "".join(pieces).rstrip("\n") + "\n```\n"

        return CONSOLE.sub(renewed, text)

    def cast(self) -> str:
        """docs/demo.svg: the commands of `CAST` on a terminal, in its colours."""
        import io

        from rich.console import Console
        from rich.text import Text

        console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True, color_system="standard")
        environment = {**self.environment, "TERM": "xterm-256color", "COLUMNS": str(WIDTH)}
        for command in CAST:
            code, text = Session(command, self.directory, environment).run([])
            assert code == 0, text
            console.print(Text.from_ansi(f"\x1b[1;32m$\x1b[0m {command}\n{text}"))
        drawing = console.export_svg(title="runner", unique_id="runner")
        return (
            "\n".join(
                line.rstrip() for line in re.sub(r"@font-face \{.*?\}\s*", "", drawing, flags=re.DOTALL).splitlines()
            )
            + "\n"
        )


def files() -> str:
    """One row for each file of the package: the first sentence of what it says of itself."""
    rows = ["| file | what it is |", "|---|---|"]
    places = [ROOT / "runner", *(ROOT / "runner" / name for name in ("adapters", "bench", "cli", "gguf", "kernels"))]
    for place in places:
        for path in sorted(place.glob("*.py"), key=lambda path: (path.name != "__init__.py", path.name)):
            if place.name == "cli" and path.name != "__init__.py":
                continue
            text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
            name = path.relative_to(ROOT / "runner").as_posix().replace("__init__.py", "")
            if name not in ("", "__main__.py"):
                rows.append(f"| `{name}` | {' '.join(text.split(chr(10) * 2)[0].split()).rstrip('.')} |")
    rows.append("| `models/` | One family in each file, top to bottom: config, attention, feed-forward, block, model |")
    return "\n".join(rows) + "\n"


def attention() -> str:
    """The fields of Llama's attention, as they stand in models/llama.py."""
    source = (ROOT / "models" / "llama.py").read_text(encoding="utf-8")
    (found,) = (node for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and node.name == "Attention")
    fields = [ast.get_source_segment(source, node) or "" for node in found.body if isinstance(node, ast.AnnAssign)]
    return "```python\n@dataclass\nclass Attention:\n" + "".join(f"    {field}\n" for field in fields) + "```\n"


PARTS: dict[str, Callable[[], str]] = {"files": files, "attention": attention}


def readme(text: str) -> str:
    """README.md with its generated parts renewed."""
    return PART.sub(lambda found: found[1] + PARTS[found[2]]() + found[3], text)


def main() -> int:
    """Rewrite, or compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--parts", action="store_true")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--gguf", type=Path)
    parser.add_argument("pages", nargs="*", type=Path, help="default: all")
    given = parser.parse_args()
    if given.parts:
        page = ROOT / "README.md"
        page.write_text(readme(page.read_text(encoding="utf-8")), encoding="utf-8")
        return 0
    if not given.check and (given.model is None or given.gguf is None):
        parser.error("--model and --gguf are needed, or --check")
    stale = False
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name).resolve()
        inputs = tiny(directory) if given.check else (given.model.resolve(), given.gguf.resolve())
        place = Workplace(directory, workplace(directory, *inputs))
        pages = given.pages or [ROOT / "README.md", *sorted((ROOT / "docs" / "usage").glob("*.md"))]
        for path in pages:
            before = path.read_text(encoding="utf-8")
            after = place.page(readme(before), check=given.check)
            if not given.check:
                path.write_text(after, encoding="utf-8")
            elif after != before:
                stale = True
                sys.stdout.writelines(difflib.unified_diff(before.splitlines(True), after.splitlines(True), str(path)))
        if not given.check and not given.pages:
            (ROOT / "docs" / "demo.svg").write_text(place.cast(), encoding="utf-8")
    if stale:
        print("stale: run scripts/make_docs.py --model DIR --gguf FILE (README.md alone: --parts)", file=sys.stderr)
    return int(stale)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except subprocess.TimeoutExpired as late:
        sys.exit(f"no end: {late}")
