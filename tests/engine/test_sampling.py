"""The sampler against a NumPy twin that does the documented steps one by one."""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runner.engine.sampler import Sampled, Sampler, SamplingState, Token
from runner.engine.sampling import SamplingParams
from runner.errors import NumericsError, UsageError
from runner.ops import cpu as kernels
from runner.ops.table import PORTABLE, Ops

V = 12


class Alone:
    """One sequence and a sampler of its own."""

    def __init__(self, params: SamplingParams, vocab_size: int, ids: list[int], ops: Ops = PORTABLE) -> None:
        self.state = SamplingState(params, vocab_size, ids)
        self.sampler = Sampler(ops)

    def __call__(self, logits: mx.array) -> Sampled:
        return self.sampler(logits[None], [self.state])

    def read(self, logits: mx.array) -> Token:
        (token,) = self(logits).read([self.state])
        assert isinstance(token, Token)
        return token


def twin(logits: np.ndarray, params: SamplingParams, seen: list[int]) -> np.ndarray:
    """Probabilities of the next token, by the documented steps one after another."""
    x = logits.astype(np.float64)
    for token, bias in params.logit_bias.items():
        x[token] += bias
    window = seen[-params.penalty_window :] if params.penalty_window else seen
    for token in set(window):
        x[token] = x[token] / params.repetition_penalty if x[token] > 0 else x[token] * params.repetition_penalty
        x[token] -= params.presence_penalty + params.frequency_penalty * window.count(token)
    x /= params.temperature
    order = np.argsort(-x, kind="stable")
    keep = np.ones(V, bool)
    if params.top_k:
        keep[order[params.top_k :]] = False
    p = np.where(keep, np.exp(x - x.max()), 0)
    p /= p.sum()
    total = 0.0
    for rank, token in enumerate(order):
        if total >= params.top_p and rank:
            keep[token] = False
        total += p[token]
    p = np.where(keep, p, 0)
    p = np.where(p >= params.min_p * p.max(), p, 0)
    return p / p.sum()


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 1000),
    st.builds(
        SamplingParams,
        temperature=st.sampled_from([0.5, 1.0, 2.0]),
        top_k=st.sampled_from([0, 1, 4, 50]),
        top_p=st.sampled_from([1.0, 0.8, 0.3]),
        min_p=st.sampled_from([0.0, 0.2]),
        repetition_penalty=st.sampled_from([1.0, 1.7]),
        presence_penalty=st.sampled_from([0.0, 0.7]),
        frequency_penalty=st.sampled_from([0.0, 0.4]),
        penalty_window=st.sampled_from([0, 2]),
        logit_bias=st.sampled_from([{}, {3: 2.0, 5: -4.0}]),
    ),
)
def test_draws_follow_the_twin(seed: int, params: SamplingParams) -> None:
    logits = np.random.default_rng(seed).normal(size=V) * 2
    prompt = [1, 2, 2, 7]
    wanted = twin(logits, params, prompt)
    array = mx.array(logits.astype(np.float32))
    states = [SamplingState(params.replace(seed=i), V, prompt) for i in range(200)]
    tokens = Sampler()(mx.broadcast_to(array, (200, V)), states).tokens
    counts = np.bincount(np.array(tokens), minlength=V)
    assert counts[wanted == 0].sum() == 0
    # Tokens that are expected less than four times are one cell: alone, a single draw of one would look unfair.
    often = 200 * wanted >= 4
    cells = [*zip(counts[often], 200 * wanted[often], strict=True), (counts[~often].sum(), 200 * wanted[~often].sum())]
    chi = sum((count - mean) ** 2 / max(mean, 4) for count, mean in cells)
    assert chi < 60  # at most 11 degrees of freedom: a fair sampler exceeds this about once in 10^8


@pytest.mark.parametrize("window", [0, 1, 3, 50])
@pytest.mark.parametrize("prompt", [[], [1, 2, 2, 7, 1]])
def test_penalties_see_prompt_and_answer_through_one_window(window: int, prompt: list[int]) -> None:
    params = SamplingParams(temperature=0, frequency_penalty=1.0, presence_penalty=0.5, penalty_window=window)
    logits = np.linspace(0, 2, V)
    sampler, seen = Alone(params, V, prompt), list(prompt)
    for _ in range(8):
        wanted = int(np.argmax(twin(logits, params.replace(temperature=1), seen)))
        assert sampler.read(mx.array(logits.astype(np.float32))).id == wanted
        seen.append(wanted)


