"""Measures what an operator, method or filter of a template is about to make, and charges the budget before it is made.

Each function raises `OverBudgetError` if the result would be too large, or would take too long to make.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from runner.text.template_limits import NESTING, Budget, OverBudgetError, shown

_WIDTH = 10_000  # largest width of a formatted field, an indent and the like
_DIGITS = 4096  # converting n digits takes time that is quadratic in n
_STRIPPED = 256  # `strip` compares each character of a text with each of those it is given
_REPR = 10  # characters that `repr` and `ascii` make of one: \U0001f600
_QUOTED = 12  # characters that `urlencode` makes of one: %F0%9F%98%80
_SPECIAL = "&<>'\""
_STRIPS = ("strip", "lstrip", "rstrip")
_SPLITS = ("split", "rsplit", "splitlines")


def check_operator(budget: Budget, operator: str, left: Any, right: Any) -> None:
    """Charge for the result of `left operator right`."""
    if operator == "*":
        for value, times in ((left, right), (right, left)):
            if isinstance(value, (str, bytes)) and isinstance(times, int):
                budget.spend(len(value) * max(times, 0))
            elif isinstance(value, (list, tuple)) and isinstance(times, int):
                budget.spend_items(len(value) * max(times, 0))
        if isinstance(left, int) and isinstance(right, int):
            budget.check_bits(left.bit_length() + right.bit_length())
    elif operator == "+" and isinstance(left, str) and isinstance(right, str):
        # Where one side is a Markup (a subclass of str), the other one is escaped.
        marked = isinstance(left, Markup) or isinstance(right, Markup)
        budget.spend(_escaped(left) + _escaped(right) if marked else len(left) + len(right))
    elif operator == "+" and isinstance(left, (list, tuple)) and isinstance(right, (list, tuple)):
        budget.spend_items(len(left) + len(right))
    elif operator == "%" and isinstance(left, str):
        check_format(budget, left, budget.walk(right), nested="*" in left)
    elif operator == "**" and isinstance(left, int) and isinstance(right, int):
        budget.check_bits(left.bit_length() * abs(right))


def check_format(budget: Budget, template: str, values: Any, *, nested: bool) -> None:
    """Check that formatting `template` with `values` makes no wide field and no long text.

    `nested`: a width may come from a value (`%*d`, `{:{}}`), so that numbers among the values are checked as widths.
    """
    listed = [*values.values()] if isinstance(values, dict) else [*values] if isinstance(values, tuple) else [values]
    numbers_in = re.findall(r"\d+", template)
    wide = any(len(digits) > 6 or int(digits) > _WIDTH for digits in numbers_in)
    if nested:
        numbers = [value for value in listed if isinstance(value, int)]
        texts = [value for value in listed if isinstance(value, str)]
        wide = wide or any(abs(n) > _WIDTH for n in numbers) or any(re.search(r"\d{5}", text) for text in texts)
    if wide:
        raise OverBudgetError(f"the chat template formats a field wider than {_WIDTH}")
    # An upper bound: every field is as long as the longest value or the widest width.
    longest = max((len(str(value)) for value in listed if isinstance(value, (str, *NESTING))), default=0)
    if re.search(r"%[^%]?[ra]|![ra]", template):
        longest *= _REPR
    elif isinstance(template, Markup):
        longest = max((_escaped(str(value)) for value in listed), default=0)
    fields = template.count("{") + template.count("%")
    width = max([_WIDTH if nested else 0, *(int(digits) for digits in numbers_in)])
    budget.check(len(template) + fields * max(longest, width))


def check_text_call(
    budget: Budget, name: str, text: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Any, ...]:
    """Charge for the result of the method `name` of a text or number.

    Returns the arguments of the method, with the iterable given to `join`, which measuring uses up, as a list.
    """
    if name in ("center", "ljust", "rjust", "zfill") and args and isinstance(args[0], int):
        budget.check(args[0])
    elif name == "expandtabs":
        tab = kwargs.get("tabsize", args[0] if args else 8)
        budget.check(len(text) + text.count("\t") * (tab if isinstance(tab, int) else 8))
    elif name == "join" and args:
        items = budget.walk(budget.listed(args[0]))
        measure = _escaped if isinstance(text, Markup) else len
        budget.check(sum(measure(item) for item in items if isinstance(item, str)) + len(text) * len(items))
        return (items, *args[1:])
    elif name == "replace" and len(args) >= 2 and isinstance(args[0], str) and isinstance(args[1], str):
        new = _escaped(args[1]) if isinstance(text, Markup) else len(args[1])
        budget.check(len(text) + text.count(args[0]) * new)
    elif name in _STRIPS and args:
        _check_stripped(args[0])
    elif name in _SPLITS:
        _check_pieces(budget, name, text, [*args, *kwargs.values()])
    return args


def check_filter(budget: Budget, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """Charge for the result of the filter `name`; `args[0]` is the filtered value.

    Returns the arguments of the filter, with an iterable that measuring uses up as a list.
    """
    if not args:
        return args
    value, options = args[0], [*args[1:], *kwargs.values()]
    # Any number among the options may be the width, and any text the string that is repeated.
    if name in ("center", "indent", "round", "batch", "slice", "tojson"):
        widths = [*(len(o) for o in options if isinstance(o, str)), *(o for o in options if isinstance(o, int))]
        width = max((abs(number) for number in widths), default=0)
        if width > (32 if name == "round" else _WIDTH):
            raise OverBudgetError(f"the chat template asks {name} for a width of {shown(width)}")
        if name == "indent":
            budget.check((str(value).count("\n") + 1) * width)
        if name == "tojson":
            separators = [len(part) for option in options if isinstance(option, tuple) for part in option]
            budget.walk(value, max([width, *separators]))
    # `list` copies a container and looks no deeper; `join` goes through the contents.
    elif name == "list":
        return (budget.listed(value), *args[1:])
    elif name == "join":
        items = budget.walk(budget.listed(value))
        separator = options[0] if options and isinstance(options[0], str) else ""
        sizes = sum(len(i) if isinstance(i, str) else 8 * len(i) if isinstance(i, (list, tuple)) else 8 for i in items)
        budget.check(sizes + len(items) * len(separator))
        return (items, *args[1:])
    elif name == "replace" and len(options) >= 2:
        old, new = str(options[0]), str(options[1])
        budget.check(len(str(value)) + str(value).count(old) * len(new))
    elif name == "format":
        check_format(budget, str(value), tuple(options), nested="*" in str(value))
    elif name in ("e", "escape", "forceescape"):
        budget.check(_escaped(str(value)))
    elif name == "urlencode":
        budget.check(_QUOTED * len(str(value)))
    elif name == "trim" and options:
        _check_stripped(options[0])
    elif name == "int" and isinstance(value, str):
        budget.check(0 if len(value) < _DIGITS else budget.text_limit + 1)
    return args


def _escaped(text: str) -> int:
    """Length of `text` after escaping for HTML, at most; a Markup is not escaped again."""
    return len(text) if isinstance(text, Markup) else len(text) + 4 * sum(text.count(mark) for mark in _SPECIAL)


def _check_stripped(characters: Any) -> None:
    if isinstance(characters, str) and len(characters) > _STRIPPED:
        raise OverBudgetError(f"the chat template strips {len(characters)} characters, more than {_STRIPPED} at once")


def _check_pieces(budget: Budget, name: str, text: str, options: list[Any]) -> None:
    """Check the number of pieces that splitting `text` may make."""
    separator = next((option for option in options if isinstance(option, str) and option), None)
    if separator is not None and name != "splitlines":
        budget.check(8 * (text.count(separator) + 1))
    elif not any(isinstance(option, int) and option > 0 for option in options):
        budget.check(8 * (len(text) // 2 + 1))
