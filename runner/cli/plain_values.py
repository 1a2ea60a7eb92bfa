"""Values of options that are what they look like, without pydantic, whose import takes a tenth of a short answer.

typer (0.29) brings every value to its type by pydantic, those that nobody gave and plain text too. Here the plain ones
are brought to theirs; whatever is not plain, or out of its range, is still typer's, which says what is wrong with it.
"""

from __future__ import annotations

import re
from typing import Any

NUMERALS = {int: re.compile(r"-?\d{1,15}", re.ASCII), float: re.compile(r"-?\d{1,15}(\.\d{1,15})?", re.ASCII)}


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
        return self.by_typer().coerce(value, param=param, ctx=ctx)


def plain(value: Any, descriptor: Any) -> Any:
    """`value` as the type that typer found for its parameter, or None where it takes more than a look."""
    kind, limits = descriptor.annotation, descriptor.parameter_info
    if limits.parser is not None:
        return None
    if kind is str and type(value) is str:
        return value
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
