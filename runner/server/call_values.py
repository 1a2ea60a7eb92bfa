"""Values of a call's arguments: what a schema allows, texts brought to that, and JSON that every client can read."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from typing import Any

DEEPEST = 16
"""Levels of references and alternatives in a schema that are followed, and of values within values."""

_NAMES = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"}


def dumped(value: Any) -> str:
    """JSON text, as templates write it; half of a surrogate pair, which no UTF-8 has, becomes U+FFFD.

    Raises:
        ValueError: a number is infinite or none.
        TypeError: it is no JSON.
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def read_object(text: str) -> dict[str, Any] | None:
    """The object that a JSON text is; None where it is none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


class Kinds:
    """What the parts of a schema allow. Each is looked at once: alternatives may refer to each other without end."""

    def __init__(self, root: Any) -> None:
        """Begin with the schema that references point into."""
        self.root = root
        self._known: dict[int, frozenset[str] | None] = {}

    def of(self, schema: Any, depth: int = 0) -> frozenset[str] | None:
        """JSON's names of the types that a part of the schema allows; None: any, or it does not say."""
        if not isinstance(schema, Mapping) or depth > DEEPEST:
            return None
        if id(schema) not in self._known:
            self._known[id(schema)] = None  # meanwhile: it may refer to itself
            self._known[id(schema)] = self._look(schema, depth)
        return self._known[id(schema)]

    def _look(self, schema: Mapping[str, Any], depth: int) -> frozenset[str] | None:
        found: list[frozenset[str] | None] = []
        kinds = schema.get("type")
        if isinstance(kinds, str | list):
            kinds = [kinds] if isinstance(kinds, str) else kinds
            found.append(frozenset(one for one in kinds if isinstance(one, str)))
        enum = schema.get("enum")
        values = enum if isinstance(enum, list) else [schema["const"]] if "const" in schema else []
        if values:
            found.append(frozenset(map(kind_of, values)))
        for word in ("anyOf", "oneOf"):
            if isinstance(schema.get(word), list):
                each = [self.of(one, depth + 1) for one in schema[word]]
                found.append(None if None in each else frozenset().union(*filter(None, each)))
        if isinstance(schema.get("allOf"), list):
            found += [self.of(one, depth + 1) for one in schema["allOf"]]
        if isinstance(schema.get("$ref"), str):
            found.append(self.of(_pointed(schema["$ref"], self.root), depth + 1))
        said = [one for one in found if one is not None]
        return frozenset.intersection(*said) if said else None


def kind_of(value: Any) -> str:
    """JSON's name of a value's type."""
    return "null" if value is None else _NAMES.get(type(value), "object")


def _pointed(reference: str, root: Any) -> Any:
    """What `#/$defs/Name` points to; None where it points nowhere, or out of the schema."""
    if not reference.startswith("#/"):
        return None
    for step in reference[2:].split("/"):
        root = root.get(step.replace("~1", "/").replace("~0", "~")) if isinstance(root, Mapping) else None
    return root


def property_of(schema: Any, name: str) -> Any:
    """The schema of an argument; None where there is none."""
    properties = schema.get("properties") if isinstance(schema, Mapping) else None
    return properties.get(name) if isinstance(properties, Mapping) else None


def typed(text: str, schema: Any, known: Kinds) -> Any:
    """What a text without a type of its own means as a value of a schema: the value it spells, or the text itself."""
    kinds = known.of(schema)
    if kinds == frozenset({"string"}):
        return text
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {"True": True, "False": False, "None": None}.get(text.strip(), text)
    # A text where texts are allowed and the value's own kind is not.
    kind = kind_of(value)
    fits = kinds is None or kind in kinds or (kind == "integer" and "number" in kinds)
    return text if kinds is not None and "string" in kinds and not fits else value


_QUOTE = re.compile(r'<escape>|<\|"\|>')
_KEY = re.compile(r"\s*([\w.$-]+)\s*:")
_BARE = re.compile(r"[^,\[\]{}<]*")


