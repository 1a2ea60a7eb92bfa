"""Limits on what the rendering of a chat template may cost: steps, time, and the size of the values it makes.

Time is looked at between operations only, so that no single one may be long: each works on values of bounded length, in
time that is linear in it (but for a logarithm where it sorts), and what it makes is charged before it is made.
"""

from __future__ import annotations

import time
from collections.abc import ItemsView, Iterable, KeysView, ValuesView
from typing import Any

from runner.errors import TemplateError

MAX_SOURCE = 128 << 10  # characters of a template; the longest that are published have some 30,000
MAX_TOKENS = 20_000  # tokens of a template's source, since each takes up to 0.1 ms to compile
_STEPS = 200_000
_SECONDS = 2.0
_TEXT = 1 << 20  # characters that one value may have, besides four for each character of the inputs
_WORK = 64  # limit on the sum over all values made, in units of `_TEXT` and two for each character of the inputs
_INT_BITS = 64  # integers equal modulo 2**61 - 1 hash alike: wider ones could fill a dict in quadratic time
_DEPTH = 500  # levels of nesting; hashing tuples nested some ten thousand deep overflows C's stack
_POINTER = 8  # an item of a container is a pointer of eight bytes, whatever it points to
NESTING = (list, tuple, dict, set, frozenset, KeysView, ValuesView, ItemsView)


class OverBudgetError(TemplateError):
    """A template exceeds a limit on steps, time or sizes."""


def seconds_for(size: int) -> float:
    """Seconds that rendering inputs of `size` characters and items may take: 2, and one more for each million."""
    return _SECONDS + size * 1e-6


class Budget:
    """What one rendering may still spend.

    `size` is the number of characters and items in the template and its inputs; limits on text and steps grow with it.
    `deadline` is a time of `time.thread_time`; None: as late as the size allows.
    """

    def __init__(self, size: int, deadline: float | None = None) -> None:
        self.text_limit = _TEXT + 4 * size
        self._work = _WORK * (_TEXT + 2 * size)
        self._steps = _STEPS + 4 * size
        self._deadline = time.thread_time() + seconds_for(size) if deadline is None else deadline

    def step(self) -> None:
        """Count one step; raises `OverBudgetError` when steps or time run out."""
        self._steps -= 1
        if self._steps < 0:
            raise OverBudgetError("the chat template takes too many steps: its loops are refused; use another template")
        self.check_time()

    def check_time(self) -> None:
        """Raise `OverBudgetError` if the time is up."""
        if time.thread_time() > self._deadline:
            raise OverBudgetError("the chat template takes too many steps for its time; use another template")

    def check(self, length: int) -> None:
        """Raise `OverBudgetError` if a text or list of `length`, which is about to be made, would be too long."""
        if length > self.text_limit:
            raise OverBudgetError(
                f"the chat template makes {shown(length)} characters at once, more than the {self.text_limit} allowed"
            )

    def check_bits(self, bits: int) -> None:
        """Raise `OverBudgetError` if an integer of `bits` bits, which is about to be made, would be too large."""
        if bits > _INT_BITS:
            raise OverBudgetError(f"the chat template makes a number of {shown(bits)} bits, more than {_INT_BITS}")

    def spend(self, length: int) -> None:
        """Charge the budget for a text of `length` characters, or bytes of pointers, that is about to be made."""
        self.check(length)
        self._work -= length
        if self._work < 0:
            raise OverBudgetError("the chat template makes too much text in all; use another template")

    def spend_items(self, count: int) -> None:
        """Charge the budget for a container of `count` items that is about to be made."""
        self.spend(_POINTER * count)

    def charge(self, value: Any) -> Any:
        """Charge the budget for a value that was just made, and return the value."""
        if isinstance(value, (str, bytes)):
            self.spend(len(value))
        elif isinstance(value, (list, tuple, dict, set)):
            self.spend_items(len(value))
        elif isinstance(value, int):
            self.check_bits(value.bit_length())
        return value

    def listed(self, items: Iterable[Any]) -> list[Any]:
        """Return the items as a list, charged; stops before there are too many.

        Generators come one at a time: each of a million short lists is small, but they are not together.
        """
        if isinstance(items, (str, bytes, range, *NESTING)):
            self.spend_items(len(items))
            return list(items)
        found: list[Any] = []
        for item in items:
            found.append(item)
            if len(found) % 256 == 0:
                self.check_time()
                self.check(_POINTER * len(found))
        self.spend_items(len(found))
        return found

    def walk(self, value: Any, indent: int = 0) -> Any:
        """Return `value`; raise `OverBudgetError` if writing it out, `indent` deeper for each level, would be too long.

        A container counts as often as it occurs: nested pairs `[x, x]` are small in memory and endless in print.
        """
        if not isinstance(value, NESTING):
            return value
        left, seen = self.text_limit, 0
        # A stack instead of recursion, so that deep nesting is not an error of its own.
        waiting: list[tuple[Any, int]] = [(value, 0)]
        while waiting:
            item, depth = waiting.pop()
            left -= 1 + depth * indent + (len(item) if isinstance(item, str) else 0)
            if left < 0:
                self.check(self.text_limit + 1)
            if not isinstance(item, NESTING):
                continue
            if depth > _DEPTH:
                raise OverBudgetError(f"the chat template nests values more than {_DEPTH} deep")
            seen += 1
            if seen % 1024 == 0:
                self.check_time()
            if isinstance(item, (dict, ItemsView)):
                pairs = item.items() if isinstance(item, dict) else item
                waiting += [(part, depth + 1) for pair in pairs for part in pair]
            else:
                waiting += [(part, depth + 1) for part in item]
        return value


def shown(number: int) -> str:
    """Return `number` for a message; Python refuses to print integers of thousands of digits."""
    return str(number) if number < 10**15 else "over 10**15"
