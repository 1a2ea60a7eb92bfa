"""Reads a request's JSON into a typed structure; a field that is neither known nor inert is refused by its name."""

from __future__ import annotations

import re
from typing import Any, Literal, TypeVar

import msgspec
from msgspec import inspect

from runner.local_files import quoted
from runner.reprs import similar
from runner.server.errors import invalid
from runner.server.inert import Table

T = TypeVar("T")
Policy = Literal["refuse", "warn"]
MAX_DEPTH = 64
"""Levels of nesting; a schema of a tool's that is deeper is none that a model could follow."""
MAX_PARTS = 100_000
"""Values in one request, containers included."""


_HALF_AT_END = re.compile(rb"(\\u[dD][89abAB][0-9a-fA-F]{2})(?!\\u)[\s\S]{1,5}\Z")
"""Half of a pair where no other half has room, which the library takes for an end that is missing."""


def parse(body: bytes) -> Any:
    """The value of a JSON text, within bounds.

    Raises:
        ApiError: it is no JSON, nested too deep, or has too many values.
    """
    try:
        value = msgspec.json.decode(body)
        count = _measured(value)
    except RecursionError:
        raise invalid(f"the request is nested more than {MAX_DEPTH} deep") from None
    except msgspec.MsgspecError as error:
        if half := _HALF_AT_END.search(body):
            raise invalid(
                f"the request is not valid JSON: {half[1].decode()} is half of a surrogate pair: no character"
            ) from None
        raise invalid(f"the request is not valid JSON: {error}") from None
    except (UnicodeError, ValueError) as error:
        raise invalid(f"the request is not valid JSON: {error}") from None
    if count > MAX_PARTS:
        raise invalid(f"the request has more than {MAX_PARTS} values")
    return value


def _measured(value: Any) -> int:
    """The number of values in `value`; texts that are no valid Unicode raise UnicodeError, depth RecursionError."""
    count, level = 0, [value]
    for _ in range(MAX_DEPTH):
        following: list[Any] = []
        for each in level:
            if isinstance(each, str):
                each.encode()
            elif isinstance(each, dict):
                for name in each:
                    name.encode()
                following.extend(each.values())
            elif isinstance(each, list):
                following.extend(each)
        count += len(level)
        if not following:
            return count
        level = following
    raise RecursionError


def read(value: Any, kind: type[T], policy: Policy = "refuse", at: str = "") -> tuple[T, list[str]]:
    """Make a `kind` of a plain value; returns it and the paths of the fields that were left out.

    Args:
        at: the path of the value in the request.

    Raises:
        ApiError: a field is unknown, missing, or has a value of another type; the error has its path.
    """
    if not isinstance(value, dict):
        raise invalid(f"{at or 'the request'} must be a JSON object", at or None)
    cleaner = _Cleaner(policy)
    plain = cleaner.clean(value, inspect.type_info(kind), at)
    try:
        return msgspec.convert(plain, kind, strict=True), cleaner.left_out
    except msgspec.ValidationError as error:
        message, _, path = str(error).partition(" - at `$")
        where = (at + path.rstrip("`")).removeprefix(".") or None
        if named := re.search(r"required field `(\w+)`", message):
            where = _below(where or "", named[1])
            raise invalid(f"{where} is missing", where, "missing_required_parameter") from None
        told = message[:1].lower() + message[1:]
        raise invalid(f"{where}: {told}" if where else told, where) from None


class _Cleaner:
    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.left_out: list[str] = []

    def clean(self, value: Any, info: inspect.Type, path: str) -> Any:
        """A copy of `value` without inert fields."""
        if isinstance(info, inspect.UnionType):
            return self._union(value, info, path)
        if isinstance(info, inspect.StructType) and isinstance(value, dict):
            return self._object(value, info, path)
        if isinstance(info, inspect.ListType | inspect.VarTupleType) and isinstance(value, list):
            return [self.clean(each, info.item_type, f"{path}[{index}]") for index, each in enumerate(value)]
        return value

    def _union(self, value: Any, info: inspect.UnionType, path: str) -> Any:
        if isinstance(value, list):
            for each in info.types:
                if isinstance(each, inspect.ListType):
                    return self.clean(value, each, path)
        if not isinstance(value, dict):
            return value
        structs = [each for each in info.types if isinstance(each, inspect.StructType)]
        tagged = [each for each in structs if each.tag_field is not None]
        for each in tagged:
            if value.get(each.tag_field) == each.tag:
                return self._object(value, each, path)
        if tagged:
            field, tags = tagged[0].tag_field, ", ".join(repr(each.tag) for each in tagged)
            found = value.get(str(field))
            shown = quoted(found, 60) if isinstance(found, str) else "missing" if found is None else "no text"
            where = _below(path, str(field))
            raise invalid(f"{where} is {shown}: only {tags} can be read here", where, "unsupported_value")
        return self._object(value, structs[0], path) if structs else value

    def _object(self, value: dict[str, Any], info: inspect.StructType, path: str) -> dict[str, Any]:
        fields = {field.encode_name: field.type for field in info.fields}
        inert: Table = getattr(info.cls, "inert", {})
        result = {}
        for name, each in value.items():
            where = _below(path, name)
            if name in fields:
                result[name] = self.clean(each, fields[name], where)
            elif name == info.tag_field:
                result[name] = each
            elif self.policy == "warn" or (name in inert and inert[name].allows(each)):
                self.left_out.append(where)
            else:
                self._refuse(name, each, where, list(fields), inert)
        return result

    def _refuse(self, name: str, value: Any, where: str, known: list[str], inert: Table) -> None:
        if told := RENAMED.get(name):
            raise invalid(f"{where} is not known here: {told}", where, "unknown_parameter")
        if name in inert:
            allowed = " or ".join(msgspec.json.encode(each).decode() for each in inert[name].values)
            raise invalid(f"{where}: only {allowed} is understood here", where, "unsupported_value")
        near = similar(name, known)
        hint = "" if near is None else f"; did you mean {near!r}?"
        raise invalid(f"unknown field {quoted(where, 120)}{hint}", where[:120], "unknown_parameter")


RENAMED = {
    "guided_json": 'use structured_outputs, {"json": ...}',
    "guided_regex": 'use structured_outputs, {"regex": ...}',
    "guided_choice": 'use structured_outputs, {"choice": ...}',
    "guided_grammar": 'use structured_outputs, {"grammar": ...}',
    "functions": "use tools",
    "function_call": "use tool_choice",
    "repeat_penalty": "use repetition_penalty",
    "n_predict": "use max_tokens",
}
"""Names that other servers have, or had, for what goes by another name here."""


def _below(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
