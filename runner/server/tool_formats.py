"""How models write calls of functions: the marks around them, by the template, and how the text between is read."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from runner.server.call_values import Gemma, Kinds, dumped, property_of, read_object, typed
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
        trailing: a text that may follow, whose own opening a model has forgotten: it is no text for the reader.
    """

    opening: str
    closing: str = ""
    kept: bool = False
    trailing: str = ""


TABLE = (
    Marks("<tool_call>", "</tool_call>"),  # Hermes, Qwen, GLM, SmolLM3, Granite 4
    Marks("<function=", "</function>", kept=True, trailing="</tool_call>"),  # Qwen3-Coder, where it forgets a mark
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


def read_calls(text: str, schemas: Mapping[str, Any], *, cut: bool = False) -> list[Called] | None:
    """The calls that the text between two marks spells, in whichever of the known forms; None if it is no call.

    Each form is read from left to right, in a time that grows with the text's length: a model writes what it likes, and
    others wait meanwhile.

    Args:
        schemas: JSON schemas of the arguments by the functions' names: forms without types of their own are read by
            them.
        cut: whether the text ends with the answer, and not with its closing mark: of several calls those that are whole
            count, and forms do not that look whole wherever they are cut.
    """
    text = text.strip()
    if not text or len(text) > MAX_CALL:
        return None
    for form in (_json_calls, _harmony, _colons, _named_json, _tagged, _keyed, _pythonic):
        try:
            if found := form(text, schemas, cut):
                return found
        except (ValueError, RecursionError):  # numbers that JSON does not have, say
            continue
    return None


def _json_calls(text: str, _schemas: Mapping[str, Any], _cut: bool) -> list[Called] | None:
    """{"name": "f", "arguments": {...}}, or a list of such; several may follow each other."""
    if text[0] not in "[{":
        return None
    decoder, position, values = json.JSONDecoder(), 0, []
    while position < len(text):
        value, position = decoder.raw_decode(text, position)
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
    if isinstance(arguments, str) and arguments:
        arguments = json.loads(arguments)
    if arguments is None or arguments == "":  # of a function that takes none
        arguments = {}
    if not name or not isinstance(arguments, dict):
        return None
    return Called(name, dumped(arguments))


_NAME = r"[\w.:/-]+"
"""What the name of a function may be: `plain_tool` refuses others."""

_RECIPIENT = re.compile(rf"\bto=({_NAME})")


def _harmony(text: str, schemas: Mapping[str, Any], _cut: bool) -> list[Called] | None:
    """<|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>{...}, one or several."""
    if not text.startswith(START):
        return None
    calls = []
    for piece in re.split(r"(?=<\|start\|>assistant)", text)[1:]:
        header, sign, body = piece.strip().partition("<|message|>")
        found, value = _RECIPIENT.search(header), read_object(body)
        if found is None or not sign or value is None:
            return None
        calls.append(Called(_offered(found[1], schemas), dumped(value)))
    return calls


def _offered(written: str, schemas: Mapping[str, Any]) -> str:
    """The name of a function, without what some families write around it."""
    if written in schemas:
        return written
    name = written.removeprefix("functions.")
    return name if name in schemas else re.sub(r":\d+$", "", name)


_BEFORE_NAME = ("[TOOL_CALLS]", "<｜tool▁call▁begin｜>", "<|tool_call_begin|>", "function<｜tool▁sep｜>")
_BEFORE_VALUE = ("[ARGS]", "<｜tool▁sep｜>", "<|tool_call_argument_begin|>")
_BEHIND = ("```", "<｜tool▁call▁end｜>", "<|tool_call_end|>")
_ANY_NAME, _ID, _SPACE = re.compile(_NAME), re.compile(r"\[CALL_ID\]\w+"), re.compile(r"\s*")


def _named_json(text: str, schemas: Mapping[str, Any], cut: bool) -> list[Called] | None:
    """A name and the JSON of its arguments, a family's marks between: Mistral, DeepSeek, Kimi; several in a row."""
    calls: list[Called] = []
    position = 0
    while position < len(text):
        try:
            call, position = _named(text, position, schemas)
        except (ValueError, RecursionError):
            return calls if cut else None
        calls.append(call)
    return calls


def _named(text: str, position: int, schemas: Mapping[str, Any]) -> tuple[Called, int]:
    """The call at a position, and where it ends."""
    position = _behind(text, position, _BEFORE_NAME)
    name = _ANY_NAME.match(text, position)
    if name is None:
        raise ValueError("no name")
    position = _behind(text, name.end())
    if call_id := _ID.match(text, position):
        position = _behind(text, call_id.end())
    position = _behind(text, position, _BEFORE_VALUE)
    if text.startswith("```json", position):
        position = _behind(text, position + len("```json"))
    if not text.startswith("{", position):
        raise ValueError("no object")
    value, position = json.JSONDecoder().raw_decode(text, position)
    return Called(_offered(name[0], schemas), dumped(value)), _behind(text, position, _BEHIND)


def _behind(text: str, position: int, marks: tuple[str, ...] = ()) -> int:
    """The position behind white space, and behind those of the marks that stand there, each once, in their order."""
    space = _SPACE.match(text, position)
    position = space.end() if space else position
    for mark in marks:
        if text.startswith(mark, position):
            return _behind(text, position + len(mark), marks[marks.index(mark) + 1 :])
    return position


_FUNCTION = re.compile(r"""<function=(?P<a>[^>\s]{1,256})>|<invoke\s{1,8}name="(?P<b>[^"]{1,256})">""")
_PARAMETER = re.compile(r"""<parameter(?:=|\s{1,8}name=")([^>"]{1,256})"?>""")


def _tagged(text: str, schemas: Mapping[str, Any], _cut: bool) -> list[Called] | None:
    """<function=f><parameter=a>1</parameter></function> of Qwen3-Coder, <invoke name="f"> of MiniMax."""
    calls, position = [], 0
    while (position := _behind(text, position)) < len(text):
        found = _FUNCTION.match(text, position)
        if found is None:
            return None
        closing = "</function>" if found["a"] else "</invoke>"
        body, position = _until(text, found.end(), closing)
        given, place = {}, 0
        while (place := _behind(body, place)) < len(body):
            one = _PARAMETER.match(body, place)
            if one is None:
                return None
            value, place = _until(body, one.end(), "</parameter>")
            given[one[1].strip()] = value.removeprefix("\n").removesuffix("\n")
        calls.append(_typed((found["a"] or found["b"]).strip(), given, schemas))
    return calls


def _until(text: str, start: int, closing: str) -> tuple[str, int]:
    """The text before a mark, and the position behind it; ValueError where it does not come."""
    end = text.index(closing, start)
    return text[start:end], end + len(closing)


def _keyed(text: str, schemas: Mapping[str, Any], cut: bool) -> list[Called] | None:
    """f<arg_key>a</arg_key><arg_value>1</arg_value> of GLM; only its closing mark says that no more pairs come."""
    end = text.find("<arg_key>")
    name = text[: len(text) if end < 0 else end].strip()
    if cut or not _ANY_NAME.fullmatch(name):
        return None
    if end < 0 and name not in schemas:  # a word that is no function's name is no call
        return None
    given: dict[str, str] = {}
    place = len(text) if end < 0 else end
    while (place := _behind(text, place)) < len(text):
        pair = []
        for mark in ("arg_key", "arg_value"):
            place = _behind(text, place)
            if not text.startswith(f"<{mark}>", place):
                return None
            found, place = _until(text, place + len(f"<{mark}>"), f"</{mark}>")
            pair.append(found)
        given[pair[0].strip()] = pair[1]
    return [_typed(name, given, schemas)]


_COLON = re.compile(rf"call:({_NAME}?)\s{{0,8}}(?=\{{)")


def _colons(text: str, schemas: Mapping[str, Any], _cut: bool) -> list[Called] | None:
    """call:f{a:<escape>text<escape>,b:1} of Gemma; `<|"|>` quotes in Gemma 4."""
    found = _COLON.match(text)
    if found is None:
        return None
    return [Called(found[1], dumped(Gemma(text[found.end() :], schemas.get(found[1])).read()))]


_WORDS = {"true": True, "false": False, "null": None}


def _pythonic(text: str, _schemas: Mapping[str, Any], _cut: bool) -> list[Called] | None:
    """[f(a="x", b=1)] of LFM2 and Llama 3.2; nothing is run, only literals are read, JSON's words among them."""
    if not re.match(r"\[?\s{0,64}[A-Za-z_][\w.]{0,256}\s{0,8}\(", text) or len(text) > 100_000:
        return None
    try:
        node = ast.parse(text, mode="eval").body
        calls = []
        for each in node.elts if isinstance(node, ast.List) else [node]:
            if not isinstance(each, ast.Call) or each.args or any(word.arg is None for word in each.keywords):
                return None
            given = {str(word.arg): ast.literal_eval(_Words().visit(word.value)) for word in each.keywords}
            calls.append(Called(ast.unparse(each.func), dumped(given)))
        return calls
    except (SyntaxError, MemoryError, TypeError):
        return None


class _Words(ast.NodeTransformer):
    """Puts values in place of JSON's words."""

    def visit_Name(self, node: ast.Name) -> ast.AST:
        return ast.Constant(_WORDS[node.id]) if node.id in _WORDS else node


def _typed(name: str, given: Mapping[str, str], schemas: Mapping[str, Any]) -> Called:
    """A call whose values are texts: brought to the types of its schema."""
    known = Kinds(schemas.get(name))
    return Called(name, dumped({key: typed(text, property_of(known.root, key), known) for key, text in given.items()}))
