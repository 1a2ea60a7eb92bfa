"""Name patterns against Python's own matcher, and the time that hostile patterns take."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runner.adapters.pattern import NamePattern
from runner.errors import ConfigError

NAMES = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.11.mlp.down_proj",
    "transformer.h.3.attn.c_attn",
    "model.embed_tokens",
    "lm_head",
    "",
]
PUBLISHED = [
    r".*q_proj$",
    r".*\.[0-4]\.attn\..*",
    r"^(?!.*lm_head).*(proj|head)$",
    r"model\.layers\.(0|11)\..*",
    r"(?:.*?(?:language|layers).*?(?:self_attn|mlp|ffn).*?(?:k_proj|v_proj|q_proj|down_proj).*?)"
    r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj|down_proj)))",
    r"(h|H)\.\d+\.(?=attn).*",
    r"[^.]+",
    r".{7}|.{1,9}x{,2}",
]
ATOMS = ["a", "b", "_", ".", r"\.", "[ab]", "[^a]", "(a|b)", "(?:ab|a)", "(?=a)", "(?!b)", "^", "$", r"\b", r"\w"]
LOOPS = ["", "", "*", "+", "?", "{1,2}", "{2}", "{,1}", "*?", "+?"]


@pytest.mark.parametrize("text", PUBLISHED)
@pytest.mark.parametrize("name", NAMES)
def test_published_patterns_as_re_has_them(text: str, name: str) -> None:
    pattern = NamePattern.compile(text)
    assert pattern.matches(name) == (re.fullmatch(text, name) is not None)
    assert pattern.ends(name) == (re.match(rf"(.*\.)?(?:{text})$", name) is not None)


pieces = st.lists(st.tuples(st.sampled_from(ATOMS), st.sampled_from(LOOPS)).map("".join), max_size=5).map("".join)


@settings(max_examples=1500, deadline=None)
@given(pieces, pieces, st.sampled_from(LOOPS), st.text("ab._", max_size=8))
def test_any_pattern_is_as_re_has_it(first: str, second: str, loop: str, name: str) -> None:
    text = f"({first}){loop}|{second}"
    try:
        wanted = re.fullmatch(text, name) is not None
    except re.error:
        with pytest.raises(ConfigError):
            NamePattern.compile(text)
        return
    assert NamePattern.compile(text).matches(name) == wanted


@pytest.mark.parametrize(
    "text", ["(a|a)" * 60 + "x", "((.*)*)*x", "(a?){30}a{30}x", "(.*.*.*.*.*.*)*x", "(?=.*.*)" * 9]
)
def test_hostile_patterns_take_no_time(text: str) -> None:
    started = time.perf_counter()
    assert not NamePattern.compile(text).matches("a" * 100)
    assert time.perf_counter() - started < 2


@pytest.mark.parametrize(
    "text",
    ["(", "(?P<x>a)", r"(a)\1", "(?<=a)b", "(?i)a", "(?#a)", "(((a*)*)*)*", "a{65}", "a{3,65}", "a" * 4001,
     "(" * 40 + "a" + ")" * 40, "(" * 2000 + ")" * 2000, r"\x61", r"\N{DIGIT ONE}"],
)  # fmt: skip
def test_what_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="must"):
        NamePattern.compile(text)
