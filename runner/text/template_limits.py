"""Limits on what the rendering of a chat template may cost: steps, time, and the size of the values it makes."""

from __future__ import annotations

import re
import time
from collections.abc import ItemsView, KeysView, Mapping, ValuesView
from typing import Any

from runner.errors import TemplateError

MAX_SOURCE = 128 << 10  # characters of a template; the longest that are published have some 30,000
_STEPS = 200_000
_SECONDS = 3.0
_TEXT = 1 << 20  # characters that one value may have, besides four for each character of the inputs
_WORK = 64  # limit on the sum over all values made, as a multiple of the limit on one value
_WIDTH = 10_000  # largest width of a formatted field, an indent and the like
_INT_BITS = 4096
_NESTING = (list, tuple, dict, set, frozenset, KeysView, ValuesView, ItemsView)


class OverBudgetError(TemplateError):
    """A template exceeds a limit on steps, time or sizes."""


def seconds_for(size: int) -> float:
    """Seconds that rendering inputs of `size` characters and items may take: 3, and one more for each million."""
    return _SECONDS + size * 1e-6


class Budget:
    """What one rendering may still spend.

    `size` is the number of characters and items in the template and its inputs; limits on text and steps grow with it.
    `deadline` is a time of `time.monotonic`; None: as late as the size allows.
    """

    def __init__(self, size: int, deadline: float | None = None) -> None:
        self.text_limit = _TEXT + 4 * size
        self._work = _WORK * self.text_limit
        self._steps = _STEPS + 4 * size
        self._deadline = time.monotonic() + seconds_for(size) if deadline is None else deadline

    def step(self) -> None:
        """Count one step; raises `OverBudgetError` when steps or time run out."""
        self._steps -= 1
        if self._steps < 0 or time.monotonic() > self._deadline:
            raise OverBudgetError("the chat template takes too many steps: its loops are refused; use another template")

    def check(self, length: int) -> None:
        """Raise `OverBudgetError` if a text or list of `length`, which is about to be made, would be too long."""
        if length > self.text_limit:
            raise OverBudgetError(
                f"the chat template makes {_shown(length)} characters at once, more than the {self.text_limit} allowed"
            )

    def check_bits(self, bits: int) -> None:
        """Raise `OverBudgetError` if an integer of `bits` bits, which is about to be made, would be too large."""
        if bits > _INT_BITS:
            raise OverBudgetError(f"the chat template makes a number of {_shown(bits)} bits, more than {_INT_BITS}")

    def charge(self, value: Any) -> Any:
        """Charge the budget for a value that was just made, and return the value."""
        if isinstance(value, (str, bytes)):
            length = len(value)
        # An item is a pointer of eight bytes, whatever it points to.
        elif isinstance(value, (list, tuple, dict, set)):
            length = 8 * len(value)
        elif isinstance(value, int):
            self.check_bits(value.bit_length())
            return value
        else:
            return value
        self.check(length)
        self._work -= length
        if self._work < 0:
            raise OverBudgetError("the chat template makes too much text in all; use another template")
        return value

    def walk(self, value: Any, indent: int = 0) -> Any:
        """Return `value`; raise `OverBudgetError` if writing it out, `indent` deeper for each level, would be too long.

        A container counts as often as it occurs: nested pairs `[x, x]` are small in memory and endless in print.
        """
        if not isinstance(value, _NESTING):
            return value
        left = self.text_limit
        # A stack instead of recursion, so that deep nesting is not an error of its own.
        waiting: list[tuple[Any, int]] = [(value, 0)]
        while waiting:
            item, depth = waiting.pop()
            left -= 1 + depth * indent + (len(item) if isinstance(item, str) else 0)
            if left < 0:
                self.check(self.text_limit + 1)
            if isinstance(item, (dict, ItemsView)):
                pairs = item.items() if isinstance(item, dict) else item
                waiting += [(part, depth + 1) for pair in pairs for part in pair]
            elif isinstance(item, _NESTING):
                waiting += [(part, depth + 1) for part in item]
        return value


