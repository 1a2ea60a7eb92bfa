"""Several sequences through kernels: on an NVIDIA GPU against operations; anywhere, how schedulers go through them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any
from weakref import WeakKeyDictionary

import mlx.core as mx
import numpy as np
import pytest
from made_models import made
from places import TESTS

from runner.cache import kv
from runner.cache.caches import Caches
from runner.cache.several import SeveralCaches
from runner.engine import compiled as module
from runner.engine.compiled import Broken, Compiled, RowSteps, SingleSteps
from runner.engine.engine import Engine
from runner.engine.loaded import Loaded, open_loaded
from runner.engine.prompt_cache import PromptCache
from runner.engine.replay import Steps
from runner.engine.request import Run
from runner.engine.rows import Row
from runner.engine.sampling import SamplingParams
from runner.engine.sharing import Sharing
from runner.engine.ticket import Order
from runner.errors import BackendError
from runner.nn.batch import Batch
from runner.ops.cuda.rows_decoder import Logits, RowsDecoder, RowsStep
from runner.ops.device import current
from runner.ops.owner import OWNER

GQA = TESTS / "fixtures/llama/llama-gqa"
PROMPT = [1 + index % 30 for index in range(40)]
needs_gpu = pytest.mark.skipif(not current().compiles, reason="there is no kernel for this device")


class TwinStep:
    """A step that is computed as late as it can be: when somebody asks for what comes of it."""

    def __init__(
        self, twin: Twin, tokens: list[int], before: TwinStep | None, caches: list[Any], positions: list[int]
    ) -> None:
        self.latest = True
        self.caches = caches
        self._twin, self._tokens, self._before = twin, tokens, before
        self._positions, self._failed = positions, False
        self._logits: mx.array | None = None

    @property
    def ended(self) -> bool:
        return self._logits is not None or self._failed

    def wait(self) -> None:
        if self.ended:
            return
        twin, self._failed = self._twin, self._twin.breaks_at <= self._twin.computed
        if self._failed:
            return
        twin.computed += 1
        found = []
        for token, position, one in zip(self._tokens, self._positions, self.caches, strict=True):
            if token < 0:
                assert self._before is not None
                token = self._before.best[~token][0]
            ids = [*twin.ids.get(id(one), PROMPT)[:position], token]
            assert len(ids) == position + 1
            twin.ids[id(one)] = ids
            found.append(twin.loaded.logits(ids)[-1])
        self._logits, self._before = mx.stack(found), None

    @property
    def logits(self) -> mx.array:
        self.wait()
        if self._failed:
            raise BackendError("the driver is gone")
        assert self._logits is not None
        return self._logits

    @property
    def best(self) -> list[tuple[int, float]]:
        return [(int(np.argmax(row)), float(np.max(row))) for row in np.array(self.logits)]


class Twin:
    """What `RowsDecoder` does, from the model's logits over all ids of each sequence."""

    def __init__(self, loaded: Loaded, *, fails_at: int = 10**9, breaks_at: int = 10**9) -> None:
        self.loaded, self.fails_at, self.breaks_at = loaded, fails_at, breaks_at
        self.steps, self.computed, self.bound_rows, self.widest, self.ahead = 0, 0, 0, 0, 0
        self.ids: dict[int, list[int]] = {}
        self.begun: list[TwinStep] = []

    def refresh(self) -> None: ...

    def ready(self, count: int) -> None: ...

    def settle(self) -> None:
        for step in self.begun[-2:]:
            step.wait()

    def bound(self, several: Sequence[Any]) -> list[Any]:
        self.bound_rows += len(several)
        return list(several)

    def begin(self, tokens: Sequence[int], positions: Sequence[int], caches: Sequence[Any]) -> TwinStep:
        self.steps += 1
        self.widest = max(self.widest, len(tokens))
        self.ahead += any(token < 0 for token in tokens)
        if self.steps == self.fails_at:
            raise BackendError("the driver is gone")
        before = self.begun[-1] if self.begun else None
        if before is not None:
            before.latest = False
        if len(self.begun) > 1:
            self.begun[-2].wait()  # of two at once
        self.begun.append(TwinStep(self, list(tokens), before, list(caches), list(positions)))
        return self.begun[-1]


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> Loaded:
    monkeypatch.setattr(module, "ROOM", 8)
    monkeypatch.setattr(kv, "STEP", 8)  # so that rows need room again within a short answer
    return open_loaded(GQA, dtype="float32")


