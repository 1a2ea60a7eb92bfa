"""Guesses change no token: right, wrong or cut short, greedy and drawn, for every kind of memory."""

from __future__ import annotations

import dataclasses
import random
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from places import TESTS

import runner
from runner.adapters.files import AdapterFiles
from runner.engine.draft import DraftModel
from runner.engine.engine import Engine
from runner.engine.loaded import Loaded, open_loaded
from runner.engine.lookup import PromptLookup
from runner.engine.prompt_cache import PromptCache
from runner.engine.request import Run
from runner.engine.sampler import SamplingState, Token
from runner.engine.sampling import SamplingParams
from runner.engine.speculation import PAUSE, START, Continuation, Depth, Proposer
from runner.engine.ticket import Order
from runner.errors import UsageError
from runner.nn.batch import Apart

LLAMA = TESTS / "fixtures" / "llama"
FAMILIES = TESTS / "fixtures" / "families"
MEMORIES = {
    "rows": LLAMA / "llama-gqa",
    "window": LLAMA / "mistral-window",
    "packed": LLAMA / "llama-mlx-4bit",
    "latents": FAMILIES / "deepseek_v2-lite",
    "shared keys": FAMILIES / "gemma3n_text-base",
    "chunks": FAMILIES / "llama4_text-base",
    "delta rule": FAMILIES / "qwen3_5_moe_text-base",
    "Mamba": FAMILIES / "falcon_h1-base",
    "short convolution": FAMILIES / "lfm2-base",
    "experts": FAMILIES / "qwen2_moe-base",
}
PROMPT = [1 + i * i % 40 for i in range(30)]
OPTIONS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.9, "seed": 4, "logprobs": 2},
    {"temperature": 1.2, "seed": 8, "frequency_penalty": 0.6, "penalty_window": 6, "logit_bias": {3: 1.5}},
]


class Scripted:
    """Guesses that are right but for those that chance makes wrong; watches what it is told."""

    free = False
    watches = False
    nbytes = 0

    def __init__(self, prompt: Sequence[int], answer: Sequence[int], wrong: float, seed: int = 0) -> None:
        self.text, self.start, self.wrong, self.chance = [*prompt, *answer], len(prompt), wrong, random.Random(seed)
        self.known: list[int] = []
        self.asked = 0

    def add(self, ids: Sequence[int]) -> None:
        self.known += ids
        assert self.known == self.text[: len(self.known)]

    def rest(self) -> None: ...

    def saw(self, hidden: mx.array, position: int) -> None:
        raise AssertionError("it does not watch")

    def propose(self, most: int, state: SamplingState) -> list[int]:
        assert state.position == len(self.known)
        self.asked += 1
        right = self.text[len(self.known) :][: min(most, 1 + self.chance.randrange(most))]
        return [token if self.chance.random() >= self.wrong else (token + 1) % 40 for token in right]


