"""Answers under a constraint: what they are, where they end, and what is refused."""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
from places import TESTS

import runner
from runner import Choice, JsonObject, JsonSchema, Lark, Regex, UsageError
from runner.guidance import Grammars, Guide
from runner.language_model import LanguageModel
from runner.text.blocks import BlockSeparator
from runner.text.harmony import HarmonySeparator
from runner.text.lead import HarmonyLead, Lead
from runner.text.reasoning import BlockFormat, Marks
from runner.text.separator import PlainText

pytest.importorskip("llguidance")
jsonschema = pytest.importorskip("jsonschema")

LLAMA = TESTS / "fixtures" / "llama"
SCHEMAS: list[dict[str, Any]] = [
    {"type": "integer", "minimum": 3, "maximum": 4000},
    {"type": "string", "maxLength": 8},
    {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
    {"enum": ["red", 7, None, {"a": [1.5]}]},
    {"anyOf": [{"const": "a"}, {"type": "array", "items": {"type": "null"}, "maxItems": 2}]},
    {"type": "string", "pattern": "^[a-c]{2,5}-\\d$"},
    {"type": "string", "format": "date"},
    {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 6}, "age": {"type": "integer", "maximum": 120}},
        "required": ["name", "age"],
        "additionalProperties": False,
    },
    {
        "$defs": {
            "node": {
                "type": "object",
                "properties": {
                    "v": {"type": "integer", "minimum": 0, "maximum": 9},
                    "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
                },
                "required": ["v", "next"],
                "additionalProperties": False,
            }
        },
        "$ref": "#/$defs/node",
    },
    {
        "type": "object",
        "properties": {
            "kind": {"enum": ["circle", "square"]},
            "size": {"type": "number", "exclusiveMinimum": 0, "maximum": 10},
            "tags": {"type": "array", "items": {"type": "string", "maxLength": 4}, "maxItems": 2},
        },
        "required": ["kind", "size", "tags"],
        "additionalProperties": False,
    },
]


@pytest.fixture(scope="module")
def lm() -> Iterator[LanguageModel]:
    with warnings.catch_warnings(action="ignore"):  # the context is longer than the model was made for
        found = runner.load(LLAMA / "llama-gqa", dtype="float32", context_length=4000)
    yield found


def check(schema: dict[str, Any], answer: runner.Generation) -> str:
    """The reason for the answer's end; where it is no limit, the text is JSON of the schema."""
    if answer.finish_reason == "stop":
        jsonschema.validate(json.loads(answer.text), schema)
    return answer.finish_reason


@pytest.mark.parametrize("number", range(len(SCHEMAS)))
def test_json_fits_its_schema_or_its_budget_has_ended(lm: LanguageModel, number: int) -> None:
    """A model of random weights tries everything that is allowed."""
    schema = SCHEMAS[number]
    reasons = [
        check(schema, lm.generate([5, 6], constraint=JsonSchema(schema), max_tokens=60, temperature=1.5, seed=seed))
        for seed in range(6)
    ]
    assert set(reasons) <= {"stop", "length"} and "stop" in reasons


