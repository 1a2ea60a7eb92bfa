"""What an answer must be: JSON of a schema, a regular expression, a grammar, one of several texts.

Plain data; `runner.guidance` compiles it and says which tokens may come next.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from runner.errors import UsageError

MOST = 1 << 18
"""Characters of a schema, an expression or a grammar."""


@dataclass(frozen=True)
class JsonSchema:
    """The answer is JSON that fits a schema (JSON Schema, drafts 4 to 2020-12), without spaces between its parts.

    Properties come in the schema's order. A keyword that cannot be enforced is refused by its name; those that only
    describe, and those that JSON Schema does not know, constrain nothing.

    Attributes:
        schema: the schema, or its JSON text.
    """

    schema: Mapping[str, Any] | str

    def __post_init__(self) -> None:
        text = self.text
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"the JSON schema is not JSON: {error}") from error
        if not isinstance(value, dict):
            raise UsageError(f"a JSON schema is an object, not {value!r:.80}")

    @property
    def text(self) -> str:
        """The schema as JSON text."""
        if isinstance(self.schema, str):
            return _short("JSON schema", self.schema)
        try:
            text = json.dumps(self.schema)
        except (TypeError, ValueError, RecursionError) as error:
            raise UsageError(f"the JSON schema holds what JSON has not: {error}") from error
        return _short("JSON schema", text)


@dataclass(frozen=True)
class JsonObject:
    """The answer is a JSON object, of any keys and values, without spaces between its parts."""


@dataclass(frozen=True)
class Regex:
    """The whole answer matches a regular expression, in the syntax of Rust's `regex` without assertions."""

    pattern: str

    def __post_init__(self) -> None:
        _short("regular expression", self.pattern)


@dataclass(frozen=True)
class Lark:
    """The answer is derived from the rule `start` of a grammar in Lark's syntax, as llguidance reads it."""

    grammar: str

    def __post_init__(self) -> None:
        _short("grammar", self.grammar)
        # From the last bracket before it, so that none is looked at twice: the text is a stranger's.
        if re.search(r"\[[^\[\]\n]*\btemperature\s*=", self.grammar):
            raise UsageError("a rule's temperature cannot be obeyed: pass temperature with the answer's options")


@dataclass(frozen=True)
class Choice:
    """The answer is one of these texts."""

    options: Sequence[str]

    def __post_init__(self) -> None:
        fine = isinstance(self.options, Sequence) and not isinstance(self.options, str)
        if not fine or not self.options or not all(isinstance(option, str) and option for option in self.options):
            raise UsageError(f"a choice is a list of texts, none of them empty, not {self.options!r:.80}")
        object.__setattr__(self, "options", tuple(self.options))  # the class is frozen
        _short("choice", "".join(self.options))


Constraint = JsonSchema | JsonObject | Regex | Lark | Choice


def _short(kind: str, text: object) -> str:
    if not isinstance(text, str) or not text:
        raise UsageError(f"a {kind} is a text, and not an empty one, not {text!r:.80}")
    if len(text) > MOST:
        raise UsageError(f"the {kind} has {len(text)} characters; at most {MOST} are compiled")
    return text
