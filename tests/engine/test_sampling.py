"""The sampler against a NumPy twin that does the documented steps one by one."""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runner.engine.sampling import Sampler, SamplingParams
from runner.errors import UsageError
from runner.ops import cpu as kernels

V = 12


def twin(logits: np.ndarray, params: SamplingParams, seen: list[int]) -> np.ndarray:
    """Probabilities of the next token."""
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
    tokens = [Sampler(params.replace(seed=i), V, prompt)(array).token for i in range(200)]
    counts = np.bincount(np.array(mx.stack(tokens)), minlength=V)
    assert counts[wanted == 0].sum() == 0
    likely = wanted > 0
    chi = float((((counts - 200 * wanted) ** 2)[likely] / (200 * wanted[likely])).sum())
    assert chi < 60  # 11 degrees of freedom: a fair sampler exceeds this once in 10^8


@pytest.mark.parametrize("window", [0, 1, 3, 50])
@pytest.mark.parametrize("prompt", [[], [1, 2, 2, 7, 1]])
def test_penalties_see_prompt_and_answer_through_one_window(window: int, prompt: list[int]) -> None:
    params = SamplingParams(temperature=0, frequency_penalty=1.0, presence_penalty=0.5, penalty_window=window)
    logits = np.linspace(0, 2, V)
    sampler, seen = Sampler(params, V, prompt), list(prompt)
    for _ in range(8):
        wanted = int(np.argmax(twin(logits, params.replace(temperature=1), seen)))
        assert int(sampler(mx.array(logits.astype(np.float32))).token) == wanted
        seen.append(wanted)


def test_greedy_logprobs_and_seeds() -> None:
    logits = mx.array([0.0, 3.0, 3.0, 1.0])
    picked = Sampler(SamplingParams(temperature=0, logprobs=2), 4, [])(logits)
    assert int(picked.token) == 1 and picked.logprob is not None and picked.top_ids is not None
    wanted = 3 - math.log(1 + 2 * math.exp(3) + math.exp(1))
    assert abs(float(picked.logprob) - wanted) < 1e-5 and sorted(np.array(picked.top_ids).tolist()) == [1, 2]
    before = [np.array(key).tolist() for key in mx.random.state]

    def draw(seed: int) -> list[int]:
        sampler = Sampler(SamplingParams(seed=seed), 4, [])
        return [int(sampler(logits).token) for _ in range(30)]

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
    assert {int(Sampler(params.replace(seed=i), size, [])(logits).token) for i in range(60)} == {0, 1, 2}


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
    plain = Sampler(SamplingParams(seed=3).replace(**options), 3000, [])(logits).read()
    for name in ("sort", "argsort", "partition", "argpartition", "topk"):
        monkeypatch.setattr(mx, name, refused)
    fast = Sampler(SamplingParams(seed=3).replace(**options), 3000, [], KERNELS)(logits).read()
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