def test_greedy_logprobs_and_seeds() -> None:
    logits = mx.array([0.0, 3.0, 3.0, 1.0])
    picked = Alone(SamplingParams(temperature=0, logprobs=2), 4, []).read(logits)
    assert picked.id == 1 and picked.logprob is not None and picked.top_logprobs is not None
    wanted = 3 - math.log(1 + 2 * math.exp(3) + math.exp(1))
    assert abs(picked.logprob - wanted) < 1e-5 and [token for token, _ in picked.top_logprobs] == [1, 2]
    before = [np.array(key).tolist() for key in mx.random.state]

    def draw(seed: int) -> list[int]:
        sampler = Alone(SamplingParams(seed=seed), 4, [])
        return [sampler.read(logits).id for _ in range(30)]

    assert draw(5) == draw(5) != draw(6)
    assert len(set(draw(5))) > 1
    assert [np.array(key).tolist() for key in mx.random.state] == before


@pytest.mark.parametrize(
    "name, value", [("temperature", -1), ("top_p", 1.5), ("top_k", 1.5), ("seed", -1), ("min_p", math.nan)]
)
def test_values_out_of_range_are_named(name: str, value: float) -> None:
    with pytest.raises(UsageError, match=name):
        SamplingParams(**{name: value})
    with pytest.raises(UsageError, match="temperature"):
        SamplingParams().replace(temprature=1)


def test_generation_defaults() -> None:
    params, ignored = SamplingParams.from_generation_config({"temperature": 0.6, "top_p": 0.9, "do_sample": True})
    assert (params.temperature, params.top_p, params.top_k, ignored) == (0.6, 0.9, 50, ())  # transformers' own top_k
    for top_k in (0, 20):
        assert SamplingParams.from_generation_config({"do_sample": True, "top_k": top_k})[0].top_k == top_k
    params, ignored = SamplingParams.from_generation_config({"temperature": 0.6, "no_repeat_ngram_size": 3})
    assert params.temperature == 0 and ignored == ("no_repeat_ngram_size = 3",)


@pytest.mark.parametrize("size", [40, 5000])
def test_of_equal_tokens_top_k_keeps_the_lowest_ids(size: int) -> None:
    logits = mx.zeros((size,))
    params = SamplingParams(top_k=3)
    assert {Alone(params.replace(seed=i), size, []).read(logits).id for i in range(60)} == {0, 1, 2}