@pytest.mark.parametrize(
    ("constraint", "pattern"),
    [
        (Regex(r"[ab]{2,6}\d?"), r"[ab]{2,6}\d?"),
        (Choice(["yes", "no", 'a "quoted"\n\té']), 'yes|no|a "quoted"\n\té'),
        (Lark('start: "x" (word "-")* "!"\nword: /[a-z]{1,2}/'), r"x([a-z]{1,2}-)*!"),
        (JsonObject(), r"(?s)\{.*\}"),
    ],
)
def test_an_answer_ends_where_it_is_complete(lm: LanguageModel, constraint: Any, pattern: str) -> None:
    """Whatever the options: the end is neither picked before nor passed by."""
    for options in (
        {"temperature": 2.0, "seed": 1, "logprobs": 3},
        {"temperature": 0, "frequency_penalty": 1.5},
        {"seed": 2, "top_k": 3, "logit_bias": dict.fromkeys(lm.eos_token_ids, 1000.0)},  # as early as it can
        {"seed": 3, "lookup": True},
    ):
        answer = lm.generate([5, 6], constraint=constraint, max_tokens=80, **options)
        if answer.finish_reason == "stop":
            assert re.fullmatch(pattern, answer.text) and answer.tokens[-1] in lm.eos_token_ids
        else:
            assert answer.finish_reason == "length" and len(answer.tokens) == 80
        assert not lm.eos_token_ids & set(answer.tokens[:-1])
    eager = lm.generate(
        [5], constraint=Regex("[ab]{2,6}"), temperature=0, logit_bias=dict.fromkeys(lm.eos_token_ids, 1e4)
    )
    assert len(eager.text) == 2


ODD = ['a "quoted"\n\x01é', "/slash/", "a.b*c+?(x)[y]{2}^$|#&-~\\", "<tag>", "日本", " lead", "\r\n", "x@y.z!;:'`=%,"]


def test_a_choice_is_taken_letter_by_letter(lm: LanguageModel) -> None:
    """Nothing in a text is an expression's, or a grammar's; thousands of texts are one choice as well."""
    for text in ODD:
        answer = lm.generate([5, 6], constraint=Choice([text]), seed=1, max_tokens=80)
        assert answer.text == text and answer.finish_reason == "stop"
    many = [f"{text} {number}" for text in ODD for number in range(500)]
    assert lm.generate([5, 6], constraint=Choice(many), seed=1, max_tokens=80).text in many


def test_a_budget_that_ends_inside_says_so(lm: LanguageModel) -> None:
    answer = lm.generate([5, 6], constraint=JsonSchema(SCHEMAS[9]), max_tokens=3, seed=1)
    assert answer.finish_reason == "length" and len(answer.tokens) == 3


