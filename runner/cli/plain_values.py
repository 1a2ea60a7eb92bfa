"""Values of options that are what they look like, without pydantic, whose import takes a tenth of a short answer.

typer (0.29) brings every value to its type by pydantic, those that nobody gave and plain text too. Here the plain ones
are brought to theirs; whatever is not plain, or out of its range, is still typer's, which says what is wrong with it.
"""

from __future__ import annotations

import re
from typing import Any, Literal, get_args, get_origin

import typer

NUMERALS = {int: re.compile(r"-?\d{1,15}", re.ASCII), float: re.compile(r"-?\d{1,15}(\.\d{1,15})?", re.ASCII)}

WORDS = {
    r"Value error, ": "",
    r"Input should be a valid integer(, [^(\n]*[^(\s])?": "{} is not a whole number",
    r"Input should be a valid number(, [^(\n]*[^(\s])?": "{} is not a number",
    r"Input should be a valid boolean(, [^(\n]*[^(\s])?": "{} is neither yes nor no",
    r"Input should be greater than or equal to (\S+)": "it must be at least {1}, not {0}",
    r"Input should be less than or equal to (\S+)": "it must be at most {1}, not {0}",
}
"""What to say, by how pydantic's messages begin: the value is {0}, the pattern's groups follow."""


class PlainValues:
    """In place of the object that coerces the values of one option or argument."""

    def __init__(self, parameter: Any) -> None:
        self.by_typer = parameter.get_runtime_param

    def coerce(self, value: Any, param: Any, ctx: Any) -> Any:
        """`value` as the parameter's type."""
        several = param.multiple or param.nargs == -1
        if value is None:
            return () if several else None
        if not several:
            found = plain(value, param.type_descriptor)
            if found is not None:
                return found
        try:
            return self.by_typer().coerce(value, param=param, ctx=ctx)
        except typer.BadParameter as error:
            error.message = in_words(error.message, value)
            raise


def in_words(message: str, value: Any) -> str:
    """What pydantic says of a value that it refuses, as a person would, with what was typed."""
    for pattern, words in WORDS.items():
        if found := re.match(pattern, message):
            return words.format(repr(value), *found.groups()) + message[found.end() :]
    return message


def plain(value: Any, descriptor: Any) -> Any:
    """`value` as the type that typer found for its parameter, or None where it takes more than a look."""
    kind, limits = descriptor.annotation, descriptor.parameter_info
    if limits.parser is not None:
        return None
    if kind is str and type(value) is str:
        return value
    if get_origin(kind) is Literal:
        return value if type(value) is str and value in get_args(kind) else None
    if kind not in NUMERALS:
        return None
    if type(value) is str and NUMERALS[kind].fullmatch(value):
        value = kind(value)
    if type(value) is not kind:
        return None
    inside = (limits.min is None or value >= limits.min) and (limits.max is None or value <= limits.max)
    return value if inside else None


def without_pydantic(parameters: list[Any]) -> None:
    """Have the values of these parameters coerced by `PlainValues`."""
    for parameter in parameters:
        quick = PlainValues(parameter)
        parameter.get_runtime_param = lambda quick=quick: quick
