"""No template takes long or much memory: cases found by reading Jinja's filters, and templates made at random."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from typing import Any

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment
from nasty_templates import nasty_template

from runner.errors import TemplateError
from runner.text.chat_inputs import chat_inputs
from runner.text.chat_template import ChatTemplates
from runner.text.template_limits import MAX_SOURCE, MAX_TOKENS
from runner.text.template_sandbox import compile_template, render_template

USER = {"role": "user", "content": "hi"}
ALIKE = "{% set a = 'a' * 400000 %}{% set b = a[1:] ~ 'a' %}{% set l = [{'k': a}, {'k': b}] * 60000 %}"
PRIMES = "range(0, 230584300921369395100000, 2305843009213693951)"  # multiples of 2**61 - 1: all hash to 0
DEEP = "{% set ns = namespace(x=()) %}{% for i in range(20000) %}{% set ns.x = (ns.x,) %}{% endfor %}"

SLOW = {
    "sum of lists": "{{ ([[0]] * 100000) | sum(start=[]) | length }}",
    "sum of tuples": "{{ ([(0,)] * 100000) | sum(start=()) | length }}",
    "sum of attributes": "{{ ([{'k': [0]}] * 100000) | sum(attribute='k', start=[]) | length }}",
    "growing list": "{% set ns = namespace(l=[]) %}{% for i in range(60000) %}{% set ns.l = ns.l + [i] %}{% endfor %}",
    "strip": "{{ ('a' * 500000).strip('b' * 499999 ~ 'a') }}",
    "rstrip": "{{ ('a' * 500000).rstrip('b' * 499999 ~ 'a') }}",
    "trim": "{{ ('a' * 500000) | trim('b' * 499999 ~ 'a') }}",
    "sort of a generator": ALIKE + "{{ l | map(attribute='k') | sort | length }}",
    "unique of a generator": ALIKE + "{{ l | map(attribute='k') | unique | list | length }}",
    "max of a generator": ALIKE + "{{ l | map(attribute='k') | max | length }}",
    "search in a generator": ALIKE + "{{ b ~ 'b' in l | map(attribute='k') }}",
    "count": ALIKE + "{{ ([a] * 120000).count(b) }}",
    "index": ALIKE + "{{ ([a] * 120000).index(b[:-1] ~ 'b') }}",
    "path of attributes": "{{ range(99999) | map(attribute='a.' * 400000, default={'a': 1}) | list | length }}",
    "sort by a path": "{{ range(99999) | sort(attribute='real.' * 100000 ~ 'real') | length }}",
    "hashes alike": "{{ " + PRIMES + " | unique | list | length }}",
    "keys alike": "{{ dict.fromkeys(" + PRIMES + ") | length }}",
    "numbers alike": "{% set t %}{% for i in range(38000) %}{{ i * 2305843009213693951 }} {% endfor %}{% endset %}"
    "{{ t.split() | map('int') | unique | list | length }}",
    "striptags": "{{ (('<!---->' * 120000) | safe).striptags() }}",
    "deep key": DEEP + "{% set d = {ns.x: 1} %}",
    "deep view": DEEP + "{{ ({'a': ns.x}.items() - [1]) | length }}",
    "deep text": DEEP + "{{ ns.x }}",
}  # fmt: skip
LARGE = {
    "plain and markup": "{% set m = 'a' | safe %}{{ ('<' * 900000 + m) | length }}",
    "markup joins": "{{ ('<' | safe).join(['<' * 1000] * 900) | length }}",
    "markup formats": "{{ (('{0}' * 900) | safe).format('<' * 1000) | length }}",
    "markup replaces": "{{ (('a' * 1000) | safe).replace('a', '<' * 900) | length }}",
    "urlencode": "{{ ('\U0001f600' * 900000) | urlencode | length }}",
    "repr": "{{ ('%r%r' % ('\x00' * 500000, 1)) | length }}",
    "list of characters": "{{ ('a' * 900000) | list | length }}",
    "pieces": "{{ ('a ' * 500000).split() | length }}",
    "lists of a batch": "{{ ('a' * 900000) | batch(1) | list | length }}",
    "kept texts": "{% set ns = namespace(l=[]) %}{% for i in range(9000) %}"
    "{% set ns.l = [ns.l, '\U0001f600' * (900000 - i)] %}{% endfor %}",
}


def render(source: str, *messages: dict[str, Any], **options: Any) -> str:
    return ChatTemplates({}, {}).render(source, chat_inputs(messages or [USER], **options))


@pytest.mark.parametrize("name", [*SLOW, *LARGE])
def test_slow_and_large_operations_are_refused(name: str) -> None:
    before = time.thread_time()
    with pytest.raises(TemplateError, match=r"more than|too many steps|too much text|may not"):
        render({**SLOW, **LARGE}[name])
    assert time.thread_time() - before < 3


@pytest.mark.parametrize("seed", range(60))
def test_templates_made_at_random_end_in_time(seed: int) -> None:
    """Each has a fifth of a second, and one operation more: the limits are looked at between operations."""
    code = compile_template(nasty_template(seed))
    variables = {"messages": [USER]}
    before = time.thread_time()
    with contextlib.suppress(TemplateError):
        render_template(code, variables, size=0, now=chat_inputs([USER]).now, deadline=time.thread_time() + 0.2)
    assert time.thread_time() - before < 2


def test_memory_is_bounded() -> None:
    """In a process of its own, because a process's peak never falls."""
    code = (
        "import resource, sys\nfrom runner.text.chat_inputs import chat_inputs\n"
        "from runner.text.chat_template import ChatTemplates\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"  # MLX for NVIDIA GPUs holds much
        f"for source in {list(LARGE.values())!r}:\n"
        "    try: ChatTemplates({}, {}).render(source, chat_inputs([{'role': 'user', 'content': 'hi'}]))\n"
        "    except ValueError: pass\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    unit = 1 if sys.platform == "darwin" else 1024
    assert int(done.stdout) * unit < 500 << 20


LITERALS = "{{ [" + "1," * (MAX_TOKENS // 2) + "] }}"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("x" * (MAX_SOURCE + 1), f"{MAX_SOURCE + 1} characters, more than the {MAX_SOURCE}"),
        (LITERALS, f"tokens, more than the {MAX_TOKENS}"),
        ("{{a}}" * 20_000, f"60000 tokens, more than the {MAX_TOKENS}"),
    ],
    ids=["characters", "literals", "outputs"],
)
def test_large_sources_are_refused_before_they_are_compiled(source: str, message: str) -> None:
    before = time.thread_time()
    with pytest.raises(TemplateError, match=message):
        render(source)
    assert time.thread_time() - before < 1


