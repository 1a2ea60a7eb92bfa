"""Generates chat templates that try to be slow or large: expressions of the right types, nested at random.

    python tests/helpers/nasty_templates.py SEED

prints one. Sources of text and lists are near the limit on one value, so that almost every operation tries to pass it.
"""

from __future__ import annotations

import random
import sys

TEXTS = (
    "'a' * 90000",
    "('😀<&' * 20000)",
    "'\\n' * 50000",
    "'<b>' | safe",
    "'1' * 5000",
    "'%s' * 500",
    "'{0}' * 500",
    "'a b ' * 30000",
    "'ab'",
    "ns.s",
    "ns.s",
    "messages[0].content",
)
LISTS = (
    "['ab'] * 40000",
    "range(99999)",
    "[[1]] * 20000",
    "[['x'] * 900, ['y'] * 900]",
    "ns.l",
    "ns.l",
    "messages",
    "[ns.s, ns.s]",
    "(range(0, 9999) | map('string') | list)",
    "[ns.l, ns.l]",
    "[{'k': ns.s}, {'k': ns.s ~ 'a'}] * 9000",
    "dict.fromkeys(range(9999), ns.s) | items | list",
    "[ns.s, ns.s[1:] ~ 'a'] * 50",
    "(ns.l,)",
    "[1, 2]",
    "[{'k': [1, {'k': 2}]}] * 999",
)
TEXT_TO_TEXT = (
    "| upper",
    "| e",
    "| safe",
    "| title",
    "| replace('a', 'bbbb')",
    "| replace('', 'xx')",
    "| indent(50)",
    "| indent(2000)",
    "| center(9000)",
    "| trim",
    "| trim('ab')",
    "| truncate(90000)",
    "| urlencode",
    "| reverse",
    "| tojson",
    "| tojson(ensure_ascii=true)",
    "| forceescape",
    ".strip('ab')",
    ".strip(ns.s)",
    ".replace('a', 'yy')",
    ".replace('', ns.s)",
    ".expandtabs(99)",
    ".center(9000)",
    ".format('x' * 900)",
    ".format(ns.l)",
    ".format(ns.s)",
    "| format(ns.s)",
    "| format(ns.s, ns.l)",
    ".upper()",
    ".partition('b')[2]",
    ".rpartition('ba')[0]",
    ".zfill(9000)",
    ".title()",
    "[::-1]",
    "[1:]",
    "[:-1]",
    ".casefold()",
    ".removeprefix('a')",
    ".join(['x'] * 5000)",
    ".join([ns.s, ns.s])",
    ".ljust(9999)",
    ".format_map({'a': ns.s})",
    "| default(ns.s)",
    "| capitalize",
    "| batch(9) | map('join') | join",
    "* 7",
    "* 300",
    "| list | join('ab')",
    "| wordcount | string",
    "| string",
)
LIST_TO_LIST = (
    "| list",
    "| sort",
    "| unique | list",
    "| map('string') | list",
    "| map('upper') | list",
    "| batch(3) | list",
    "| batch(7, 'x') | list",
    "| slice(7) | list",
    "| reverse | list",
    "| select | list",
    "| reject('in', ns.l) | list",
    "| select('in', ns.l) | list",
    "| sort(reverse=true)",
    "[::-1]",
    "[1:]",
    "[:9]",
    "* 3",
    "* 40",
    "| map('list') | list",
    "| map('length') | list",
    "| map('join', ',') | list",
    "| map('tojson') | list",
    "| map(attribute='k') | list",
    "| map(attribute='k.k.k', default={'k': [ns.s]}) | list",
    "| map(attribute='k', default=ns.s) | sort",
    "| map(attribute='k', default=ns.s) | unique | list",
    "| groupby('k', default=ns.s) | list",
    "| groupby(0, default=1) | list",
    "| rejectattr('k', 'eq', ns.s) | list",
    "| selectattr('k', 'in', [ns.s, ns.s]) | list",
    "| map('replace', 'a', 'bb') | list",
    "| map('default', ns.l) | list",
    "| map('e') | list",
    "| sum(start=[])",
    "| map('batch', 2) | map('list') | list",
    "| sort(attribute='k')",
    "| map('indent', 99) | list",
    "| map('center', 9999) | list",
    "| map('format', ns.s) | list",
    "| map('int') | list",
    "| map('wordcount') | list",
)
LIST_TO_TEXT = (
    "| join",
    "| join('ab')",
    "| join(ns.s)",
    "| tojson",
    "| tojson(indent=8)",
    "| string",
    "| map('string') | join",
    "| map('e') | join(',')",
    "| first | string",
    "| last | string",
    "| map(attribute='k', default=ns.s) | join",
    "| map(attribute='k', default=ns.s) | max | string",
    "| map(attribute='k', default=ns.s) | min | string",
    "| length | string",
    "| random | string",
)
TEXT_TO_LIST = (
    "| list",
    ".split()",
    ".split('a')",
    ".rsplit('aa')",
    ".rsplit(ns.s)",
    ".split(ns.s)",
    ".splitlines()",
    "| batch(2) | list",
    "| slice(9) | list",
    "| map('upper') | list",
    "| sort",
    "| unique | list",
)
TESTS = (
    "ns.s in {l}",
    "{s} in ns.s",
    "{l} == ns.l",
    "ns.l in {l}",
    "{s} < ns.s",
    "{l} | length > 3",
    "{l}.count(ns.s) > 1",
    "ns.s in ({l} | map(attribute='k', default=ns.s))",
    "{s}.count('ab') > 3",
    "{s}.rfind(ns.s) > 1",
    "{s}.endswith(ns.s)",
    "{s}.find('b') > 0",
    "{s} is eq ns.s",
    "loop is defined",
    "{s} | length > 9",
    "{s}.isalpha()",
)


