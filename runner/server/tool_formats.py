"""How models write calls of functions: the marks around them, by the template, and how the text between is read."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from runner.text.harmony import START

MAX_CALL = 1 << 20
"""Characters of one call."""


@dataclass(frozen=True)
class Called:
    """A call: a function's name and its arguments as JSON text."""

    name: str
    arguments: str


@dataclass(frozen=True)
class Marks:
    """The texts around a call, or around several; a call without a closing one ends with the answer.

    Attributes:
        kept: whether the opening text is the start of the call itself.
    """

    opening: str
    closing: str = ""
    kept: bool = False


TABLE = (
    Marks("<tool_call>", "</tool_call>"),  # Hermes, Qwen, GLM, SmolLM3, Granite 4
    Marks("<function=", "</function>", kept=True),  # Qwen3-Coder, where it forgets the mark before
    Marks("[TOOL_CALLS]"),  # Mistral
    Marks("<|python_tag|>"),  # Llama 3
    Marks("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),  # DeepSeek
    Marks("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"),  # Kimi K2
    Marks("<minimax:tool_call>", "</minimax:tool_call>"),  # MiniMax M2
    Marks("<|START_ACTION|>", "<|END_ACTION|>"),  # Command R7B and A
    Marks("<|tool_call_start|>", "<|tool_call_end|>"),  # LFM2
    Marks("<start_function_call>", "<end_function_call>"),  # FunctionGemma
    Marks("<|tool_call>", "<tool_call|>"),  # Gemma 4
    Marks("<|tool_call|>", "<|/tool_call|>"),  # Phi 4 mini
    Marks("<|tool_call|>"),  # Granite 3
    Marks("<TOOLCALL>", "</TOOLCALL>"),  # Nemotron
)
"""Marks of published templates; those that a template names are looked for in its answers."""

GENERIC = Marks("<tool_call>", "</tool_call>")
"""Of the form that models are told whose templates know no tools."""

HARMONY = Marks(START, kept=True)
"""gpt-oss's messages to a function, as `HarmonySeparator` passes them on."""


INNER = (
    "[ARGS]", "[CALL_ID]", "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>", "<|tool_call_begin|>",
    "<|tool_call_end|>", "<|tool_call_argument_begin|>", "<escape>", '<|"|>',
)  # fmt: skip
"""Marks within calls, which may be special tokens too."""


def marks_in(source: str) -> tuple[Marks, ...]:
    """The marks that a template names."""
    found = [marks for marks in TABLE if marks.opening in source and marks.closing in source]
    # Of two with one opening text the one that has a closing text too.
    first: dict[str, Marks] = {}
    for marks in found:
        first.setdefault(marks.opening, marks)
    return tuple(first.values())


def bare_json(source: str) -> bool:
    """Whether a template asks for calls as nothing but JSON, as Llama 3's do."""
    return re.search(r'\{\\?"name\\?": function name', source) is not None


def read_calls(text: str, schemas: Mapping[str, Any]) -> list[Called] | None:
    """The calls that the text between two marks spells, in whichever of the known forms; None if it is no call.

    Args:
        schemas: JSON schemas of the arguments by the functions' names: forms without types of their own are read by
            them.
    """
    text = text.strip()
    if not text or len(text) > MAX_CALL:
        return None
    for form in (_json_calls, _harmony, _named_json, _tagged, _keyed, _colons, _pythonic):
        if found := form(text, schemas):
            return found
    return None


def _json_calls(text: str, _schemas: Mapping[str, Any]) -> list[Called] | None:
    """{"name": "f", "arguments": {...}}, or a list of such; several may follow each other."""
    if text[0] not in "[{":
        return None
    decoder, position, values = json.JSONDecoder(), 0, []
    while position < len(text):
        try:
            value, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError):
            return None
        values += value if isinstance(value, list) else [value]
        while position < len(text) and text[position] in " \t\r\n;,":
            position += 1
    calls = [_from_object(value) for value in values]
    return [call for call in calls if call is not None] if calls and None not in calls else None