@pytest.mark.skipif(kernels.unavailable() is not None, reason="the CPU kernels are not built")
@pytest.mark.parametrize(
    "options",
    [
        {"top_p": 0.9},
        {"top_k": 50, "top_p": 0.9},
        {"min_p": 0.1},
        {"temperature": 0, "logprobs": 5},
        {"logprobs": 0, "frequency_penalty": 0.1},
    ],
)
def test_kernels_sort_no_vocabulary(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Sorting took as long as a small model's whole step."""
    from runner.ops.cpu.ops import KERNELS

    def refused(*_: object, **__: object) -> None:
        raise AssertionError("sorted")

    logits = mx.array(np.random.default_rng(0).normal(size=3000).astype(np.float32))
    plain = Alone(SamplingParams(seed=3).replace(**options), 3000, []).read(logits)
    for name in ("sort", "argsort", "partition", "argpartition", "topk"):
        monkeypatch.setattr(mx, name, refused)
    fast = Alone(SamplingParams(seed=3).replace(**options), 3000, [], KERNELS).read(logits)
    assert fast.id == plain.id and (fast.logprob is None) == (plain.logprob is None)
    assert [i for i, _ in fast.top_logprobs or []] == [i for i, _ in plain.top_logprobs or []]


def test_a_bias_is_in_the_range_of_float32() -> None:
    for value in (1e300, -3.5e38, math.inf, math.nan, 10**400, True, "1", None):
        with pytest.raises(UsageError, match=r"logit_bias .* got 3: "):
            SamplingParams(logit_bias={3: value})
    assert SamplingParams(logit_bias={3: -3.4028234e38}).logit_bias == {3: -3.4028234e38}


def test_bias_ids_may_be_texts_as_in_json() -> None:
    assert SamplingParams(logit_bias={"5": 2, 7: -1.0}).logit_bias == {5: 2.0, 7: -1.0}  # type: ignore[dict-item]
    for name in ("x", "-1", "1.0", "", "٥", "9" * 12, None, 1.0):
        with pytest.raises(UsageError, match="logit_bias maps token ids"):
            SamplingParams(logit_bias={name: 1.0})  # type: ignore[dict-item]
    with pytest.raises(UsageError, match="token 5 twice"):
        SamplingParams(logit_bias={"5": 2.0, 5: 1.0})  # type: ignore[dict-item]


OTHERS = [
    {"temperature": 0},
    {"temperature": 0.8, "top_p": 0.9, "logprobs": 2},
    {"top_k": 3, "frequency_penalty": 0.7},
    {"repetition_penalty": 1.4, "penalty_window": 3, "logprobs": 0},
    {"logit_bias": {2: 1.5}, "presence_penalty": 0.4, "penalty_window": 5},
    {"temperature": 0, "penalize_prompt": False, "frequency_penalty": 2.0, "penalty_window": 1},
    {"min_p": 0.1, "logit_bias": {4: -3.0}},
]


@pytest.mark.parametrize("order", range(3))
def test_rows_that_come_and_go_are_each_as_alone(order: int) -> None:
    """Other rows, other options, others' penalties: what a row picks is bit for bit what it picks by itself."""
    rng = np.random.default_rng(order)
    steps = 14
    logits = mx.array(rng.normal(size=(len(OTHERS), steps, V)).astype(np.float32))
    made = [SamplingParams(seed=5 + i).replace(**options) for i, options in enumerate(OTHERS)]
    starts = rng.integers(0, 5, len(OTHERS))
    prompts = [rng.integers(0, V, rng.integers(0, 7)).tolist() for _ in OTHERS]
    wanted = []
    for row, params in enumerate(made):
        alone = Alone(params, V, prompts[row])
        wanted.append([alone.read(logits[row, step]) for step in range(steps)])
    sampler = Sampler()
    states = [SamplingState(params, V, prompts[row]) for row, params in enumerate(made)]
    found: list[list[object]] = [[] for _ in OTHERS]
    for step in range(steps + 10):
        rows = [row for row in range(len(OTHERS)) if starts[row] <= step and len(found[row]) < steps]
        rng.shuffle(rows)
        if rows:
            picked = sampler(mx.stack([logits[row, len(found[row])] for row in rows]), [states[row] for row in rows])
            for row, token in zip(rows, picked.read([states[row] for row in rows]), strict=True):
                found[row].append(token)
    assert found == wanted


@pytest.mark.parametrize("options", OTHERS)
def test_a_state_after_guessed_tokens_is_that_of_having_picked_them(options: dict[str, Any]) -> None:
    logits = mx.array(np.random.default_rng(1).normal(size=(9, V)).astype(np.float32))
    alone = Alone(SamplingParams(seed=9).replace(**options), V, [3, 3, 1])
    before = alone.state.after([])
    wanted = [alone.read(row) for row in logits]
    ids = [token.id for token in wanted]
    states = [before.after(ids[:count]) for count in range(9)]
    assert Sampler()(logits, states).read(states) == wanted
    # Each state has moved on by its own pick, and goes on from there.
    assert Sampler()(logits[5][None], [states[4]]).read([states[4]]) == [wanted[5]]


def test_only_allowed_tokens_are_picked() -> None:
    logits = mx.array(np.random.default_rng(2).normal(size=(2, 40)).astype(np.float32))
    bits = np.zeros(2, np.uint32)
    bits[1] = 1 << 3 | 1 << 5
    for options in ({"temperature": 0}, {}, {"top_p": 0.01}, {"logit_bias": {0: 100}, "frequency_penalty": 1.0}):
        state, free = (SamplingState(SamplingParams(seed=1, logprobs=1).replace(**options), 40, []) for _ in range(2))
        state.allowed = bits
        masked, other = Sampler()(logits[:1][[0, 0]], [state, free]).read([state, free])
        assert isinstance(masked, Token) and isinstance(other, Token)
        assert masked.id in (35, 37) and other.id not in (35, 37)
        assert masked.top_logprobs == other.top_logprobs  # the model's own
        state.allowed = np.zeros(2, np.uint32)
        (nothing,) = Sampler()(logits[:1], [state]).read([state])
        assert isinstance(nothing, NumericsError)


def test_choices_differ_and_a_draw_goes_on_where_it_was() -> None:
    logits = mx.zeros((1, V))

    def drawn(choice: int, ids: list[int], count: int) -> list[int]:
        state, sampler = SamplingState(SamplingParams(seed=1 << 62), V, ids, choice=choice), Sampler()
        return [token.id for _ in range(count) for token in sampler(logits, [state]).read([state])]  # type: ignore[union-attr]

    whole = drawn(0, [1, 2], 40)
    assert drawn(0, [7, 7, *whole[:15]], 25) == whole[15:]  # by the position, not by what stands before it
    assert len({tuple(drawn(choice, [1, 2], 40)) for choice in range(50)}) == 50
    assert drawn(3, [1, 2], 40) != whole