def test_what_honest_templates_do_is_as_in_jinja() -> None:
    """The replaced and measured operations give what Jinja's own give."""
    source = (
        "{{ [[1], [2, 3]] | sum(start=[]) }}{{ [1, 2.5] | sum }}{{ [{'k': 2}, {'k': 3}] | sum(attribute='k') }}"
        "{{ range(5) | map('string') | sort(reverse=true) | join }}{{ 3 in range(9) | map('abs') }}"
        "{{ 'b' + ('<' | safe) + '<' }}{{ ['a', 'b'].index('b') }}{{ ' x '.strip() ~ 'xyx'.strip('x') }}"
        "{{ 'a b c'.split(' ', 1) }}{{ {'a': 1}.items() | list }}{{ 'abc' | list | reverse | join }}"
        "{{ range(4) | batch(3) | list }}{{ ('%r' % 'a') ~ '{!r:>5}'.format('a') }}{{ 2 ** 31 - 1 }}"
        "{% macro m(l, n) %}{{ l.index }}{{ n }}{% endmacro %}{% for x in [1, 2] %}{{ m(loop, n=x) }}{% endfor %}"
    )
    assert render(source) == ImmutableSandboxedEnvironment().from_string(source).render()


def test_time_grows_with_the_chat_and_no_faster() -> None:
    """Four times as many messages, then one of a million characters; every message passes a macro and a filter."""
    source = (
        "{% macro show(m) %}{{ '<' ~ m.role ~ '>' ~ m.content | trim }}{% endmacro %}"
        "{% for m in messages %}{% if m.role in ['user', 'assistant'] and messages | length > 0 %}{{ show(m) }}"
        "{% if loop.last and m != messages[0] %}.{% endif %}{% endif %}{% endfor %}"
    )

    def seconds(count: int, length: int) -> float:
        turns = [{"role": role, "content": "w" * length} for role in ("user", "assistant")]
        best = 9.0
        for _ in range(2):
            before = time.thread_time()
            assert render(source, *(turns * (count // 2))).count("w") == count * length
            best = min(best, time.thread_time() - before)
        return best

    assert seconds(2000, 100) < 10 * seconds(500, 100) + 0.05
    assert seconds(2, 1_000_000) < 1
