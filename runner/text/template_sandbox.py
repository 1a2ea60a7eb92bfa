"""Compiles and renders templates from strangers: Jinja's immutable sandbox plus limits on steps, time and memory.

The sandbox keeps a template away from Python's internals. It does not keep it from `range` inside `range`, from
`'a' * 10**9` or from doubling a string in a loop, so every operation that takes time or makes a value is bounded
(`runner.text.template_limits` has the limits):

- each loop pass, macro call, call, filter, test and operator is a *step*; steps and wall time are limited;
- text is measured before it is made (`*`, `%`, `join`, `replace`, ...), and its sum over a rendering is limited;
- a container is walked, with a limit, before anything prints or compares it: `[x, x]` nested forty times is small in
  memory and endless in print.

The module imports jinja2 and is itself imported at the first rendering only.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from types import BuiltinMethodType, CodeType, FunctionType, MethodType
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.compiler import CodeGenerator
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace, pass_context
from jinja2.visitor import NodeTransformer

from runner.errors import TemplateError
from runner.text.template_limits import Budget, check_filter, check_format, check_operator, check_text_call

_REMOVED_FILTERS = ("pprint", "striptags", "urlize", "wordwrap", "xmlattr")
_REMOVED_METHODS = ("encode", "translate", "maketrans", "to_bytes", "from_bytes")
# Arguments of these are not walked, so that `messages | length` in a loop does not go through all messages each time:
# they do not look into the items of a container, or `check_filter` measures what they get (`join`, `list`, `sum`).
_SHALLOW_FILTERS = frozenset([
    "length", "count", "first", "last", "list", "map", "select", "selectattr", "reject", "rejectattr", "default", "d",
    "items", "batch", "slice", "reverse", "random", "attr", "sum", "join",
])  # fmt: skip
_SHALLOW_TESTS = frozenset([
    "defined", "undefined", "none", "string", "mapping", "sequence", "iterable", "number", "boolean", "true", "false",
    "callable", "sameas", "filter", "test",
])  # fmt: skip


class Refusal(jinja2.TemplateError):
    """Raised in a template by `raise_exception`, for example for an unexpected order of roles."""


class BoundedNamespace(Namespace):
    """Jinja's `namespace`, which refuses names that start with `_` and whose `repr` does not print its contents."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace cannot hold {name!r}")
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<Namespace>"


class _Generation(Extension):
    """The tag `{% generation %}`, which marks the assistant's text for training; here it renders its body as it is."""

    def __init__(self, environment: jinja2.Environment) -> None:
        super().__init__(environment)
        self.tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Macro) -> str:
        text: str = caller()
        return text


class _Meter(NodeTransformer):
    """Adds calls of the environment's hooks to a parsed template where Jinja would run Python that is not metered."""

    def _body(self, node: nodes.For | nodes.Macro | nodes.CallBlock) -> nodes.Node:
        # A hook in front of the body, so that an empty loop counts its passes too.
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_hook("tick", []), lineno=node.lineno))
        return node

    visit_For = visit_Macro = visit_CallBlock = _body

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        # `~` would otherwise join texts of any length.
        self.generic_visit(node)
        return _hook("join_texts", list(node.nodes))

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        # Comparing containers goes through all their contents.
        self.generic_visit(node)
        node.expr = _hook("walked", [node.expr])
        for operand in node.ops:
            operand.expr = _hook("walked", [operand.expr])
        return node

    def visit_Pair(self, node: nodes.Pair) -> nodes.Node:
        # A tuple as a key is hashed with all its contents.
        self.generic_visit(node)
        node.key = _hook("walked", [node.key])
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        # A slice is a copy, so its size counts; an item or attribute is not.
        self.generic_visit(node)
        return _hook("charged", [node]) if isinstance(node.arg, nodes.Slice) else node


def _hook(name: str, arguments: list[nodes.Expr]) -> nodes.Call:
    """Syntax tree of a call of the environment's method `name`."""
    return nodes.Call(nodes.EnvironmentAttribute(name), arguments, [], None, None)


