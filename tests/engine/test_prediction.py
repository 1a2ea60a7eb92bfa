"""Multi-token prediction: the layer's logits are transformers', and guesses by it change no answer."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
import pytest
from places import TESTS
from references import TOLERANCE, error

import runner
from runner.checkpoint.model_files import open_files
from runner.engine.engine import Engine
from runner.engine.loaded import Loaded, assemble
from runner.engine.prediction import Predicted, prediction_caches
from runner.engine.prompt_cache import PromptCache
from runner.engine.request import Run
from runner.engine.sampler import SamplingState
from runner.engine.sampling import SamplingParams
from runner.engine.ticket import Order
from runner.errors import UsageError
from runner.nn.batch import Batch
from runner.ops.device import current

CASES = sorted((TESTS / "fixtures" / "prediction").iterdir())


class Stored(NamedTuple):
    """A tensor's header."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int


class Both:
    """The tensors of a checkpoint and those of a layer beside it."""

    def __init__(self, base: Any, path: Path) -> None:
        self._base, self._added = base, mx.load(str(path))
        added = {name: Stored("F32", tuple(array.shape), array.nbytes) for name, array in self._added.items()}
        self.headers = {**base.headers, **added}

    def read(self, name: str) -> mx.array:
        found: mx.array = self._added[name] if name in self._added else self._base.read(name)
        return found


def opened(case: Path, **options: Any) -> Loaded:
    recipe = json.loads((case / "expected.json").read_text())
    files = open_files(TESTS / "fixtures" / "families" / recipe["base"])
    return assemble(files.config, Both(files.source, case / "layer.safetensors"), dtype="float32", **options)


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def case(request: pytest.FixtureRequest) -> Path:
    path: Path = request.param
    return path


@pytest.fixture(scope="module")
def loaded(case: Path) -> Iterator[Loaded]:
    yield opened(case, mtp=True)


def expected(case: Path) -> tuple[list[int], mx.array]:
    prompt = json.loads((case / "expected.json").read_text())["prompt"]
    return prompt, mx.load(str(case / "expected.safetensors"))["logits"]


def test_logits_are_the_reference(case: Path, loaded: Loaded) -> None:
    prompt, logits = expected(case)
    ids = mx.array([prompt])
    hidden = loaded.model(Batch(ids[:, :-1]), loaded.new_caches())
    batch = Batch(ids[:, 1:])
    assert loaded.prediction is not None
    cache = prediction_caches(loaded.config).layers[0]
    found = loaded.prediction.layer.predict(loaded.model.embed(batch), hidden, batch, cache)  # type: ignore[attr-defined]
    assert error(loaded.model.logits(found)[0], logits) < TOLERANCE


@pytest.mark.parametrize("chunk", [1, 4, 7, 64])
def test_a_prompt_in_any_chunks_gives_the_same_guess(case: Path, loaded: Loaded, chunk: int) -> None:
    """The first guess is the reference's likeliest token, and its further ones take nothing from the next."""
    prompt, logits = expected(case)
    for known in (8, len(prompt) - 1):
        proposer = Predicted(loaded)
        proposer.add(prompt[:known])
        caches = loaded.new_caches()
        for start in range(0, known, chunk):
            ids = mx.array([prompt[start : min(start + chunk, known)]])
            proposer.saw(loaded.model(Batch(ids, start), caches), start)
        proposer.add([prompt[known]])
        state = SamplingState(SamplingParams(temperature=0), loaded.config.vocab_size, prompt[: known + 1])
        guesses = proposer.propose(3, state)
        assert len(guesses) == 3 and guesses[0] == int(np.argmax(np.array(logits[known - 1])))
        assert proposer.propose(3, state) == []  # nothing new was seen


@pytest.mark.parametrize(
    "options", [{"temperature": 0.0}, {"temperature": 0.9, "seed": 4, "frequency_penalty": 0.4, "logprobs": 0}]
)
def test_guesses_change_no_token(case: Path, loaded: Loaded, options: dict[str, Any]) -> None:
    prompt = expected(case)[0]

    def answer(guesses: bool) -> list[int]:
        make = (lambda: Predicted(loaded)) if guesses else None
        asked = Order(ids=prompt, params=SamplingParams(**options), budget=60, proposer=make)
        return [token.id for token in Run(loaded, PromptCache(loaded, keeps=False), asked) if token is not None]

    assert answer(True) == answer(False)


