"""Options that say what an answer must be: JSON of a schema, a regular expression, a grammar, one of several texts."""

from __future__ import annotations

import importlib.util
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from runner.errors import UsageError
from runner.installation import install

if TYPE_CHECKING:
    from runner.constraints import Constraint

PANEL = "Form of the answer"


def _form(name: str, metavar: str | None, text: str) -> Any:
    return typer.Option(name, metavar=metavar, help=text, show_default=False, rich_help_panel=PANEL)


@dataclass(frozen=True, kw_only=True)
class ConstraintOptions:
    """What the answer must be; one of them at most."""

    json_schema: Annotated[
        str | None,
        _form("--json-schema", "FILE|TEXT", "Answer with JSON that fits this JSON schema."),
    ] = None
    json_object: Annotated[bool, _form("--json-object", None, "Answer with a JSON object.")] = False
    regex: Annotated[
        str | None, _form("--regex", "PATTERN", "Answer with a text that this regular expression matches as a whole.")
    ] = None
    grammar: Annotated[
        str | None, _form("--grammar", "FILE|TEXT", "Answer with a text of this grammar, in Lark's syntax.")
    ] = None
    choice: Annotated[
        list[str] | None, _form("--choice", "TEXT", "Answer with one of these texts: give the option for each.")
    ] = None

    def constraint(self) -> Constraint | None:
        """What the options ask for, checked as far as it can be before a model is loaded; None: nothing.

        Raises:
            UsageError: several are given, one is malformed or its file cannot be read, or llguidance is not installed.
        """
        from runner.constraints import Choice, JsonObject, JsonSchema, Lark, Regex

        given: dict[str, Constraint] = {}
        if self.json_schema is not None:
            given["--json-schema"] = JsonSchema(_text("--json-schema", self.json_schema, "{"))
        if self.json_object:
            given["--json-object"] = JsonObject()
        if self.regex is not None:
            given["--regex"] = Regex(self.regex)
        if self.grammar is not None:
            given["--grammar"] = Lark(_lark(_text("--grammar", self.grammar, ":")))
        if self.choice:
            given["--choice"] = Choice(self.choice)
        if len(given) > 1:
            raise UsageError(f"{' and '.join(given)} each say what the answer must be: choose one")
        if given and importlib.util.find_spec("llguidance") is None:
            raise UsageError(f"{next(iter(given))} needs the package llguidance: {install('constraints')}")
        return next(iter(given.values()), None)


def _text(option: str, given: str, sign: str) -> str:
    """The text that was given, which has a `sign` in it, or that of the file which it names."""
    if sign in given:
        return given
    path = Path(os.path.expanduser(given))
    try:
        if path.exists() and not path.is_file():  # a pipe would wait for a writer
            raise UsageError(f"{option} {given}: no text of its own, and no regular file")
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UsageError(f"{option} {given}: no text of its own, and no file that can be read: {why}") from error


def _lark(text: str) -> str:
    """Refuse the grammars of llama.cpp by their name: llguidance would only say that it cannot parse them."""
    if re.search(r"^\s*[\w-]+\s*::=", text, re.MULTILINE):
        raise UsageError("--grammar: this is GBNF (name ::= ...), and grammars are written in Lark's syntax here")
    return text