def _from_object(value: Any) -> Called | None:
    if not isinstance(value, dict):
        return None
    if isinstance(value.get("function"), dict):
        value = value["function"]
    name = next((value[key] for key in ("name", "tool_name", "function") if isinstance(value.get(key), str)), None)
    arguments: Any = next((value[key] for key in ("arguments", "parameters") if key in value), {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            return None
    if not name or not isinstance(arguments, dict):
        return None
    return Called(name, dumped(arguments))


_HEADER = re.compile(r"<\|start\|>assistant.*?\bto=(?:functions\.)?([\w.:-]+)[^\n]*?<\|message\|>(.*)", re.DOTALL)


def _harmony(text: str, _schemas: Mapping[str, Any]) -> list[Called] | None:
    """<|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>{...}, one or several."""
    if not text.startswith(START):
        return None
    calls = []
    for piece in re.split(r"(?=<\|start\|>assistant)", text)[1:]:
        found = _HEADER.fullmatch(piece.strip())
        value = _object(found[2]) if found else None
        if found is None or value is None:
            return None
        calls.append(Called(found[1], dumped(value)))
    return calls


_NAMED = re.compile(
    r"""(?:\[TOOL_CALLS\]|<｜tool▁call▁begin｜>|<\|tool_call_begin\|>)?\s*
    (?:function<｜tool▁sep｜>)?(?:functions\.)?(?P<name>[\w.-]+)(?::\d+)?\s*
    (?:\[CALL_ID\]\w+)?(?:\[ARGS\]|<｜tool▁sep｜>|<\|tool_call_argument_begin\|>|\n(?=```json))?\s*
    (?P<fence>```json\s*)?(?=\{)""",
    re.VERBOSE,
)
_AFTER = re.compile(r"\s*(?:```)?\s*(?:<｜tool▁call▁end｜>|<\|tool_call_end\|>)?\s*")


def _named_json(text: str, _schemas: Mapping[str, Any]) -> list[Called] | None:
    """A name and the JSON of its arguments, a family's marks between: Mistral, DeepSeek, Kimi; several in a row."""
    decoder, position, calls = json.JSONDecoder(), 0, []
    while position < len(text):
        found = _NAMED.match(text, position)
        if found is None:
            return None
        try:
            value, position = decoder.raw_decode(text, found.end())
        except (ValueError, RecursionError):
            return None
        if not isinstance(value, dict):
            return None
        calls.append(Called(found["name"], dumped(value)))
        after = _AFTER.match(text, position)
        position = after.end() if after else position
    return calls


_FUNCTION = re.compile(
    r"""<function=(?P<a>[^>\s]+)>(?P<b>.*?)</function>|<invoke\s+name="(?P<c>[^"]+)">(?P<d>.*?)</invoke>""", re.DOTALL
)
_PARAMETER = re.compile(r"""<parameter(?:=|\s+name=")(?P<name>[^>"]+)"?>(?P<value>.*?)</parameter>""", re.DOTALL)


def _tagged(text: str, schemas: Mapping[str, Any]) -> list[Called] | None:
    """<function=f><parameter=a>1</parameter></function> of Qwen3-Coder, <invoke name="f"> of MiniMax."""
    found = list(_FUNCTION.finditer(text))
    if not found or _FUNCTION.sub("", text).strip():
        return None
    calls = []
    for each in found:
        name, body = each["a"] or each["c"], each["b"] if each["a"] else each["d"]
        if _PARAMETER.sub("", body).strip():
            return None
        given = {one["name"].strip(): _unframed(one["value"]) for one in _PARAMETER.finditer(body)}
        calls.append(_typed(name.strip(), given, schemas))
    return calls


_KEYS = re.compile(r"<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>", re.DOTALL)


def _keyed(text: str, schemas: Mapping[str, Any]) -> list[Called] | None:
    """f<arg_key>a</arg_key><arg_value>1</arg_value> of GLM."""
    name, sign, rest = text.partition("<arg_key>")
    if not re.fullmatch(r"[\w.-]+", name.strip()) or _KEYS.sub("", sign + rest).strip():
        return None
    if not sign and name.strip() not in schemas:  # a word that is no function's name is no call
        return None
    return [_typed(name.strip(), {key.strip(): value for key, value in _KEYS.findall(sign + rest)}, schemas)]


_COLON = re.compile(r"call:([\w.-]+)\s*\{(.*)\}", re.DOTALL)


def _colons(text: str, schemas: Mapping[str, Any]) -> list[Called] | None:
    """call:f{a:<escape>text<escape>,b:1} of Gemma; `<|"|>` quotes in Gemma 4."""
    found = _COLON.fullmatch(text)
    if found is None:
        return None
    given: dict[str, str] = {}
    rest = found[2].strip()
    while rest:
        one = re.match(
            r"""([\w.-]+)\s*:\s*(?:(?:<escape>|<\|"\|>)(.*?)(?:<escape>|<\|"\|>)|([^,]*))\s*(?:,\s*|$)""", rest, re.S
        )
        if one is None:
            return None
        given[one[1]] = one[2] if one[2] is not None else one[3].strip()
        rest = rest[one.end() :]
    return [_typed(found[1], given, schemas)]


def _pythonic(text: str, _schemas: Mapping[str, Any]) -> list[Called] | None:
    """[f(a="x", b=1)] of LFM2 and Llama 3.2; nothing is run, only literals are read."""
    if not re.match(r"\[?\s*[A-Za-z_][\w.]*\s*\(", text) or len(text) > 100_000:
        return None
    try:
        node = ast.parse(text, mode="eval").body
        calls = []
        for each in node.elts if isinstance(node, ast.List) else [node]:
            if not isinstance(each, ast.Call) or each.args or any(word.arg is None for word in each.keywords):
                return None
            given = {str(word.arg): ast.literal_eval(word.value) for word in each.keywords}
            calls.append(Called(ast.unparse(each.func), dumped(given)))
        return calls
    except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
        return None


def _unframed(value: str) -> str:
    """A value without the line breaks that stand around it."""
    return value.removeprefix("\n").removesuffix("\n")


def _typed(name: str, given: Mapping[str, str], schemas: Mapping[str, Any]) -> Called:
    """A call whose values are texts: brought to the types of its schema."""
    schema = schemas.get(name)
    properties = schema.get("properties") if isinstance(schema, Mapping) else None
    result = {}
    for key, value in given.items():
        wanted = properties.get(key) if isinstance(properties, Mapping) else None
        result[key] = _value(value, wanted if isinstance(wanted, Mapping) else {})
    return Called(name, dumped(result))


def _value(text: str, schema: Mapping[str, Any]) -> Any:
    kinds = schema.get("type")
    kinds = kinds if isinstance(kinds, Sequence) and not isinstance(kinds, str) else [kinds]
    if kinds == ["string"]:
        return text
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {"True": True, "False": False, "None": None}.get(text.strip(), text)
    # A text where texts are allowed and the value's own kind is not.
    names = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"}
    kind = "null" if value is None else names[type(value)]
    fits = kind in kinds or (kind == "integer" and "number" in kinds)
    return text if "string" in kinds and not fits else value


def _object(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def dumped(value: Any) -> str:
    """JSON text, as templates write it."""
    return json.dumps(value, ensure_ascii=False)
