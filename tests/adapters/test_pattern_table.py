"""Tables of name patterns against PEFT's rule, and the time that many patterns take on many modules."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runner.adapters.config import AdapterConfig
from runner.adapters.pattern import MAX_STEPS, Effort, NamePattern
from runner.adapters.pattern_table import PatternTable
from runner.errors import ConfigError

WORDS = ["self_attn", "mlp", "experts", "shared_expert"]
LARGE = [
    f"model.layers.{layer}.{word}.{part}_proj"
    for layer in range(100)
    for word in WORDS
    for part in ("q", "k", "v", "o", "gate", "up", "down")
]
"""2,800 modules, as many as the largest dense models have and more."""

MAX_SECONDS = 20
"""Allowed for what is refused after all its steps; one to four on a free core. Before, up to hours."""


def chosen(entries: dict[str, int], names: list[str]) -> int | None:
    """PEFT's rule (`get_pattern_key`), with the first pattern that fits any of the names."""
    for pattern, value in entries.items():
        if any(re.match(rf"(.*\.)?({pattern})$", name) for name in names):
            return value
    return None


texts = st.lists(
    st.sampled_from(["a", "b", "q_", ".", r"\.", "1", ".*", "(a|b)", "[ab]", "-"]), min_size=1, max_size=5
).map("".join)
names = st.lists(st.text("abq_1.-", max_size=8), min_size=1, max_size=3)


@settings(max_examples=1000, deadline=None)
@given(st.dictionaries(st.tuples(st.sampled_from(["", "^"]), texts).map("".join), st.integers(0, 9), max_size=6), names)
def test_the_first_pattern_that_matches_counts(entries: dict[str, int], asked: list[str]) -> None:
    try:
        wanted = chosen(entries, asked)
    except re.error:
        return
    table = PatternTable.compile("rank_pattern", {pattern: value for pattern, value in entries.items()})
    assert table.find(asked, -1) == (-1 if wanted is None else wanted)
    assert table.find(asked, -1) == (-1 if wanted is None else wanted)  # and again, from memory


def test_a_rank_for_every_module_takes_no_time() -> None:
    """What EVA and AdaLoRA write: one plain name for each module."""
    table = PatternTable.compile("rank_pattern", {name: index for index, name in enumerate(LARGE)})
    started = time.perf_counter()
    for index, name in enumerate(LARGE):
        assert table.find([name, f"transformer.{name}"], -1) == index
    assert time.perf_counter() - started < 2


def hostile(part: str) -> list[str]:
    """Nine different patterns of 4,000 characters: 36 kB."""
    return [part * ((3990 - len(str(index))) // len(part)) + str(index) for index in range(9)]


@pytest.mark.parametrize("part", [".*", "(.*.*)*", "(?=.*(?=.*b))", "(a|.)*", "((a?)*(.?)*)*", "[^x]+", ".{0,64}"])
def test_steps_are_counted_wherever_a_pattern_loops(part: str) -> None:
    """A tenth of the steps take a tenth of the time: no kind of loop escapes the count."""
    effort = Effort("rank_pattern", MAX_STEPS // 10)
    patterns = [NamePattern.compile(text, effort) for text in hostile(part)]
    started = time.perf_counter()
    with pytest.raises(ConfigError, match="rank_pattern takes more than 4000000 steps to match"):
        while True:
            assert not any(pattern.ends(name) for name in LARGE for pattern in patterns)
    assert time.perf_counter() - started < MAX_SECONDS / 10


@pytest.mark.parametrize("key", ["rank_pattern", "exclude_modules"])
def test_hostile_keys_end_and_are_named(key: str) -> None:
    patterns = hostile("(.*.*)*")
    started = time.perf_counter()
    value = dict.fromkeys(patterns, 2) if key == "rank_pattern" else patterns[0]
    config = AdapterConfig.from_dict({"peft_type": "LORA", key: value})
    with pytest.raises(ConfigError, match=f"{key} takes more than 4000000 steps to match with the names of this model"):
        for name in LARGE:
            config.scale([name]), config.targets([name], linear=True)
    assert time.perf_counter() - started < MAX_SECONDS


def test_published_patterns_stay_far_below_the_limit() -> None:
    """The longest pattern that unsloth writes, on the 18,000 matrices of Qwen3-30B-A3B's experts."""
    attention = "(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)"
    matrices = "(?:k_proj|v_proj|q_proj|out_proj|fc1|fc2|o_proj|gate_proj|up_proj|down_proj)"
    first = f"(?:.*?(?:language|text).*?{attention}.*?{matrices}.*?)"
    text = rf"{first}|(?:\bmodel\.layers\.[\d]{{1,}}\.{attention}\.(?:{matrices}))"
    effort = Effort("target_modules")
    assert NamePattern.compile(text, effort).matches("model.layers.3.mlp.experts.7.up_proj") is False
    assert NamePattern.compile(text, effort).matches("model.layers.3.mlp.up_proj")
    assert (MAX_STEPS - effort.steps) / 2 * 18_000 < MAX_STEPS


def test_too_many_patterns_are_refused_before_they_are_compiled() -> None:
    started = time.perf_counter()
    patterns = {f"(q|k)_proj{index}": 2 for index in range(100_000)}
    with pytest.raises(ConfigError, match="rank_pattern must have at most 65536 characters in all its patterns"):
        AdapterConfig.from_dict({"peft_type": "LORA", "rank_pattern": patterns})
    assert time.perf_counter() - started < 5


def test_lists_of_names_by_the_hundred_thousand() -> None:
    """Targets are looked up, not searched; lists that have to be searched are bounded."""
    many = [f"other.{index}.q_proj" for index in range(200_000)]
    config = AdapterConfig.from_dict({"peft_type": "LORA", "target_modules": many, "exclude_modules": many})
    started = time.perf_counter()
    assert not any(config.targets([name], linear=True) for name in LARGE)
    assert time.perf_counter() - started < 2
    for key in ("modules_to_save", "layers_pattern"):
        with pytest.raises(ConfigError, match=f"{key} must have at most 1024 names"):
            AdapterConfig.from_dict({"peft_type": "LORA", key: many})


@pytest.mark.parametrize(
    ("layers_pattern", "name", "found"),
    [
        (None, "model.layers.3.self_attn.q_proj", True),
        (None, "model.layers.4.self_attn.q_proj", False),
        (None, "h.3.attn.q_proj", False),
        (["layers"], "layers.3.q_proj", True),
        (["h", "layers"], "model.layers.3.mlp.experts.4.q_proj", True),
        (["experts"], "model.layers.4.mlp.experts.3.q_proj", True),
        (["model.layers"], "base.model.layers.3.q_proj", True),
        (["ayers"], "model.layers.3.q_proj", False),
        (["layers"], "model.layers.3", False),
    ],
)
def test_layers_by_the_number_after_their_word(layers_pattern: list[str] | None, name: str, found: bool) -> None:
    config = AdapterConfig.from_dict(
        {
            "peft_type": "LORA",
            "target_modules": ["q_proj"],
            "layers_to_transform": [3],
            "layers_pattern": layers_pattern,
        }
    )
    assert config.targets([name], linear=True) == found
