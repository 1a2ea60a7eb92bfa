"""Compiles and renders templates from strangers: Jinja's immutable sandbox plus limits on steps, time and memory.

The sandbox keeps a template away from Python's internals. It does not keep it from `range` inside `range`, from
`'a' * 10**9` or from doubling a string in a loop, so every operation that takes time or makes a value is bounded
(`runner.text.template_limits` has the limits, `runner.text.template_measures` what each operation costs):

- each loop pass, macro call, call, filter, test and operator is a *step*; steps and wall time are limited;
- text and lists are measured before they are made (`+`, `*`, `%`, `join`, `replace`, ...), and their sum over a
  rendering is limited;
- no operation takes much longer than its values are long: those that do (`sum` of lists, `strip` of many characters)
  are replaced or refused, and a generator becomes a list before anything sorts, searches or hashes its items;
- a container is walked, with a limit, before anything prints or compares it: `[x, x]` nested forty times is small in
  memory and endless in print.

The module imports jinja2 and is itself imported at the first rendering only.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from types import BuiltinMethodType, CodeType, FunctionType, MethodType
from typing import Any

import jinja2
from jinja2 import meta, nodes
from jinja2.compiler import CodeGenerator
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import pass_context
from jinja2.visitor import NodeTransformer

from runner.errors import TemplateError
from runner.text.template_functions import (
    DictMaker,
    Refusal,
    bounded_sum,
    namespace,
    raise_exception,
    short_format,
    tojson,
)
from runner.text.template_limits import MAX_TOKENS, NESTING, Budget
from runner.text.template_measures import check_filter, check_format, check_operator, check_text_call

_REMOVED_FILTERS = ("pprint", "striptags", "urlize", "wordwrap", "xmlattr")
_REMOVED_METHODS = (
    "encode", "translate", "maketrans", "to_bytes", "from_bytes", "striptags", "escape", "unescape",
)  # fmt: skip
# Arguments of these are not walked, so that `messages | length` in a loop does not go through all messages each time:
# they do not look into the items of a container, or `check_filter` measures what they get (`join`, `list`, `sum`).
_SHALLOW_FILTERS = frozenset([
    "length", "count", "first", "last", "list", "map", "select", "selectattr", "reject", "rejectattr", "default", "d",
    "items", "batch", "slice", "reverse", "attr", "sum", "join",
])  # fmt: skip
_SHALLOW_TESTS = frozenset([
    "defined", "undefined", "none", "string", "mapping", "sequence", "iterable", "number", "boolean", "true", "false",
    "callable", "sameas", "filter", "test",
])  # fmt: skip


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
        self.filters["sum"] = self._bounded("sum", bounded_sum, shallow=True)
        self.filters["tojson"] = self._bounded("tojson", tojson, shallow=False)
        self.tests = {
            name: self._bounded("", call, shallow=name in _SHALLOW_TESTS) for name, call in self.tests.items()
        }
        del self.globals["lipsum"]
        self.globals["dict"] = DictMaker()
        self.globals["namespace"] = namespace
        self.globals["raise_exception"] = raise_exception
        self.globals["strftime_now"] = lambda format: now.strftime(short_format(format))

    # Hooks that the compiled template calls (see `_Meter`).
    def tick(self) -> None:
        pass  # `call` has counted the step

    def walked(self, value: Any) -> Any:
        return self.budget.walk(self._held(value))

    def _held(self, value: Any) -> Any:
        """Return the value; a generator, whose items no walk would see, as a list."""
        if isinstance(value, Iterator) and not isinstance(value, LoopContext):
            return self.budget.listed(value)
        return value

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
            total += len(texts[-1]) + 1  # an empty text takes room in the list too
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
        # The body of a macro is metered itself, and `walked` walks its argument.
        if isinstance(obj, Macro) or obj == self.walked:
            return super().call(context, obj, *args, **kwargs)
        # A method of a text or number: refused, or measured before it runs.
        owner = obj.__self__ if isinstance(obj, (BuiltinMethodType, MethodType)) else None
        if isinstance(owner, (str, bytes, int, float)) or (isinstance(owner, type) and issubclass(owner, str)):
            if obj.__name__ in _REMOVED_METHODS:
                raise TemplateError(f"the chat template calls .{obj.__name__}(), which templates may not")
            args = check_text_call(self.budget, obj.__name__, owner, args, kwargs)
        # A list's `count` and `index` compare all items.
        elif isinstance(owner, (list, tuple)):
            self.budget.walk(owner)
        # Any function may go through what it is given; a number may be the step of a range.
        args = tuple(self._argument(value) for value in args)
        kwargs = {name: self._argument(value) for name, value in kwargs.items()}
        return self.budget.charge(super().call(context, obj, *args, **kwargs))

    def _argument(self, value: Any) -> Any:
        """Return an argument of a function, walked and measured."""
        if isinstance(value, int):
            self.budget.check_bits(value.bit_length())
        return self.budget.walk(self._held(value))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        self.budget.step()
        # `-` makes a set of a dict's view and hashes its items.
        if operator == "-":
            for value in (left, right):
                self.budget.walk(value)
        check_operator(self.budget, operator, left, right)
        made = super().call_binop(context, operator, left, right)
        # Texts and lists are charged already, except what `%` makes.
        return made if operator in "+*" and isinstance(made, (str, *NESTING)) else self.budget.charge(made)

    def getitem(self, obj: Any, argument: Any) -> Any:
        self.budget.check_time()  # a path such as `a.a.a` in `map(attribute=...)` may have any number of parts
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
            first, given = args[:passed], args[passed:]
            if not shallow:
                given = tuple(self.walked(value) for value in given)
                kwargs = {key: self.walked(value) for key, value in kwargs.items()}
            given = check_filter(self.budget, name, given, kwargs)
            return self.budget.charge(call(*first, *given, **kwargs))

        return bounded


def compile_template(source: str) -> CodeType:
    """Compile a template to Python code, in some milliseconds.

    Raises:
        TemplateError: `source` is not valid Jinja, or cannot be compiled.
    """
    environment = BoundedEnvironment(Budget(len(source)), datetime.now())
    try:
        # Compiling takes longer the more tokens there are, and tokens alone are read in no time.
        count = sum(kind != "whitespace" for _, kind, _ in environment.lex(source))
        if count > MAX_TOKENS:
            raise TemplateError(
                f"the chat template has {count} tokens, more than the {MAX_TOKENS} of any chat template"
            )
        code: CodeType = environment.compile(source, name="chat template", filename="<chat template>")
    except TemplateError:
        raise
    except jinja2.TemplateSyntaxError as error:
        raise TemplateError(f"the chat template is not valid Jinja: line {error.lineno}: {error.message}") from error
    except (Exception, RecursionError, MemoryError) as error:
        raise TemplateError(f"the chat template cannot be compiled: {type(error).__name__}: {error!s:.200}") from error
    return code


def variables_of(source: str) -> frozenset[str]:
    """Return the names that the template `source` reads and does not set: a caller's variables, and Jinja's globals.

    `source` has been compiled before by `compile_template`, whose limits hold.
    """
    environment = BoundedEnvironment(Budget(len(source)), datetime.now())
    return frozenset(meta.find_undeclared_variables(environment.parse(source)))


def render_template(
    code: CodeType, variables: Mapping[str, Any], *, size: int, now: datetime, deadline: float | None = None
) -> str:
    """Render the compiled template `code`.

    Args:
        code: result of `compile_template`.
        variables: plain JSON-like data that the template can read.
        size: characters and items in the template and `variables`; the limits grow with it.
        now: the time that `strftime_now` formats.
        deadline: time of `time.thread_time` at which it must be done; None: as late as the size allows.

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