class Even:
    """A guide that allows even ids; after a multiple of 6, only the next even one, and the one after that."""

    def __init__(self, vocab_size: int) -> None:
        self.last, self.words = 1, -(-vocab_size // 32) - 1

    def _after(self, token: int) -> Any:
        return np.array([1 << token + 2 if token % 6 == 0 and token < 24 else 0x55555554, *[0] * self.words], np.uint32)

    def allowed(self) -> Any:
        return self._after(self.last)

    def add(self, token: int) -> None:
        self.last = token

    def allowed_after(self, drafts: Sequence[int]) -> list[Any]:
        return [self._after(token) for token in (self.last, *drafts)]

    def forced(self, most: int) -> list[int]:
        return [self.last + 2] if self.last % 6 == 0 and self.last < 24 else []


class Counted:
    """A model that counts its passes."""

    def __init__(self, model: Any) -> None:
        self.model, self.passes = model, 0

    def __call__(self, batch: Any, caches: Any) -> mx.array:
        self.passes += 1
        result: mx.array = self.model(batch, caches)
        return result

    def logits(self, hidden: mx.array) -> mx.array:
        result: mx.array = self.model.logits(hidden)
        return result


@pytest.fixture(scope="module", params=MEMORIES)
def engine(request: pytest.FixtureRequest) -> Iterator[Loaded]:
    yield open_loaded(MEMORIES[request.param], dtype="float32")


def answer(
    engine: Loaded,
    options: dict[str, Any],
    count: int,
    proposer: Proposer | None = None,
    kept: PromptCache | None = None,
    prompt: list[int] = PROMPT,
) -> list[Token]:
    make = None if proposer is None else lambda: proposer
    order = Order(ids=prompt, params=SamplingParams(**options), budget=count, proposer=make)
    run = Run(engine, PromptCache(engine, keeps=False) if kept is None else kept, order)
    return [token for token in run if token is not None]


@pytest.mark.parametrize("options", OPTIONS, ids=["greedy", "drawn", "penalised"])
def test_guesses_change_no_token(engine: Loaded, options: dict[str, Any]) -> None:
    wanted = answer(engine, options, 40)
    ids = [token.id for token in wanted]
    for wrong in (0.0, 0.3):
        proposer = Scripted(PROMPT, ids, wrong, seed=int(10 * wrong))
        found = answer(engine, options, 40, proposer)
        assert [token.id for token in found] == ids
        assert proposer.known == PROMPT + ids and 3 < proposer.asked < 39
        for one, other in zip(found, wanted, strict=True):
            assert one.logprob == pytest.approx(other.logprob, abs=1e-3)
            assert [i for i, _ in one.top_logprobs or ()] == [i for i, _ in other.top_logprobs or ()]


def test_guesses_beside_other_requests(engine: Loaded) -> None:
    """Some rows with guesses, of which few are right, some without, one held by a guide: each as alone."""
    plain = [[token.id for token in answer(engine, options, 30)] for options in OPTIONS]
    with Engine(engine, prefixes=0) as many:
        asked = [SamplingParams(**options) for options in OPTIONS]
        alone = many.submit(PROMPT, asked[1], max_tokens=30, guide=Even(engine.config.vocab_size))
        held = [token.id for token in alone]
        assert all(token % 2 == 0 for token in held)
        tickets = [
            many.submit(
                PROMPT, params, max_tokens=30, guide=Even(engine.config.vocab_size) if guided else None,
                proposer=(lambda ids=ids, wrong=wrong: Scripted(PROMPT, ids, wrong)) if wrong is not None else None,
            )
            for params, ids in zip(asked, plain, strict=True)
            for wrong, guided in ((0.0, False), (None, False), (0.4, False))
        ]  # fmt: skip
        beside = many.submit(PROMPT, asked[1], max_tokens=30, guide=Even(engine.config.vocab_size))
        found = [[token.id for token in ticket] for ticket in tickets]
        assert found == [ids for ids in plain for _ in range(3)]
        assert [token.id for token in beside] == held


class Late(Scripted):
    """Free guesses that are right in the middle of an answer only: steps are recorded before, and after."""

    free = True

    def propose(self, most: int, state: SamplingState) -> list[int]:
        made = len(self.known) - self.start
        self.asked += 1
        right = self.text[len(self.known) :][:most]
        return right if 30 < made < 60 else [(token + 1) % 40 for token in right]


def test_guesses_come_and_go_between_recorded_steps(engine: Loaded) -> None:
    for options in OPTIONS[:2]:
        ids = [token.id for token in answer(engine, options, 110)]
        proposer = Late(PROMPT, ids, 0.0)
        assert [token.id for token in answer(engine, options, 110, proposer)] == ids


def test_an_answer_with_guesses_may_be_left_at_any_token(engine: Loaded) -> None:
    """What was guessed beyond it is taken back, or what is read again."""
    ids = [token.id for token in answer(engine, OPTIONS[0], 24)]
    for left in (1, 2, 5, 9):
        kept = PromptCache(engine)
        order = Order(
            ids=PROMPT, params=SamplingParams(temperature=0), budget=24, proposer=lambda: Scripted(PROMPT, ids, 0.2)
        )
        run = iter(Run(engine, kept, order))
        said = [token.id for token in (next(run) for _ in range(left)) if token is not None]
        run.close()  # type: ignore[attr-defined]
        assert said == ids[: len(said)]
        again = answer(engine, OPTIONS[0], 24 - len(said), kept=kept, prompt=PROMPT + said)
        assert [token.id for token in again] == ids[len(said) :]


def test_right_guesses_save_passes_and_wrong_ones_end(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = open_loaded(MEMORIES["rows"], dtype="float32")
    ids = [token.id for token in answer(engine, OPTIONS[0], 120)]
    passes = {}
    for wrong in (0.0, 1.0):
        counted = Counted(engine.model)
        monkeypatch.setattr(engine, "model", counted)
        proposer = Scripted(PROMPT, ids, wrong)
        assert [token.id for token in answer(engine, OPTIONS[0], 120, proposer)] == ids
        monkeypatch.setattr(engine, "model", counted.model)
        passes[wrong] = counted.passes, proposer.asked
    assert passes[0.0][0] < 40
    assert passes[1.0][1] < 25  # given up soon, and tried again only after a pause


def test_depth_follows_what_was_right() -> None:
    depth = Depth(free=False)
    assert depth.pays and depth.now() == START
    depth.note(8, 8)
    assert depth.now() == START + 4
    depth.note(12, 2)
    assert depth.now() == 7
    for _ in range(20):
        depth.note(4, 0)
    assert not depth.pays and depth.now() == 2
    depth.wait(1)
    assert not depth.pays
    depth.wait(PAUSE)
    assert depth.pays
    free = Depth(free=True)
    assert not free.pays  # until it is seen that they are right
    free.note(8, 8)
    free.note(8, 8)
    assert free.pays
    for _ in range(80):
        free.none()
    assert not free.pays


def test_lookup_goes_on_after_the_longest_repeated_end() -> None:
    lookup = PromptLookup()
    state: Any = None
    lookup.add([1, 2, 3, 4, 5, 9, 3, 4, 6, 2, 3, 4])
    assert lookup.propose(3, state) == [5, 9, 3]  # three tokens count more than the later two
    lookup.add([6])
    assert lookup.propose(4, state) == [2, 3, 4, 6]  # a repetition goes on
    assert lookup.propose(6, state) == [2, 3, 4, 6, 2, 3]
    lookup.add([77])
    assert lookup.propose(4, state) == []
    assert PromptLookup().propose(4, state) == []


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 3), max_size=40), st.integers(1, 6))
def test_lookup_is_its_naive_twin(ids: list[int], most: int) -> None:
    lookup = PromptLookup()
    for token in ids:
        lookup.add([token])
    wanted: list[int] = []
    for length in (4, 3, 2):
        places = [end for end in range(length, len(ids)) if ids[end - length : end] == ids[-length:]]
        if places and len(ids) >= length:
            text = list(ids)
            for index in range(most):
                text.append(text[places[-1] + index])
            wanted = text[len(ids) :]
            break
    assert lookup.propose(most, None) == wanted  # type: ignore[arg-type]