def test_right_guesses_are_taken(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer that says what the model will say: the model's own next logits, asked one token ahead."""
    prompt, script = [5, 6, 7], list(range(10, 40))
    passes: list[int] = []
    whole = type(loaded.model).logits

    def scripted(self: Any, hidden: mx.array) -> mx.array:
        """Logits that say the script: of hidden states that carry the position of their token."""
        passes.append(hidden.shape[1])
        ids = [[script[min(int(at), len(script) - 1)] for at in row] for row in hidden[..., 0].tolist()]
        return mx.where(mx.arange(loaded.config.vocab_size) == mx.array(ids)[..., None], 9.0, whole(self, hidden) * 0)

    def numbered(self: Any, batch: Batch, caches: Any) -> mx.array:
        at = caches.offset - len(prompt) + 1
        hidden = run(self, batch, caches)
        return hidden * 0 + mx.arange(at, at + hidden.shape[1])[None, :, None]

    def next_one(self: Any, embedded: mx.array, hidden: mx.array, batch: Batch, cache: Any) -> mx.array:
        predict(self, embedded, hidden, batch, cache)
        return hidden + 1

    assert loaded.prediction is not None
    layer = type(loaded.prediction.layer)
    run, predict = type(loaded.model).__call__, layer.predict
    monkeypatch.setattr(type(loaded.model), "logits", scripted)
    monkeypatch.setattr(type(loaded.model), "__call__", numbered)
    monkeypatch.setattr(layer, "predict", next_one)
    asked = Order(ids=prompt, params=SamplingParams(temperature=0), budget=30, proposer=lambda: Predicted(loaded))
    found = [token.id for token in Run(loaded, PromptCache(loaded, keeps=False), asked) if token is not None]
    assert found == script
    assert 2 <= sum(count > 1 for count in passes) < 8
    passes.clear()
    with Engine(loaded, prefixes=0) as engine:
        ticket = engine.submit(prompt, max_tokens=30, proposer=lambda: Predicted(loaded))
        assert [token.id for token in ticket] == script
    assert 2 <= sum(count > 1 for count in passes) < 8


def test_in_a_batch(case: Path, loaded: Loaded) -> None:
    """Beside others, some of which have guesses too, each answer is as alone."""
    prompts = [expected(case)[0][: 5 + 3 * index] for index in range(4)]
    params = [SamplingParams(temperature=0.8, seed=index) for index in range(4)]
    with Engine(loaded, prefixes=0) as engine:
        alone = [
            [token.id for token in engine.submit(prompt, each, max_tokens=40)]
            for prompt, each in zip(prompts, params, strict=True)
        ]
        tickets = [
            engine.submit(prompt, each, max_tokens=40, proposer=(lambda: Predicted(loaded)) if index < 3 else None)
            for index, (prompt, each) in enumerate(zip(prompts, params, strict=True))
        ]
        assert [[token.id for token in ticket] for ticket in tickets] == alone


def test_what_has_no_such_layer_says_so(case: Path) -> None:
    without = opened(case)
    assert without.prediction is None and without.nbytes < opened(case, mtp=True).nbytes
    with pytest.raises(UsageError, match="loaded without"):
        Predicted(without)
    files = open_files(TESTS / "fixtures" / "families" / "deepseek_v3-v5")
    with pytest.raises(UsageError, match="this checkpoint has 0"):
        assemble(files.config, files.source, mtp=True)
    files = open_files(TESTS / "fixtures" / "llama" / "llama-gqa")
    with pytest.raises(UsageError, match="llama models have no layer"):
        assemble(files.config, files.source, mtp=True)


def test_a_model_loaded_with_the_layer_uses_it(case: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = json.loads((case / "expected.json").read_text())
    path = shutil.copytree(TESTS / "fixtures" / "families" / recipe["base"], tmp_path / "model")
    shutil.copy(TESTS / "fixtures" / "llama" / "llama-tied" / "tokenizer.json", path)
    tensors = {**mx.load(str(path / "model.safetensors")), **mx.load(str(case / "layer.safetensors"))}
    mx.save_safetensors(str(path / "model.safetensors"), tensors)
    made: list[object] = []
    begin = Predicted.__init__
    monkeypatch.setattr(Predicted, "__init__", lambda self, loaded: (made.append(self), begin(self, loaded))[1])
    with warnings.catch_warnings(action="ignore"):  # the tokenizer is another model's
        dtype = None if current().ops.one_form else "float32"
        plain, lm = runner.load(path, dtype=dtype), runner.load(path, dtype=dtype, mtp=True)
    wanted = plain.generate([5, 6, 7], max_tokens=20, seed=3).tokens
    assert not made and lm.generate([5, 6, 7], max_tokens=20, seed=3).tokens == wanted and len(made) == 1
    assert lm.generate([5, 6, 7], max_tokens=20, seed=3, lookup=True).tokens == wanted and len(made) == 1
    with pytest.raises(UsageError, match="mtp must be true or false"):
        runner.load(path, mtp=1)  # type: ignore[arg-type]
