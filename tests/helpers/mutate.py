"""Damage done to files at random, by a seed: to bytes, to JSON values, to templates."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

NASTY: list[Any] = [
    None, True, False, 0, -1, 1, 2, 3, 7, 63, 64, 255, 2**31 - 1, 2**31, 2**53, 2**63, -(2**63), 2**64, 10**30,
    0.0, -0.5, 1e-38, 1e308, -1e308, "", " ", "x", "a" * 5000, "\u0000", "../../etc/passwd", "/dev/zero", "\ud7ff",
    "<s>", "{{ 1 }}", [], {},
    [[]], [{}], {"": ""}, {"type": "x"}, [0] * 3000, ["a"] * 3000, [["a", "b"]] * 500,
]  # fmt: skip
PIECES = [
    "{% for i in range(10**9) %}x{% endfor %}",
    "{{ 'a' * 10**9 }}",
    "{{ messages * 10**7 }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ ''.__class__.__mro__ }}",
    "{{ messages | map(attribute='x') | list | tojson }}",
    "{{ 10 ** 10 ** 10 }}",
    "{% set x = [] %}{% set x = x + messages %}",
    "{{ raise_exception('no') }}",
    "{{ messages | sum(start=[]) }}",
    "{% include 'x' %}",
    "{% extends 'y' %}",
    "{{ '%1000000000d' % 1 }}",
    "{{ messages[0]['content'] | replace('', 'xxxxxxxx') }}",
    "{% for a in messages %}{% for b in messages %}{% for c in messages %}{{ c }}{% endfor %}{% endfor %}{% endfor %}",
    "{% if",
    "{{",
    "}}",
    "{#",
    "{{ x.y.z }}",
    "{{ namespace(a=1).a }}",
    "{% generation %}a{% endgeneration %}",
    "{{ strftime_now('%' * 1000) }}",
]


def of_bytes(data: bytes, draw: random.Random) -> bytes:
    """Flip, cut, repeat, insert or overwrite a few places."""
    found = bytearray(data)
    for _ in range(draw.choice([1, 1, 1, 2, 5])):
        place = draw.randrange(len(found)) if found else 0
        kind = draw.randrange(6)
        if kind == 0 and found:
            found[place] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del found[place:]
        elif kind == 2:
            del found[place : place + draw.randrange(1, 40)]
        elif kind == 3:
            found[place:place] = draw.randbytes(draw.randrange(1, 20))
        elif kind == 4:
            found[place:place] = found[place : place + draw.randrange(1, 2000)] * draw.choice([1, 2, 30])
        else:
            found[place : place + 8] = draw.choice([0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1]).to_bytes(8, "little")
    return bytes(found)


def _places(value: Any, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [place] if place else []
    if len(place) > 200:  # nested by an earlier mutation
        return found
    if isinstance(value, dict):
        for key in value:
            found += _places(value[key], (*place, key))
    elif isinstance(value, list):
        for index in range(min(len(value), 40)):
            found += _places(value[index], (*place, index))
    return found


def of_json(text: bytes, draw: random.Random) -> bytes:
    """Replace, remove, move, rename or multiply a few values anywhere."""
    value = json.loads(text)
    try:
        for _ in range(draw.choice([1, 1, 2, 4])):
            _damage(value, draw)
        return json.dumps(value).encode()
    except (RecursionError, ValueError):  # what was nested was nested again
        return b"[" * 100_000


def _damage(value: Any, draw: random.Random) -> None:
    places = _places(value)
    if not places:
        return
    *path, last = draw.choice(places)
    holder = value
    for step in path:
        holder = holder[step]
    kind = draw.randrange(7)
    if kind <= 2:
        holder[last] = copy.deepcopy(draw.choice(NASTY))
    elif kind == 3:
        del holder[last]
    elif kind == 4 and isinstance(holder, dict):
        holder[draw.choice(["", "x", str(last) + "x", str(last).upper(), "a" * 3000])] = holder.pop(last)
    elif kind == 5:
        other: Any = value
        for step in draw.choice(places):
            other = other[step] if isinstance(other, dict | list) and _has(other, step) else other
        holder[last] = copy.deepcopy(other)
    else:
        nested: Any = holder[last]
        for _ in range(draw.choice([3, 60, 70, 2000])):
            nested = [nested] if draw.random() < 0.5 else {"a": nested}
        holder[last] = nested


def _has(value: Any, step: Any) -> bool:
    return step in value if isinstance(value, dict) else isinstance(step, int) and step < len(value)


def of_template(text: bytes, draw: random.Random) -> bytes:
    """Put pieces of Jinja into a template, take lines out, repeat parts."""
    lines = text.decode().splitlines(keepends=True) or [""]
    for _ in range(draw.choice([1, 2, 3])):
        place = draw.randrange(len(lines)) if lines else 0
        kind = draw.randrange(4)
        if kind <= 1:
            lines.insert(place, draw.choice(PIECES))
        elif kind == 2 and lines:
            del lines[place]
        else:
            lines[place:place] = lines[:place] * draw.choice([1, 20])
    return "".join(lines)[: 1 << 20].encode()