@pytest.mark.parametrize("options", OPTIONS, ids=["greedy", "drawn", "penalised"])
def test_a_draft_model_draws_what_it_would_answer(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """As its own draft a model guesses every token right; another one of the same vocabulary changes nothing."""
    engine = open_loaded(MEMORIES["rows"], dtype="float32")
    other = open_loaded(LLAMA / "llama-tied", dtype="float32")
    ids = [token.id for token in answer(engine, options, 60)]
    counted = Counted(engine.model)
    monkeypatch.setattr(engine, "model", counted)
    itself = DraftModel(open_loaded(MEMORIES["rows"], dtype="float32"), engine.config.vocab_size)
    # Elsewhere sums differ by how many tokens are read at once, and a draw may lie just between two tokens.
    sure = 60 if engine.device.ops.one_form else 40
    assert [token.id for token in answer(engine, options, 60, itself)][:sure] == ids[:sure]
    assert counted.passes < 12
    draft = DraftModel(other, engine.config.vocab_size)
    assert [token.id for token in answer(engine, options, 60, draft)][:sure] == ids[:sure]


def test_a_draft_of_another_width() -> None:
    draft = open_loaded(MEMORIES["rows"], dtype="float32")
    size = draft.config.vocab_size
    for wanted in (size - 5, size, size + 5):
        proposer = DraftModel(draft, wanted)
        proposer.add(PROMPT)
        state = SamplingState(SamplingParams(temperature=0, frequency_penalty=0.1), wanted, PROMPT)
        assert all(0 <= token < min(size, wanted) for token in proposer.propose(5, state))


def test_ids_that_a_draft_has_no_row_for_are_not_looked_up() -> None:
    """A model's table may be padded further: beyond the draft's is memory of somebody else, or none."""
    draft = open_loaded(MEMORIES["rows"], dtype="float32")
    size = draft.config.vocab_size
    state = SamplingState(SamplingParams(temperature=0), size + 5, PROMPT)
    proposer = DraftModel(draft, size + 5)
    proposer.add([*PROMPT[:-1], size - 1])
    assert proposer.propose(5, state)
    proposer.add([size])
    assert proposer.propose(5, state) == []
    proposer.add([1])  # it has not been read, so what follows it is not either
    assert proposer.propose(5, state) == []


def test_a_draft_reads_a_long_text_in_pieces() -> None:
    """One for each of its answers: those who decode beside it wait for no more."""
    draft = open_loaded(MEMORIES["rows"], dtype="float32")
    text = [1 + i * i % 40 for i in range(70)]
    whole = DraftModel(draft, draft.config.vocab_size)
    whole.add(text)
    state = SamplingState(SamplingParams(temperature=0), draft.config.vocab_size, text)
    wanted = whole.propose(5, state)
    draft.device = dataclasses.replace(draft.device, chunk=16)
    pieces = DraftModel(draft, draft.config.vocab_size)
    pieces.add(text[:60])
    found = []
    for token in text[60:]:
        found.append(pieces.propose(5, state))
        pieces.add([token])
    assert found[:3] == [None] * 3 and None not in found[3:]  # 60 to 62 tokens: three pieces, and what is left
    assert pieces.propose(5, state) == wanted
    pieces.rest()
    assert [pieces.propose(5, state) for _ in range(5)] == [None] * 4 + [wanted]
    continuation = Continuation(state, text, proposer=DraftModel(draft, draft.config.vocab_size))
    assert continuation.plan(5) == [] and continuation._depth._rate == 1.0  # not as if it had nothing to say


def test_a_draft_has_the_adapters_that_it_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it has computed for others before, of several sets at once."""
    path = TESTS / "fixtures" / "adapters" / "llama-qv" / "adapter"
    files = [AdapterFiles.open(path, "adapter")]
    draft = open_loaded(MEMORIES["rows"], dtype="float32", adapters=files)
    state = SamplingState(SamplingParams(temperature=0), draft.config.vocab_size, PROMPT)

    def guesses() -> list[int] | None:
        proposer = DraftModel(draft, draft.config.vocab_size)
        proposer.add(PROMPT)
        return proposer.propose(5, state)

    wanted = guesses()
    draft.use_adapters((3, {"adapter": 1.0}), (4, {"adapter": 0.0}))
    assert guesses() == wanted

    def apart(*given: object) -> None:
        raise Apart("rows")

    monkeypatch.setattr(DraftModel, "propose", apart)
    continuation = Continuation(state, PROMPT, proposer=DraftModel(draft, draft.config.vocab_size))
    assert continuation.plan(5) == [] and continuation.proposer is None  # and no answer is read again for it


class Ending(Even):
    """A guide that follows so many tokens."""

    def __init__(self, vocab_size: int, most: int) -> None:
        super().__init__(vocab_size)
        self.most = most

    def add(self, token: int) -> None:
        if not self.most:
            raise UsageError("it cannot be followed any further")
        self.most -= 1
        super().add(token)


def test_what_a_guide_has_followed_comes_before_its_error(engine: Loaded) -> None:
    """However many tokens were guessed."""
    params, size = SamplingParams(**OPTIONS[1]), engine.config.vocab_size
    with Engine(engine, prefixes=0) as many:
        wanted = [token.id for token in many.submit(PROMPT, params, max_tokens=24, guide=Even(size))]
        for most in (1, 6, 11):
            for wrong in (None, 0.0, 0.3):
                ticket = many.submit(
                    PROMPT, params, max_tokens=24, guide=Ending(size, most),
                    proposer=None if wrong is None else lambda wrong=wrong: Scripted(PROMPT, wanted, wrong),
                )  # fmt: skip
                found = []
                with pytest.raises(UsageError, match="followed any further"):
                    for token in ticket:
                        found.append(token.id)
                assert found == wanted[:most], (most, wrong)


def test_a_draft_of_another_kind_is_refused(tmp_path: Path) -> None:
    lm, same = (runner.load(LLAMA / name) for name in ("llama-tied", "llama-mha"))
    prompt = [5, 6, 7]
    wanted = lm.generate(prompt, max_tokens=20, seed=1).tokens
    assert lm.generate(prompt, max_tokens=20, seed=1, draft=same).tokens == wanted
    with pytest.raises(UsageError, match="not by both"):
        lm.generate(prompt, draft=same, lookup=True)
    with pytest.raises(UsageError, match=r"runner\.load"):
        lm.generate(prompt, draft="llama-tied")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="same vocabulary: token 0"):
        lm.generate(prompt, draft=runner.load(LLAMA / "llama-spm-json"))
    with pytest.raises(UsageError, match="RoPE"):
        lm.generate(prompt, draft=runner.load(LLAMA / "llama-rope-dynamic"))
    shutil.copytree(MEMORIES["Mamba"], tmp_path, dirs_exist_ok=True)
    shutil.copy(LLAMA / "llama-tied" / "tokenizer.json", tmp_path)
    with pytest.raises(UsageError, match="recurrent"):
        lm.generate(prompt, draft=runner.load(tmp_path))
    same.close()
    with pytest.raises(UsageError, match="closed"):
        lm.generate(prompt, draft=same)


class Sieve:
    """A guide over 64 of 336 tokens: what may follow depends on the last token; some leave one choice, in runs."""

    def __init__(self) -> None:
        self.last = 0

    def allowed(self) -> Any:
        found = np.zeros(11 * 32, bool)
        if self.last % 5 < 3:
            found[(self.last * 7 + 3) % 64] = True
        else:
            found[:64][(np.arange(64) + self.last) % 3 == 0] = True
        return np.packbits(found, bitorder="little").view(np.uint32)

    def add(self, token: int) -> None:
        self.last = token

    def allowed_after(self, drafts: Sequence[int]) -> list[Any]:
        before, found = self.last, [self.allowed()]
        for token in drafts:
            if not found[-1][token // 32] >> token % 32 & 1:
                break
            self.last = token
            found.append(self.allowed())
        self.last = before
        return found

    def forced(self, most: int) -> list[int]:
        before, run = self.last, []
        while len(run) < most and self.last % 5 < 3:
            self.last = (self.last * 7 + 3) % 64
            run.append(self.last)
        self.last = before
        return run


def test_others_are_held_up_for_forced_tokens_where_these_spare_more() -> None:
    """Of a run of four; and a run is taken along where somebody waits anyway."""
    guide = Sieve()
    guide.last = next(last for last in range(64) if len((setattr(guide, "last", last), guide.forced(16))[1]) == 4)
    state = SamplingState(SamplingParams(), 336, [5, 6])
    answer = Continuation(state, [5, 6], guide=guide)
    assert [rows for rows in range(1, 64) if answer.waits(rows)] == [1, 2, 3, 4, 5, 6, 7]
    assert answer.plan(16) == guide.forced(16)


class Unforced(Sieve):
    def forced(self, most: int) -> list[int]:
        return []


@pytest.mark.parametrize("options", OPTIONS, ids=["greedy", "drawn", "penalised"])
def test_a_guide_and_its_forced_runs(options: dict[str, Any]) -> None:
    engine = open_loaded(MEMORIES["rows"], dtype="float32")
    assert -(-engine.config.vocab_size // 32) == 11
    found = {}
    for kind in (Sieve, Unforced):
        for lookup in (False, True):
            order = Order(
                ids=PROMPT, params=SamplingParams(**options), budget=50, guide=kind(),
                proposer=PromptLookup if lookup else None,
            )  # fmt: skip
            run = Run(engine, PromptCache(engine, keeps=False), order)
            found[kind, lookup] = [token.id for token in run if token is not None]
    assert len({tuple(ids) for ids in found.values()}) == 1
    sieve = Sieve()
    for token in found[Sieve, False]:
        assert sieve.allowed()[token // 32] >> token % 32 & 1
        sieve.add(token)