def check_operator(budget: Budget, operator: str, left: Any, right: Any) -> None:
    """Raise `OverBudgetError` if the result of `left operator right` would be too large."""
    if operator == "*":
        for value, times in ((left, right), (right, left)):
            if isinstance(value, (str, bytes, list, tuple)) and isinstance(times, int):
                budget.check(len(value) * max(times, 0) * (1 if isinstance(value, (str, bytes)) else 8))
        if isinstance(left, int) and isinstance(right, int):
            budget.check_bits(left.bit_length() + right.bit_length())
    # Adding to a Markup (a subclass of str) escapes the other side, up to five characters for one: six is safe.
    elif operator == "+" and isinstance(left, (str, list, tuple)) and isinstance(right, (str, list, tuple)):
        budget.check((len(left) + len(right)) * (6 if isinstance(left, str) and type(left) is not str else 1))
    elif operator == "%" and isinstance(left, str):
        check_format(budget, left, budget.walk(right), nested="*" in left)
    elif operator == "**" and isinstance(left, int) and isinstance(right, int):
        budget.check_bits(left.bit_length() * abs(right))


def check_format(budget: Budget, template: str, values: Any, *, nested: bool) -> None:
    """Raise `OverBudgetError` if formatting `template` with `values` makes a wide field or too long a text.

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
    longest = max((len(str(value)) for value in listed if isinstance(value, (str, *_NESTING))), default=0)
    fields = template.count("{") + template.count("%")
    width = max([_WIDTH if nested else 0, *(int(digits) for digits in numbers_in)])
    budget.check(len(template) + fields * max(longest, width))


def check_text_call(
    budget: Budget, name: str, text: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Any, ...]:
    """Raise `OverBudgetError` if the result of the string method `name` would be too long.

    Returns the arguments of the method, with the iterable given to `join`, which measuring uses up, as a list.
    """
    if name in ("center", "ljust", "rjust", "zfill") and args and isinstance(args[0], int):
        budget.check(args[0])
    elif name == "expandtabs":
        tab = kwargs.get("tabsize", args[0] if args else 8)
        budget.check(len(text) + text.count("\t") * (tab if isinstance(tab, int) else 8))
    elif name == "join" and args:
        items = budget.walk(list(args[0]))
        budget.check(sum(len(item) for item in items if isinstance(item, str)) + len(text) * len(items))
        return (items, *args[1:])
    elif name == "replace" and len(args) >= 2 and isinstance(args[0], str) and isinstance(args[1], str):
        budget.check(len(text) + text.count(args[0]) * len(args[1]))
    return args


def check_filter(budget: Budget, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """Raise `OverBudgetError` if the result of the filter `name` would be too large; `args[0]` is the filtered value.

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
            raise OverBudgetError(f"the chat template asks {name} for a width of {_shown(width)}")
        if name == "indent":
            budget.check((str(value).count("\n") + 1) * width)
        if name == "tojson":
            separators = [len(part) for option in options if isinstance(option, tuple) for part in option]
            budget.walk(value, max([width, *separators]))
    # `list` copies a container and looks no deeper; `join` and `sum` go through the contents.
    elif name in ("join", "sum", "list"):
        items = list(value) if name == "list" else budget.walk(list(value))
        separator = options[0] if options and isinstance(options[0], str) else ""
        sizes = sum(len(i) if isinstance(i, str) else 8 * len(i) if isinstance(i, (list, tuple)) else 8 for i in items)
        budget.check(sizes + len(items) * len(separator))
        return (items, *args[1:])
    elif name == "replace" and len(options) >= 2:
        old, new = str(options[0]), str(options[1])
        budget.check(len(str(value)) + str(value).count(old) * len(new))
    elif name == "format":
        check_format(budget, str(value), tuple(options), nested="*" in str(value))
    # A number of n digits has more than 3n bits, and converting it takes time that is quadratic in n.
    elif name == "int" and isinstance(value, str):
        budget.check(0 if len(value) < _INT_BITS else budget.text_limit + 1)
    return args


def _shown(number: int) -> str:
    """`number` for a message; Python refuses to print integers of thousands of digits."""
    return str(number) if number < 10**15 else "over 10**15"
