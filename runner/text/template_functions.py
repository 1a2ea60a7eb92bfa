"""Functions and filters that chat templates find in the sandbox, with the meaning that transformers gives them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

import jinja2
from jinja2.filters import make_attrgetter
from jinja2.utils import Namespace, pass_environment

from runner.errors import TemplateError
from runner.text.template_limits import Budget
from runner.text.template_measures import check_operator


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


class DictMaker:
    """The global `dict` of templates: makes dicts and has none of the other attributes of the type `dict`."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, keys: Iterable[Any], value: Any = None) -> dict[Any, Any]:
        return dict.fromkeys(keys, value)


def namespace(*args: Any, **kwargs: Any) -> BoundedNamespace:
    """The global `namespace` of templates; sets each item by itself, so that its name is checked."""
    made = BoundedNamespace()
    for name, value in dict(*args, **kwargs).items():
        made[name] = value
    return made


@pass_environment
def bounded_sum(environment: Any, iterable: Any, attribute: Any = None, start: Any = 0) -> Any:
    """The filter `sum`, which charges each addition: every sum of lists is a copy of all the lists before."""
    budget: Budget = environment.budget
    if attribute is not None:
        iterable = map(make_attrgetter(environment, attribute), iterable)
    if isinstance(start, str):
        raise TypeError("sum() can't sum strings: use join")
    for item in budget.listed(iterable):
        budget.check_time()
        check_operator(budget, "+", start, item)
        start = start + item
    return start


def raise_exception(message: Any) -> None:
    raise Refusal(str(message)[:4000])


def tojson(
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
    escapes = r"(\\udb[89a-f][0-9a-f]\\ud[c-f][0-9a-f]{2})+"
    return re.sub(escapes, lambda found: str(json.loads(f'"{found[0]}"')), text)


def short_format(format: Any) -> str:
    """Return `format` if `strftime` can only make a short text of it."""
    if not isinstance(format, str) or len(format) > 200 or re.search(r"%[-_0^#]*\d{3}", format):
        raise TemplateError(f"strftime_now({format!r:.40}) is refused: expected a short format without wide fields")
    return format