def twinned(loaded: Loaded, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> Twin:
    """`loaded` decodes by a twin of the kernels, whatever an engine makes of it."""
    from runner.engine import step_shape

    twin = Twin(loaded, **settings)
    monkeypatch.setattr(step_shape, "rows_of", lambda caches: caches)
    kernel = Compiled(loaded.model, loaded.dtype, None)
    kernel._rows, kernel._single = twin, False  # type: ignore[assignment]
    loaded.compiled = kernel
    monkeypatch.setattr("runner.engine.loaded.Compiled", lambda *arguments: kernel)
    return twin


def served(loaded: Loaded, count: int, compiles: bool, *, delay: int = 0, options: SamplingParams) -> list[list[int]]:
    """Answers of an engine to the same prompt; each begins when the one before has so many tokens."""
    device = dataclasses.replace(loaded.device, compiles=compiles)
    with Engine(dataclasses.replace(loaded, device=device)) as engine:
        tickets, found = [], []
        for choice in range(count):
            tickets.append(engine.submit(PROMPT, options, max_tokens=16, choice=choice))
            found.append([token.id for _, token in zip(range(delay), tickets[-1], strict=False)])
        return [began + [token.id for token in ticket] for began, ticket in zip(found, tickets, strict=True)]


@pytest.mark.parametrize("options", [SamplingParams(temperature=0.9, seed=4, top_k=8), SamplingParams(temperature=0)])
def test_requests_beside_each_other(loaded: Loaded, monkeypatch: pytest.MonkeyPatch, options: SamplingParams) -> None:
    expected = served(loaded, 4, False, options=options)
    twin = twinned(loaded, monkeypatch)
    assert served(loaded, 4, True, options=options) == expected
    assert twin.widest == 4 and (twin.ahead > 10) == (options.temperature == 0)
    steps = twin.steps
    assert served(loaded, 3, True, delay=3, options=options) == expected[:3]  # prompts beside answers
    assert twin.steps - steps > 15


def test_rows_are_looked_up_when_they_have_moved_and_not_when_neighbours_come(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    twin = twinned(loaded, monkeypatch)
    served(loaded, 4, True, delay=2, options=SamplingParams(temperature=0))
    # 40 + 16 rows, in buffers that grow by quarters: each sequence's lie somewhere else three times at most.
    assert twin.bound_rows <= 4 * 3


def test_rows_that_have_room_stay_where_they_are(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    """To move those of many sequences at an answer's first step takes as long as many steps."""
    twinned(loaded, monkeypatch)
    caches = loaded.new_caches()
    mx.eval(loaded.model(Batch(mx.array([[1, 2, 3]])), caches))
    before, room = caches.arrays, caches.room
    steps = RowSteps(loaded.compiled, caches, None)
    for index in range(room):
        steps.begin([4 + index])
        assert all(one is other for one, other in zip(caches.arrays, before, strict=True))
    steps.begin([3])
    assert caches.room and not any(one is other for one, other in zip(caches.arrays, before, strict=True))


def test_rows_that_went_back_are_looked_up_again(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next request with the same caches finds them elsewhere, though they have room for its token."""
    twin = twinned(loaded, monkeypatch)
    caches, known = loaded.new_caches(), WeakKeyDictionary[Caches, Any]()
    mx.eval(loaded.model(Batch(mx.array([[1, 2, 3]])), caches))
    for token in (4, 5):
        RowSteps(loaded.compiled, caches, None, known).begin([token])
    assert twin.bound_rows == 1
    for again, go in enumerate((lambda: caches.rewind(3), lambda: caches.hold([caches.rows(0, 2)])), start=2):
        go()
        RowSteps(loaded.compiled, caches, None, known).begin([6])
        assert twin.bound_rows == again


def test_kernels_that_fail_are_not_asked_again(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    options = SamplingParams(temperature=0)
    expected = served(loaded, 3, False, options=options)
    twin = twinned(loaded, monkeypatch, fails_at=5)
    # The twin writes no rows: operations find none of what it computed.
    got = served(loaded, 3, True, options=options)
    assert [ids[:4] for ids in got] == [ids[:4] for ids in expected] and {len(ids) for ids in got} == {16}
    assert twin.steps == 5 and loaded.compiled.refused_rows == "the driver is gone"
    assert "gone" in loaded.compiled.way


@pytest.mark.parametrize("failure", ["fails_at", "breaks_at"])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_steps_of_several_processes_that_fail_are_the_end(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch, temperature: float, failure: str
) -> None:
    """The others wait in them: were operations to go on here, they would wait for ever."""
    told: list[list[int]] = []
    twin = twinned(loaded, monkeypatch, **{failure: 4})
    loaded.compiled.part = SimpleNamespace(step=lambda caches, tokens: told.append(list(tokens)))  # type: ignore[assignment]
    with pytest.raises(BackendError, match="several processes has failed: the driver is gone"):
        served(loaded, 3, True, options=SamplingParams(temperature=temperature, seed=3))
    assert len(told) == twin.steps >= 4


def test_a_step_that_fails_for_one_sequence_leaves_its_caches_before_it(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its token was counted when it was begun; operations feed it again."""
    twinned(loaded, monkeypatch, breaks_at=4)
    caches, found = loaded.new_caches(), []
    mx.eval(loaded.model(Batch(mx.array([[1, 2, 3]])), caches))
    with pytest.raises(Broken):
        for token in loaded.compiled.decode(caches, 4, 10, None):
            found.append(token)
    assert 0 < len(found) < 10 and caches.offset == 3 + len(found)


def test_closing_waits_for_steps_that_were_begun() -> None:
    """What they have found is still asked for, and lies in memory that is given back."""
    done: list[str] = []
    driver = SimpleNamespace(
        enter=lambda: None, wait=lambda stream: None, reach=lambda event: done.append("waited"),
        free_event=lambda event: done.append("freed"), free_host=lambda address: None, free=lambda address: None,
        free_stream=lambda stream: None,
    )  # fmt: skip
    slot: Any = SimpleNamespace(
        event=1, best=np.zeros(8, np.uint64), address=0, free=lambda driver: driver.free_event(1)
    )
    slot.step = RowsStep(driver, slot, Logits(mx.zeros((1, 1)), 1, 1), 1)  # type: ignore[arg-type]
    decoder = object.__new__(RowsDecoder)
    decoder.driver, decoder._sizes, decoder._slots = driver, {}, [slot]  # type: ignore[assignment]
    decoder._stream, decoder._best_at = 0, 0  # type: ignore[assignment]
    decoder.close()
    assert done == ["waited", "freed"] and len(slot.step.best) == 1


@pytest.mark.parametrize("lacking", ["kernels", "sums", "compiler", "another's"])
def test_where_one_process_has_no_kernels_none_has(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch, lacking: str
) -> None:
    """All have to know before the first step is begun: those that could take it would wait in it for ever."""
    done: list[str] = []

    def doing(name: str) -> Any:
        def do(*arguments: object) -> None:
            done.append(name)
            if name == lacking:
                raise BackendError(f"there is no {lacking}")

        return do

    def agreed(here: bool) -> bool:
        done.append(f"{here}")
        return here and (lacking != "another's" or "connection" not in done)

    twin = twinned(loaded, monkeypatch)
    names = ("connection", "sums", "compiler", "close")
    twin.connect, twin.check, twin.ready, twin.close = map(doing, names)  # type: ignore[attr-defined, method-assign]
    kernel = loaded.compiled
    kernel.part = SimpleNamespace(exchange=SimpleNamespace(agreed=agreed))  # type: ignore[assignment]
    if lacking == "kernels":
        kernel._rows, kernel.refused_rows = None, "there is no kernels"
    OWNER.run(kernel.connect)
    another = "another process has no kernels"
    assert kernel.rows() is None and kernel.refused_rows == (
        another if lacking == "another's" else f"there is no {lacking}"
    )
    assert (
        done
        == {
            "kernels": ["False"],
            "sums": ["True", "connection", "sums", "False", "close"],
            "compiler": ["True", "connection", "sums", "compiler", "False", "close"],
            "another's": ["True", "connection", "sums", "compiler", "True", "close"],
        }[lacking]
    )


def test_a_process_that_cannot_be_connected_ends_the_run(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others wait for it where nothing can be agreed upon."""

    def connect(exchange: object) -> None:
        raise BackendError("ncclCommInitRank: out of memory")

    twinned(loaded, monkeypatch).connect = connect  # type: ignore[attr-defined]
    loaded.compiled.part = SimpleNamespace(exchange=SimpleNamespace(agreed=bool))  # type: ignore[assignment]
    with pytest.raises(BackendError, match="out of memory"):
        OWNER.run(loaded.compiled.connect)


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_steps_that_fail_when_they_are_waited_for(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch, temperature: float
) -> None:
    """Their tokens, and those of the step begun behind them, are left to operations."""
    options = SamplingParams(temperature=temperature, seed=3)
    expected = served(loaded, 3, False, options=options)
    twin = twinned(loaded, monkeypatch, breaks_at=4)
    got = served(loaded, 3, True, options=options)
    # Of the three sequences not all begin together, and the twin writes no rows.
    assert [ids[:2] for ids in got] == [ids[:2] for ids in expected] and {len(ids) for ids in got} == {16}
    assert twin.computed == 4 and loaded.compiled.refused_rows == "the driver is gone"


def test_caches_are_not_touched_while_a_step_is_under_way(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences leave in the middle, by a token that ends them, by a cancelled ticket and by its deadline."""
    greedy = SamplingParams(temperature=0)
    expected = served(loaded, 1, False, options=greedy)[0]
    twin = twinned(loaded, monkeypatch)
    leave, left = Sharing.leave, list[bool]()

    def checked(self: Sharing, row: Row, *, sound: bool = True) -> None:
        under_way = any(not step.ended and row.caches in step.caches for step in twin.begun)
        left.append(not under_way and len(twin.ids.get(id(row.caches), PROMPT)) == row.offset)
        leave(self, row, sound=sound)

    monkeypatch.setattr(Sharing, "leave", checked)
    device = dataclasses.replace(loaded.device, compiles=True)
    with Engine(dataclasses.replace(loaded, device=device)) as engine:
        ends = engine.submit(PROMPT, greedy, max_tokens=50, ends=[expected[7]])
        whole = engine.submit(PROMPT, greedy, max_tokens=30)
        late = engine.submit(PROMPT, greedy, max_tokens=10_000, timeout=0.5)
        unwanted = engine.submit(PROMPT, greedy, max_tokens=10_000)
        sampled = engine.submit(PROMPT, SamplingParams(temperature=0.8, seed=5), max_tokens=12)  # not its neighbours
        began = [token.id for _, token in zip(range(3), unwanted, strict=False)]
        unwanted.cancel()
        answers = [[token.id for token in ticket] for ticket in (ends, whole, late, unwanted, sampled)]
    assert answers[0] == expected[: expected.index(expected[7]) + 1] and answers[1][:16] == expected
    assert (began + answers[3])[:16] == expected[: len(began + answers[3])] and answers[2][:16] == expected[
        : len(answers[2])
    ]
    assert [one.finish_reason for one in (ends, whole, late, unwanted)] == ["stop", "length", "timeout", "cancelled"]
    assert left == [True] * 5 and len(answers[4]) == 12 and twin.ahead > 0


@pytest.mark.parametrize(
    "options",
    [{"temperature": 0}, {"temperature": 0.8, "seed": 1, "top_p": 0.9}, {"temperature": 0, "logit_bias": {5: 9.0}}],
)
def test_an_answer_of_a_model_without_a_single_kernel(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    def answer() -> list[int]:
        order = Order(ids=list(PROMPT), params=SamplingParams(**options), budget=20)
        return [token.id for token in Run(loaded, PromptCache(loaded), order) if token is not None]

    expected = answer()
    twin = twinned(loaded, monkeypatch)
    assert answer() == expected and twin.steps == 19 and loaded.compiled.way == "a graph of kernels a step"
    twin.fails_at = twin.steps + 4
    assert answer()[:4] == expected[:4] and loaded.compiled.refused == "the driver is gone"


def test_a_model_that_does_not_fit_says_why(loaded: Loaded) -> None:
    kernel = Compiled(SimpleNamespace(layers=[]), mx.float32, None)
    assert kernel.rows() is None and kernel.refused_rows is not None and "the model has" in kernel.refused_rows


SMALL_MIXTURE = {"vocab_size": 4096, "num_experts": 32}


@needs_gpu
@pytest.mark.parametrize(
    ("shape", "quantize", "changes"),
    [
        ("Llama-3.2-1B", None, {"vocab_size": 4096}),
        ("Llama-3.2-1B", "4", {"vocab_size": 4096}),
        ("Qwen3-0.6B", "8", {"vocab_size": 4099}),
        ("Qwen2.5-0.5B", None, {"vocab_size": 4096}),
        ("SmolLM2-135M", None, {"vocab_size": 1000}),
        ("Llama-3.2-1B", "mxfp4", {"vocab_size": 4096}),
        ("Llama-3.2-1B", "mxfp8", {"vocab_size": 4096}),
        ("Llama-3.2-1B", "nvfp4", {"vocab_size": 4096}),
        ("Qwen3-30B-A3B", "mxfp4", SMALL_MIXTURE),
        ("Qwen3-30B-A3B", "4", SMALL_MIXTURE),
        ("Qwen3-30B-A3B", None, SMALL_MIXTURE),
    ],
)
def test_logits_are_as_near_to_float32_as_those_of_operations(
    shape: str, quantize: str | None, changes: dict[str, Any]
) -> None:
    """Of eleven sequences of several lengths, and of one of them alone, whose bits are the same."""
    exact, loaded = made(shape, quantize, "float32", changes), made(shape, quantize, "bfloat16", changes)
    lengths = [7 + 61 * index for index in range(11)]
    tokens = np.random.default_rng(0).integers(0, loaded.config.vocab_size, (3, len(lengths)))

    def filled(one: Loaded, count: int) -> list[Caches]:
        numbers, each = np.random.default_rng(1), []
        for length in lengths[:count]:
            caches = one.new_caches()
            one.model(Batch(mx.array(numbers.integers(0, 1000, (1, length)).astype(np.int32))), caches)
            mx.eval(caches.arrays)
            each.append(caches)
        return each

    def logits(one: Loaded, kernels: bool, count: int) -> np.ndarray:
        caches = SeveralCaches(filled(one, count), [1] * count)
        steps = RowSteps(one.compiled, caches, None) if kernels else Steps(one.model, caches, one.device.ops)
        return np.stack([np.array(steps(mx.array(row[None, :count])).astype(mx.float32)) for row in tokens])

    count = len(lengths)
    want = exact.run(lambda: logits(exact, False, count))
    mine, others = loaded.run(lambda: logits(loaded, True, count)), loaded.run(lambda: logits(loaded, False, count))
    decoder = loaded.run(loaded.compiled.rows)
    assert decoder is not None
    # Of two experts that are nearly equal a row may take the other, which changes its logits by a third of a deviation.
    of_all = np.median if decoder.shape.experts else np.max
    errors = [of_all(np.abs(one - want).max(-1)) for one in (mine, others)]
    assert errors[0] < 1.2 * errors[1]
    assert (loaded.run(lambda: logits(loaded, True, 2)) == mine[:, :2]).all()


@needs_gpu
@pytest.mark.parametrize("form", ["mxfp4", "mxfp8", "nvfp4"])  # the scales of others have the activations' type
@pytest.mark.parametrize("shape", ["Llama-3.2-1B", "Qwen2.5-0.5B"])  # whose 896 columns are no whole boxes
def test_one_sequence_of_a_model_in_a_packed_form(shape: str, form: str) -> None:
    """By one kernel a step, whose logits are those of operations with the unpacked matrices, in float32."""
    loaded = made(shape, form, "float32", {"vocab_size": 4096})
    plain = dataclasses.replace(loaded.device, compiles=False)
    exact = dataclasses.replace(loaded, device=plain)

    def logits(one: Loaded, kernel: bool) -> np.ndarray:
        caches = one.new_caches()
        one.model(Batch(mx.array([PROMPT], mx.int32)), caches)
        mx.eval(caches.arrays)
        steps = Steps(one.model, caches, one.device.ops)
        step = SingleSteps(one.compiled, caches, steps) if kernel else steps
        return np.stack([np.array(step(mx.array([[token]], mx.int32))[0].astype(mx.float32)) for token in (5, 1000, 7)])

    want, got = exact.run(lambda: logits(exact, False)), loaded.run(lambda: logits(loaded, True))
    assert loaded.compiled.refused is None and loaded.compiled.whole
    assert np.abs(got - want).max() < 2e-3 * want.std()


@needs_gpu
def test_float32_is_left_to_operations() -> None:
    loaded = open_loaded(GQA, dtype="float32")
    assert loaded.run(loaded.compiled.rows) is None and "float32" in str(loaded.compiled.refused_rows)