def test_forced_tokens_are_read_in_one_pass(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[int] = []
    whole = type(lm.model).__call__

    def counted(self: Any, batch: Any, caches: Any) -> Any:
        passes.append(batch.ids.shape[1])
        return whole(self, batch, caches)

    monkeypatch.setattr(type(lm.model), "__call__", counted)
    text = '{"a long name of a key":["always the same",1,2,3]}'
    answer = lm.generate([5, 6], constraint=JsonSchema({"const": json.loads(text)}), max_tokens=200, logprobs=0)
    assert answer.text == text and answer.finish_reason == "stop"
    assert len(passes) < 8 < 30 < len(answer.tokens) == len(answer.logprobs or ())


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: JsonSchema({"type": "array", "uniqueItems": True}), "uniqueItems"),
        (lambda: JsonSchema({"not": {"type": "string"}}), "not"),
        (lambda: JsonSchema({"oneOf": [{"type": "string"}, {"maxLength": 3}]}), "oneOf"),
        (lambda: JsonSchema({"type": "object", "not": {}, "x-guidance": {"lenient": True}}), "not"),
        (lambda: JsonSchema({"type": "string", "format": "blorb"}), "blorb"),
        (lambda: JsonSchema({"$ref": "https://example.org/schema"}), "example.org"),
        (lambda: JsonSchema({"$ref": "#/$defs/none"}), r"\$defs/none"),
        (lambda: JsonSchema("{"), "not JSON"),
        (lambda: JsonSchema("[]"), "an object"),
        (lambda: JsonSchema({"const": {1, 2}}), "JSON has not"),
        (lambda: JsonSchema({"enum": ["x" * 300_000]}), r"^the JSON schema has \d+ characters"),
        (lambda: Regex("a(?=b)"), "look-ahead"),
        (lambda: Regex("("), "unclosed"),
        (lambda: Regex(""), "empty"),
        (lambda: Lark("start: nothing"), "nothing"),
        (lambda: Lark('start[temperature=0.5]: "a"'), "temperature"),
        (lambda: Lark("[" * 200_000 + "temperature ="), "temperature"),
        (lambda: Choice([]), "list of texts"),
        (lambda: Choice("yes"), "list of texts"),
        (lambda: {"type": "object"}, "JsonSchema"),
    ],
)
def test_what_cannot_be_enforced_is_refused_before_anything_runs(lm: LanguageModel, make: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        lm.stream([5, 6], constraint=make())


@pytest.mark.parametrize("pattern", ["(a{1,1000}){1,1000}b", "((a|b){0,900}c){0,900}d", "(.*a.{30}){9}", "(x+x+)+y"])
def test_a_hostile_expression_costs_little(lm: LanguageModel, pattern: str) -> None:
    """It is refused, or followed: within seconds either way, and nothing else is held up for long."""
    try:
        answer = lm.generate([5, 6], constraint=Regex(pattern), max_tokens=20, seed=1)
    except UsageError as error:
        assert "constraint" in str(error)
    else:
        assert len(answer.tokens) <= 20


class TooMuch:
    """A matcher that gives up behind some tokens."""

    def __init__(self, inner: Any, left: int) -> None:
        self.inner, self.left = inner, left

    def deep_copy(self) -> TooMuch:
        return TooMuch(self.inner.deep_copy(), self.left)

    def compute_bitmask(self) -> bytes:
        found: bytes = self.inner.compute_bitmask()
        return found

    def consume_token(self, token: int) -> None:
        self.left -= 1
        self.inner.consume_token(token)

    def is_error(self) -> bool:
        return self.left < 0

    def get_error(self) -> str:
        return "too complex"


def test_a_grammar_that_becomes_too_much_work_ends_its_answer(lm: LanguageModel) -> None:
    """Where the token is picked, and not where it was only guessed; the next answer is as before."""
    grammars = Grammars(lm.tokenizer, lm.eos_token_ids, lm.config.vocab_size)
    (yes,) = lm.tokenizer.encode("y", add_special_tokens=False)[-1:]
    plain = grammars.guide(Regex("y{9}"), PlainText())
    guide = Guide(TooMuch(plain._matcher, 3), plain._words, plain._ends, Lead())  # type: ignore[arg-type]
    assert guide.forced(9) == [yes] * 4 and len(guide.allowed_after([yes] * 6)) == 4
    for _ in range(3):
        guide.add(yes)
    with pytest.raises(UsageError, match="any further: too complex"):
        guide.add(yes)


def test_seeds_and_guesses(lm: LanguageModel) -> None:
    constraint = JsonSchema(SCHEMAS[7])
    for seed in range(4):
        found = [
            lm.generate(
                [5, 6], constraint=constraint, max_tokens=60, seed=seed, lookup=lookup, logprobs=logprobs
            ).tokens
            for lookup, logprobs in ((None, None), (True, None), (None, 2))
        ]
        assert found[0] == found[1] == found[2]


def allowed(guide: Any) -> set[int]:
    bits = guide.allowed()
    return {token for token in range(32 * len(bits)) if bits[token // 32] >> token % 32 & 1}


def test_reasoning_before_the_answer_is_free(lm: LanguageModel) -> None:
    """Opened by the prompt, or by the model instead of an answer; no end within it, and the constraint after it."""
    opening, closing, yes = (lm.tokenizer.encode(text, add_special_tokens=False)[-1] for text in "<>y")
    known = BlockFormat([Marks("<", ">")])
    grammars, every = Grammars(lm.tokenizer, lm.eos_token_ids, lm.config.vocab_size), range(lm.config.vocab_size)
    ends = set(lm.eos_token_ids)
    started = grammars.guide(Regex("y+"), BlockSeparator(known, opened=Marks("<", ">")))
    free = grammars.guide(Regex("y+"), BlockSeparator(known))
    plain = grammars.guide(Regex("y+"), PlainText())
    assert allowed(plain) == {yes} and allowed(free) == {yes, opening}
    assert free.forced(5) == [] and plain.forced(5) == [yes]
    free.add(opening)
    for guide in (started, free):
        assert allowed(guide) >= set(every) - ends and not allowed(guide) & ends
        # Guesses go over the border, and back.
        masks = guide.allowed_after([opening, closing, yes, *sorted(ends)])
        assert len(masks) == 5 and masks[-1] is None
        guide.add(opening)
        guide.add(closing)
        assert allowed(guide) == {yes}
        guide.add(yes)
        assert allowed(guide) == {yes, *ends}
        assert len(guide.allowed_after([yes, yes, opening, yes])) == 3 and allowed(guide) == {yes, *ends}
        guide.add(min(ends))
        assert guide.allowed() is None
    with pytest.raises(UsageError, match="is no token"):
        grammars.guide(Regex("y"), BlockSeparator(known, opened=Marks("<", "</not a token>")))
    with pytest.raises(UsageError, match="is no token of this model"):
        grammars.guide(Regex("y"), HarmonySeparator([]))
    with pytest.raises(UsageError, match="no token that ends"):
        Grammars(lm.tokenizer, [], lm.config.vocab_size).guide(Regex("y"), PlainText())


def test_harmonys_messages_before_the_answer(lm: LanguageModel) -> None:
    """Behind the author's name a channel, in a header and in the analysis anything, then the grammar, then an end."""
    marks = dict(enumerate(["<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>"], 40))
    start, channel, message, end, _ = marks
    texts = {50: "assistant", 51: "analysis", 52: "final", 53: "Hm"}

    def piece(token: int) -> tuple[str, bool]:
        return (marks[token], True) if token in marks else (texts[token], False)

    yes = lm.tokenizer.encode("y", add_special_tokens=False)[-1]
    separator = HarmonySeparator(list(marks.values()), [("<|start|>", True), ("assistant", False)])
    ends = set(lm.eos_token_ids)
    plain = Grammars(lm.tokenizer, ends, lm.config.vocab_size).guide(Regex("y+"), PlainText())
    guide = Guide(plain._matcher, plain._words, sorted(ends), HarmonyLead(separator, piece, channel, start))
    assert guide.forced(5) == [channel]  # and then anything
    assert len(guide.allowed_after([channel, 51, message, 53, end, start, 50, channel, 52, message, yes, yes])) == 13
    for token in (channel, 51, message, 53):
        guide.add(token)
        assert allowed(guide) >= set(range(lm.config.vocab_size)) - ends and not allowed(guide) & ends
    guide.add(end)
    assert allowed(guide) == {start} and guide.forced(3) == [start]
    for token in (start, 50):
        guide.add(token)
    assert allowed(guide) == {channel}
    for token in (channel, 52, message):
        guide.add(token)
    assert allowed(guide) == {yes}
    guide.add(yes)
    assert allowed(guide) == {yes, *ends}
    assert separator.place == "author"  # the answer's own has not moved


@pytest.mark.long
@pytest.mark.real
@pytest.mark.parametrize("number", range(len(SCHEMAS)))
def test_the_demo_model_fits_every_schema(number: int) -> None:
    schema = SCHEMAS[number]
    question = [{"role": "user", "content": f"Answer with JSON that fits this schema: {json.dumps(schema)}"}]
    with runner.load(os.environ["RUNNER_DEMO_MODEL"]) as real:
        for seed in range(20):
            answer = real.chat(question, constraint=JsonSchema(schema), max_tokens=200, temperature=1.0, seed=seed)
            assert check(schema, answer) in ("stop", "length")


def test_a_strangers_grammar_is_looked_through_once() -> None:
    """Were all beginnings tried to the end, this would take minutes."""
    for text in ("[" * 250_000, "[temperature" * 20_000, "[" + " " * 250_000, "[temperature" + " " * 250_000):
        assert Lark(text).grammar == text
