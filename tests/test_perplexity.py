"""Perplexity and divergence against a naive twin in NumPy; llama-perplexity's chunks counted by hand; refusals."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from command_line import own
from hypothesis import given, settings
from hypothesis import strategies as st
from places import TESTS

import runner
from runner.checkpoint.model_files import open_files
from runner.convert.convert import convert
from runner.convert.quantize import quantizer
from runner.engine.loaded import Loaded, assemble, open_loaded
from runner.errors import UsageError
from runner.perplexity import _estimate, compare, perplexity, read_ids
from runner.text.tokenizer import Tokenizer

LLAMA = TESTS / "fixtures" / "llama" / "llama-gqa"
SPM = TESTS / "fixtures" / "llama" / "llama-spm"
IDS = [int(i) for i in np.random.default_rng(0).integers(3, 45, 100)]


@pytest.fixture(scope="module")
def engine() -> Loaded:
    return open_loaded(LLAMA, dtype="float32")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    path = tmp_path_factory.mktemp("packed") / "4bit"
    convert(open_files(LLAMA), path, quantizer=quantizer("4", 32))
    return open_loaded(path, dtype="float32")


def log_softmax(logits: Any) -> Any:
    wide = np.array(logits, dtype=np.float64)
    top = wide.max(-1, keepdims=True)
    return wide - top - np.log(np.exp(wide - top).sum(-1, keepdims=True))


def naive(engine: Loaded, ids: list[int], chunk: int, bos: int | None) -> tuple[Any, Any]:
    """Log-probabilities of the scored positions of all chunks, `[N, V]`, and the tokens that follow: no cache, no
    slices, one chunk after the other as the loop in perplexity.cpp goes."""
    rows, targets = [], []
    for start in range(0, len(ids) // chunk * chunk, chunk):
        piece = ids[start : start + chunk]
        seen = piece if bos is None else [bos, *piece[1:]]
        found = log_softmax(engine.logits(seen))
        for position in range(chunk // 2, chunk - 1):
            rows.append(found[position])
            targets.append(piece[position + 1])
    return np.array(rows), np.array(targets)


@pytest.mark.parametrize("chunk", [4, 5, 16, 33, 100])
@pytest.mark.parametrize("bos", [None, 1])
def test_perplexity_is_the_naive_twins(engine: Loaded, chunk: int, bos: int | None) -> None:
    rows, targets = naive(engine, IDS, chunk, bos)
    losses = -rows[np.arange(len(targets)), targets]
    found = perplexity(engine, IDS, bos=bos, chunk=chunk)
    count = 100 // chunk
    assert (found.tokens, found.chunks) == (len(losses), count) == (count * (chunk - 1 - chunk // 2), count)
    assert found.perplexity.value == pytest.approx(math.exp(losses.mean()), rel=1e-4)
    # llama.cpp: sqrt((mean of squares - squared mean) / (count - 1)) * ppl
    spread = math.sqrt(max((losses**2).mean() - losses.mean() ** 2, 0) / max(len(losses) - 1, 1))
    assert found.perplexity.error == pytest.approx(spread * math.exp(losses.mean()), rel=1e-3, abs=1e-4)


def test_512_tokens_have_255_that_are_judged(engine: Loaded) -> None:
    """As in llama.cpp, positions 256 to 510 are scored, each by the token that follows."""
    config = dataclasses.replace(engine.config, max_position_embeddings=1100)
    long = dataclasses.replace(engine, config=config)
    found = perplexity(long, IDS * 11, chunk=512)
    assert (found.tokens, found.chunks) == (2 * 255, 2)
    whole = perplexity(long, IDS * 11, chunk=1100)  # read in three passes
    rows, targets = naive(long, IDS * 11, 1100, None)
    assert whole.perplexity.value == pytest.approx(math.exp(-rows[np.arange(549), targets].mean()), rel=1e-4)


def test_comparison_is_the_naive_twins(engine: Loaded, other: Loaded) -> None:
    (p, _), (q, _) = naive(engine, IDS, 20, 1), naive(other, IDS, 20, 1)
    divergence = (np.exp(p) * (p - q)).sum(-1)
    mine, found = compare(other, engine, IDS, bos=1, chunk=20)
    assert found.kl_divergence.value == pytest.approx(divergence.mean(), rel=1e-3)
    assert found.kl_divergence.error == pytest.approx(divergence.std() / math.sqrt(len(divergence) - 1), rel=1e-3)
    assert found.kl_max == pytest.approx(divergence.max(), rel=1e-3)
    assert found.kl_999 == pytest.approx(np.quantile(divergence, 0.999), rel=1e-3)
    share = (p.argmax(-1) == q.argmax(-1)).mean()
    assert 0 < share < 1 and found.same_top.value == pytest.approx(share)
    assert found.same_top.error == pytest.approx(math.sqrt(share * (1 - share) / (len(p) - 1)))
    assert mine == perplexity(other, IDS, bos=1, chunk=20)
    assert found.base == perplexity(engine, IDS, bos=1, chunk=20)


def test_a_model_is_itself(engine: Loaded) -> None:
    mine, found = compare(engine, engine, IDS, chunk=32, chunks=2)
    assert found.base == mine and mine.chunks == 2
    assert found.kl_divergence.value == found.kl_divergence.error == found.kl_max == found.kl_999 == 0
    assert (found.same_top.value, found.same_top.error) == (1.0, 0.0)


def test_fewer_bits_are_further_away(tmp_path: Path, engine: Loaded) -> None:
    divergence = []
    for form in ("8", "5", "3"):
        convert(open_files(LLAMA), tmp_path / form, quantizer=quantizer(form, 32))
        packed = open_loaded(tmp_path / form, dtype="float32")
        divergence.append(compare(packed, engine, IDS, chunk=25)[1].kl_divergence.value)
    assert 0 < divergence[0] < divergence[1] / 4 < divergence[2] / 16


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 30), min_size=2, max_size=60))
def test_error_bars(values: list[float]) -> None:
    found = _estimate(np.array(values))
    assert found.value == pytest.approx(np.mean(values)) and found.error >= 0
    assert found.error == pytest.approx(np.std(values, ddof=1) / math.sqrt(len(values)), abs=1e-9)
    doubled = _estimate(np.array(values * 4))
    assert doubled.value == pytest.approx(found.value)
    assert doubled.error == pytest.approx(found.error * math.sqrt((len(values) - 1) / (4 * len(values) - 1)), abs=1e-9)


def test_uniform_predictions_have_the_vocabularys_perplexity(engine: Loaded) -> None:
    class Even:
        def __call__(self, batch: Any, caches: Any) -> mx.array:
            return mx.zeros((*batch.ids.shape, 4))

        def logits(self, hidden: mx.array) -> mx.array:
            return mx.zeros((*hidden.shape[:-1], engine.config.vocab_size))

    found = perplexity(dataclasses.replace(engine, model=Even()), IDS, chunk=50)
    assert found.perplexity.value == pytest.approx(engine.config.vocab_size)
    assert found.perplexity.error == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize(
    ("path", "added"),
    [(LLAMA, 1), (SPM, 1), (TESTS / "fixtures" / "llama" / "llama-eps", None), (TESTS / "data/tokenizers/llama", 1)],
)
def test_bos_is_added_where_the_tokenizer_adds_it(path: Path, added: int | None) -> None:
    tokenizer = Tokenizer.from_directory(path)
    ids, bos = read_ids(tokenizer, "a few words")
    assert bos == added and tokenizer.bos_token_id == 1
    assert ids == ([] if added is None else [1]) + tokenizer.encode("a few words", add_special_tokens=False)
    assert ids[-1] not in tokenizer.eos_token_ids  # the last of these adds one behind, which is no part of the text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chunk": 3}, "at least 4 tokens and at most 128"),
        ({"chunk": 129}, "at most 128.*, not 129"),
        ({"chunk": 101}, "100 tokens, fewer than one chunk of 101"),
        ({"chunk": 10, "chunks": 0}, "chunks must be at least 1"),
    ],
)
def test_refusals(engine: Loaded, options: dict[str, int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        perplexity(engine, IDS, **options)


def test_vocabularies_must_be_the_same(engine: Loaded) -> None:
    raw = {**open_files(LLAMA).config}
    config = dataclasses.replace(engine.config, vocab_size=engine.config.vocab_size + 1)
    with pytest.raises(UsageError, match="vocabularies differ"):
        compare(engine, dataclasses.replace(engine, config=config), IDS, chunk=10)
    assert assemble(raw, open_files(LLAMA).source).config.vocab_size == engine.config.vocab_size


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "runner", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, check=False, stdin=subprocess.DEVNULL)


def test_the_command(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The ferry leaves at nine, and takes two hours. " * 30)
    done = run("perplexity", str(LLAMA), str(text), "--chunk", "32", "--chunks", "3", "--against", str(LLAMA), "--json")
    assert (done.returncode, own(done.stderr)) == (0, "")
    found = json.loads(done.stdout)
    lm = runner.load(LLAMA)
    ids, bos = read_ids(lm.tokenizer, text.read_text())
    wanted = perplexity(lm.engine, ids, bos=bos, chunk=32, chunks=3)
    assert found["perplexity"] == wanted.perplexity.value == found["against"]["perplexity"]
    assert (found["tokens"], found["chunks"], found["chunk"]) == (45, 3, 32)
    assert found["against"]["kl_divergence"] == 0 and found["against"]["same_top"] == 1
    done = run("perplexity", str(LLAMA), str(text), "--chunk", "32", "--chunks", "3", "--against", str(LLAMA))
    assert f"{wanted.perplexity.value:.4f} ± {wanted.perplexity.error:.4f}" in done.stdout.splitlines()[0]
    assert "100.000 ± 0.000 %" in done.stdout and "0.000000 ± 0.000000" in done.stdout
    if runner.load(LLAMA).device.int8 is not None:  # against the same model without the option
        done = run("perplexity", str(LLAMA), str(text), "--chunk", "32", "--chunks", "3", "--activations", "int8")
        assert "perplexity of exact activations" in done.stdout and "KL divergence" in done.stdout, done
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    for arguments, message in (
        ([str(LLAMA), str(tmp_path / "latin")], "not UTF-8 text: see the byte at offset 3"),
        ([str(LLAMA), str(text)], "128"),
        ([str(LLAMA), str(text), "--chunk", "32", "--against", str(SPM)], "differ"),
        ([str(LLAMA), "/nowhere.txt"], "/nowhere.txt"),
    ):
        done = run("perplexity", *arguments)
        assert (done.returncode, done.stdout) == (2, "") and own(done.stderr).count("\n") == 1, done
        assert message in done.stderr


@pytest.mark.skipif(mx.default_device() != mx.Device(mx.cpu), reason="kernels are for CPUs")
def test_missing_kernels_are_said_once_for_two_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUNNER_KERNELS_ISA", "none")
    (tmp_path / "text").write_text("The ferry leaves at nine, and takes two hours. " * 8)
    done = run("perplexity", str(LLAMA), str(tmp_path / "text"), "--chunk", "32", "--against", str(LLAMA))
    assert done.returncode == 0 and done.stderr.count("'runner doctor' says more") == 1
    assert own(done.stderr) == ""
    done = run("perplexity", str(LLAMA), str(tmp_path / "text"), "--chunk", "32", "--activations", "int8")
    assert done.returncode == 2 and "needs runner's CPU kernels" in done.stderr