def nasty_template(seed: int) -> str:
    """Source of the template with this number."""
    chance = random.Random(seed)
    macro = "{% macro f(a, b) %}{{ a }}{% for c in b %}{{ c }}{% endfor %}{% endmacro %}"
    start = "{% set ns = namespace(s='ab', l=['b', 'a']) %}"
    return macro + start + "".join(statement(chance, 3) for _ in range(3))


def text(chance: random.Random, depth: int) -> str:
    """An expression that makes text, of at most `depth` operations within each other."""
    kind = chance.random()
    if depth <= 0:
        return chance.choice(TEXTS)
    if kind < 0.5:
        return f"({text(chance, depth - 1)}) {chance.choice(TEXT_TO_TEXT)}"
    if kind < 0.7:
        return f"({text(chance, depth - 1)}) {chance.choice('+~~')} ({text(chance, depth - 1)})"
    if kind < 0.92:
        return f"({items(chance, depth - 1)}) {chance.choice(LIST_TO_TEXT)}"
    if kind < 0.96:
        return f"f({text(chance, depth - 1)}, {items(chance, depth - 1)})"
    return f"({text(chance, depth - 1)}) ~ ({items(chance, depth - 1)})"


def items(chance: random.Random, depth: int) -> str:
    """An expression that makes a list."""
    kind = chance.random()
    if depth <= 0:
        return chance.choice(LISTS)
    if kind < 0.6:
        return f"({items(chance, depth - 1)}) {chance.choice(LIST_TO_LIST)}"
    if kind < 0.75:
        return f"({text(chance, depth - 1)}) {chance.choice(TEXT_TO_LIST)}"
    if kind < 0.85:
        return f"({items(chance, depth - 1)}) | list + (({items(chance, depth - 1)}) | list)"
    return f"[{text(chance, depth - 1)}, {items(chance, depth - 1)}]"


def statement(chance: random.Random, depth: int) -> str:
    """A statement, of at most `depth` statements within each other."""
    kind = chance.random()
    if depth <= 0 or kind < 0.25:
        return "{{ " + text(chance, 2) + " }}"
    if kind < 0.45:
        return "{% set ns.s = " + text(chance, 2) + " %}"
    if kind < 0.6:
        return "{% set ns.l = " + items(chance, 2) + " %}"
    inner = statement(chance, depth - 1)
    if kind < 0.8:
        source = chance.choice(["range(40)", "range(99999)", items(chance, 1)])
        return "{% for i in " + source + " %}" + inner + statement(chance, depth - 1) + "{% endfor %}"
    if kind < 0.9:
        test = chance.choice(TESTS).format(s=f"({text(chance, 1)})", l=f"({items(chance, 1)})")
        return "{% if " + test + " %}" + inner + "{% endif %}"
    if kind < 0.95:
        return "{% set z %}" + inner + "{% endset %}{{ z }}"
    return (
        "{% filter "
        + chance.choice(["upper", "indent(20)", "e", "replace('a', 'bb')"])
        + " %}"
        + inner
        + "{% endfilter %}"
    )


if __name__ == "__main__":
    print(nasty_template(int(sys.argv[1])))