class _MeteredCode(CodeGenerator):
    """Generates Python code of templates after `_Meter` has added the hooks."""

    def visit_Template(self, node: nodes.Template, frame: Any = None) -> None:
        super().visit_Template(_Meter().visit(node), frame)


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """Jinja environment of one rendering, in which every operation draws on one budget."""

    code_generator_class = _MeteredCode
    intercepted_binops = frozenset(["+", "-", "*", "/", "//", "%", "**"])

    def __init__(self, budget: Budget, now: datetime) -> None:
        # White space and extensions are as in transformers. Without the optimizer nothing of a template is evaluated
        # while it is compiled.
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols], cache_size=0, optimized=False,
            finalize=_finalize,
        )  # fmt: skip
        self.budget = budget
        # Replace Jinja's filters and tests by metered ones, and its globals by those that chat templates know.
        self.filters = {
            name: self._bounded(name, call, shallow=name in _SHALLOW_FILTERS)
            for name, call in self.filters.items()
            if name not in _REMOVED_FILTERS
        }
        self.filters["tojson"] = self._bounded("tojson", _tojson, shallow=False)
        self.tests = {
            name: self._bounded("", call, shallow=name in _SHALLOW_TESTS) for name, call in self.tests.items()
        }
        del self.globals["lipsum"]
        self.globals["dict"] = _Dict()
        self.globals["namespace"] = _namespace
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = lambda format: now.strftime(_short(format))

    # Hooks that the compiled template calls (see `_Meter`).
    def tick(self) -> None:
        pass  # `call` has counted the step

    def walked(self, value: Any) -> Any:
        return self.budget.walk(value)

    def charged(self, value: Any) -> Any:
        return self.budget.charge(value)

    def join_texts(self, *values: Any) -> str:
        return self._made("".join(self._texts(values)))

    def _texts(self, values: Iterable[Any]) -> list[str]:
        """The values as text; stops as soon as their sum is too long, before they are joined."""
        texts: list[str] = []
        total = 0
        for value in values:
            texts.append(str(self.budget.walk(value)))
            total += len(texts[-1])
            self.budget.check(total)
        return texts

    def _made(self, text: str) -> str:
        self.budget.charge(text)
        return text

    def concat(self, values: Iterable[str]) -> str:
        """Join the pieces of text that a template, macro or block has written."""
        return self._made("".join(self._texts(values)))

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        self.budget.step()
        # A method of a text or number: refused, or measured before it runs.
        if isinstance(obj, (BuiltinMethodType, MethodType)) and isinstance(obj.__self__, (str, bytes, int, float)):
            if obj.__name__ in _REMOVED_METHODS:
                raise TemplateError(f"the chat template calls .{obj.__name__}(), which templates may not")
            args = check_text_call(self.budget, obj.__name__, obj.__self__, args, kwargs)
        # `walked` walks its argument itself; all other functions may go through what they are given.
        if obj != self.walked:
            for value in (*args, *kwargs.values()):
                self.budget.walk(value)
        return self.budget.charge(super().call(context, obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        self.budget.step()
        check_operator(self.budget, operator, left, right)
        return self.budget.charge(super().call_binop(context, operator, left, right))

    def getitem(self, obj: Any, argument: Any) -> Any:
        return super().getitem(obj, self.budget.walk(argument))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        formatted = super().wrap_str_format(value)
        if formatted is None:
            return None
        # Jinja's own wrapper checks attribute access in fields; widths are checked here, just before it runs.
        template = str(value.__self__)

        def checked(*args: Any, **kwargs: Any) -> str:
            values = (*args, *kwargs.values())
            check_format(
                self.budget, template, self.budget.walk(values), nested=bool(re.search(r"\{[^{}]*\{", template))
            )
            return formatted(*args, **kwargs)

        return checked

    def _bounded(self, name: str, call: Any, *, shallow: bool) -> Callable[..., Any]:
        """Wrap a filter or test so that it costs a step and its result is charged.

        `name` is the name of a filter ("" for a test), by which its result is measured before it is made; with
        `shallow` the arguments are not walked.
        """
        passed = int(isinstance(call, FunctionType) and "jinja_pass_arg" in vars(call))  # Jinja's own first argument

        @functools.wraps(call)
        def bounded(*args: Any, **kwargs: Any) -> Any:
            self.budget.step()
            if not shallow:
                for value in (*args[passed:], *kwargs.values()):
                    self.budget.walk(value)
            rest = check_filter(self.budget, name, args[passed:], kwargs)
            return self.budget.charge(call(*args[:passed], *rest, **kwargs))

        return bounded


def compile_template(source: str) -> CodeType:
    """Compile a template to Python code, in some milliseconds.

    Raises:
        TemplateError: `source` is not valid Jinja, or cannot be compiled.
    """
    environment = BoundedEnvironment(Budget(len(source)), datetime.now())
    try:
        code: CodeType = environment.compile(source, name="chat template", filename="<chat template>")
    except TemplateError:
        raise
    except jinja2.TemplateSyntaxError as error:
        raise TemplateError(f"the chat template is not valid Jinja: line {error.lineno}: {error.message}") from error
    except (Exception, RecursionError, MemoryError) as error:
        raise TemplateError(f"the chat template cannot be compiled: {type(error).__name__}: {error!s:.200}") from error
    return code


def render_template(
    code: CodeType, variables: Mapping[str, Any], *, size: int, now: datetime, deadline: float | None = None
) -> str:
    """Render the compiled template `code`.

    Args:
        code: result of `compile_template`.
        variables: plain JSON-like data that the template can read.
        size: characters and items in the template and `variables`; the limits grow with it.
        now: the time that `strftime_now` formats.
        deadline: time of `time.monotonic` at which it must be done; None: as late as the size allows.

    Raises:
        TemplateError: the template refuses its input, fails, or exceeds a limit.
    """
    environment = BoundedEnvironment(Budget(size, deadline), now)
    try:
        template = jinja2.Template.from_code(environment, code, environment.make_globals(None))
        return environment.concat(template.root_render_func(template.new_context(dict(variables))))
    except TemplateError:
        raise
    except Refusal as error:
        raise TemplateError(f"the chat template refuses these messages: {error!s:.2000}") from error
    except (Exception, RecursionError, MemoryError) as error:
        raise TemplateError(f"the chat template failed: {type(error).__name__}: {error!s:.500}") from error


@pass_context
def _finalize(context: Context, value: Any) -> Any:
    """Walk the value of `{{ value }}` before it is written.

    `pass_context` gives access to the budget and keeps Jinja from writing out constants while it compiles.
    """
    environment = context.environment
    assert isinstance(environment, BoundedEnvironment)
    return environment.budget.walk(value)


class _Dict:
    """The global `dict` of templates: makes dicts and has none of the other attributes of the type `dict`."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, keys: Iterable[Any], value: Any = None) -> dict[Any, Any]:
        return dict.fromkeys(keys, value)


def _namespace(*args: Any, **kwargs: Any) -> BoundedNamespace:
    """The global `namespace` of templates; sets each item by itself, so that its name is checked."""
    made = BoundedNamespace()
    for name, value in dict(*args, **kwargs).items():
        made[name] = value
    return made


def _raise_exception(message: Any) -> None:
    raise Refusal(str(message)[:4000])


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """The filter `tojson` as transformers defines it: JSON without HTML escapes.

    Private-use characters are not escaped even with `ensure_ascii`: they may be the markers around users' text
    (`runner.text.special_tokens`).
    """
    text = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    if not ensure_ascii:
        return text
    # Undo the escapes of surrogate pairs that spell the private use areas A and B (U+F0000 on).
    return re.sub(r"\\udb[89a-f][0-9a-f]\\ud[c-f][0-9a-f]{2}", lambda found: str(json.loads(f'"{found[0]}"')), text)


def _short(format: Any) -> str:
    """Return `format` if `strftime` can only make a short text of it."""
    if not isinstance(format, str) or len(format) > 200 or re.search(r"%[-_0^#]*\d{3}", format):
        raise TemplateError(f"strftime_now({format!r:.40}) is refused: expected a short format without wide fields")
    return format