class Gemma:
    """Reads the arguments of Gemma's calls: {a:<escape>text<escape>,b:[1,2],c:{d:true}}; Gemma 4 quotes by <|"|>.

    Raises ValueError where the text is something else.
    """

    def __init__(self, text: str, schema: Any) -> None:
        """Begin with the text of all arguments, braces included."""
        self._text = text
        self._known = Kinds(schema)
        self._place = 0

    def read(self) -> dict[str, Any]:
        """The arguments."""
        found = self._object(self._known.root, 0)
        if self._text[self._place :].strip():
            raise ValueError("text behind the arguments")
        return found

    def _value(self, schema: Any, depth: int) -> Any:
        if depth > DEEPEST:
            raise ValueError("values within values")
        self._space()
        if quote := _QUOTE.match(self._text, self._place):
            end = self._text.find(quote[0], quote.end())
            if end < 0:
                raise ValueError("a text without its end")
            self._place = end + len(quote[0])
            return self._text[quote.end() : end]
        if self._next("{"):
            return self._object(schema, depth)
        if self._next("["):
            return self._several("]", lambda: self._value(_items(schema), depth + 1))
        bare = _BARE.match(self._text, self._place)
        assert bare is not None
        self._place = bare.end()
        return typed(bare[0].strip(), schema, self._known)

    def _object(self, schema: Any, depth: int) -> dict[str, Any]:
        def pair() -> tuple[str, Any]:
            key = _KEY.match(self._text, self._place)
            if key is None:
                raise ValueError("no key")
            self._place = key.end()
            return key[1], self._value(property_of(schema, key[1]), depth + 1)

        if not self._next("{"):
            raise ValueError("no object")
        return dict(self._several("}", pair))

    def _several(self, closing: str, read: Any) -> list[Any]:
        """What stands between the bracket at hand and its end, with commas between."""
        found: list[Any] = []
        self._place += 1
        self._space()
        while not self._next(closing):
            found.append(read())
            self._space()
            if self._next(","):
                self._place += 1
                self._space()
            elif not self._next(closing):
                raise ValueError("neither a comma nor an end")
        self._place += 1
        return found

    def _next(self, sign: str) -> bool:
        return self._text.startswith(sign, self._place)

    def _space(self) -> None:
        while self._place < len(self._text) and self._text[self._place].isspace():
            self._place += 1


def _items(schema: Any) -> Any:
    return schema.get("items") if isinstance(schema, Mapping) else None


MAX_PYTHONIC = 100_000
"""Characters of arguments in Python's form."""

_WORDS = {"true": True, "false": False, "null": None}
_PIECE = re.compile(
    r"""(?P<text>\"{3}(?:[^"\\]|\\.|"(?!""))*+\"{3}|'{3}(?:[^'\\]|\\.|'(?!''))*+'{3}|"(?:[^"\\\n]|\\.)*+"
    |'(?:[^'\\\n]|\\.)*+')|(?P<quote>["'])|(?P<opening>[(\[{])|[)\]}]""",
    re.DOTALL | re.VERBOSE,
)


def python_end(text: str, place: int) -> int | None:
    """Where the bracket at a place is closed, in Python's terms; None where it is not."""
    depth = 0
    for piece in _PIECE.finditer(text, place):
        if piece["quote"]:
            return None
        if not piece["text"]:
            depth += 1 if piece["opening"] else -1
        if not depth:
            return piece.end()
    return None


def python_arguments(text: str) -> dict[str, Any]:
    """What (a="x", b=[1]) says; nothing is run, only literals are read, JSON's words among them.

    Raises:
        ValueError: it says something else.
    """
    try:
        if len(text) > MAX_PYTHONIC:
            raise ValueError("too long")
        node = ast.parse("f" + text, mode="eval").body
        if not isinstance(node, ast.Call) or node.args or any(word.arg is None for word in node.keywords):
            raise ValueError("no names of arguments")
        return {str(word.arg): ast.literal_eval(_Words().visit(word.value)) for word in node.keywords}
    except (SyntaxError, RecursionError, MemoryError, TypeError) as error:
        raise ValueError("no literals") from error


class _Words(ast.NodeTransformer):
    """Puts values in place of JSON's words."""

    def visit_Name(self, node: ast.Name) -> ast.AST:
        return ast.Constant(_WORDS[node.id]) if node.id in _WORDS else node
