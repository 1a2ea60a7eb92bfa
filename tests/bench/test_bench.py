"""`runner bench` on tiny models: the cases it runs, the figures it computes, the options it refuses."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from places import TESTS

from runner import resources
from runner.bench import measure, report
from runner.bench.bandwidth import _numpy_pass, read_bandwidth
from runner.bench.measure import Case, cache_bytes, cases, filled, generate, read, rewind, run, weight_bytes
from runner.bench.models import describe, open_subject, random_weights
from runner.cli.app import run as command
from runner.convert.quantize import QUANTIZATIONS
from runner.engine.loaded import Loaded, assemble, open_loaded
from runner.errors import UsageError
from runner.families import FAMILIES
from runner.nn.linear import Quantization
from runner.ops.owner import OWNER
from runner.weights.cuts import Axis, Cut, cut_out, cut_shape

FIXTURES = TESTS / "fixtures" / "llama"
MODEL = FIXTURES / "llama-gqa"
TINY = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "bfloat16",
}


def tiny(form: Quantization | None = None, **changes: Any) -> Loaded:
    raw = {**TINY, **changes}
    return assemble(raw, random_weights(raw, form=form, seed=3))


def test_cases_are_every_combination_in_llama_bench_words() -> None:
    names = [case.name for case in cases([512, 16], [128], depths=[0, 64], batches=[1, 4])]
    assert names[:4] == ["pp512", "pp16", "pp512 @ d64", "pp16 @ d64"]
    assert names[-2:] == ["tg128 x 4", "tg128 @ d64 x 4"] and len(names) == 12
    assert [case.name for case in cases([0], [3])] == ["tg3"]


def test_ctrl_c_is_looked_for_in_each_piece_and_step(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, looked = tiny(), []
    engine.device = dataclasses.replace(engine.device, chunk=16)
    monkeypatch.setattr(OWNER, "check_wanted", lambda: looked.append(1))
    engine.run(lambda: mx.eval(read(engine, np.ones((1, 40), np.int32), engine.new_caches())))
    assert len(looked) == 3
    engine.run(lambda: generate(engine, np.ones((1, 1), np.int32), engine.new_caches(), 5))
    assert len(looked) >= 3 + 4  # a kernel for whole steps begins behind one by operations


@pytest.mark.parametrize("numbers", [([0], [0]), ([-1], [1]), ([1], [1], [-4]), ([1], [1], [0], [0])])
def test_cases_that_measure_nothing_are_refused(numbers: tuple[list[int], ...]) -> None:
    with pytest.raises(UsageError):
        cases(*numbers)


def test_generating_is_the_greedy_answer_and_a_batch_is_its_rows() -> None:
    """The timed loop does the real work: its cached tokens are those that a single pass over all of them predicts."""
    engine = open_loaded(MODEL, dtype="float32")
    prompt = np.random.default_rng(0).integers(0, engine.config.vocab_size, (3, 9), dtype=np.int32)
    batch = engine.new_caches()
    first = np.array(read(engine, prompt, batch)).astype(np.int32)
    generate(engine, first[:, None], batch, 5)
    for row in range(3):
        ids = prompt[row].tolist()
        for _ in range(6):
            ids.append(int(mx.argmax(engine.logits(ids)[-1]).item()))
        assert first[row] == ids[9]
        alone = engine.new_caches()
        mx.eval(read(engine, np.array([ids[:14]], dtype=np.int32), alone))
        for together, single in zip(batch, alone, strict=True):
            assert together.offset == single.offset == 14
            for ours, theirs in zip(together.arrays, single.arrays, strict=True):
                np.testing.assert_allclose(
                    np.array(ours[row, :, :14].astype(mx.float32)),
                    np.array(theirs[0, :, :14].astype(mx.float32)),
                    atol=1e-4,
                )


def test_rewinding_goes_back_to_the_depth_or_says_that_it_cannot() -> None:
    engine = open_loaded(MODEL)
    ids = np.zeros((1, 20), dtype=np.int32)
    caches = filled(engine, ids)
    mx.eval(read(engine, ids, caches))
    assert rewind(caches, 20) and {cache.offset for cache in caches} == {20}
    windowed = tiny(model_type="mistral", sliding_window=4)
    long = np.zeros((1, 250), dtype=np.int32)
    caches = filled(windowed, long[:, :2])
    for _ in range(4):  # more than the buffer holds beside the window
        mx.eval(read(windowed, long, caches))
    assert not rewind(caches, 2)


def test_results_add_up() -> None:
    subject = open_subject(str(MODEL), dtype="float32")
    (result,) = run(subject, [Case("tg", 6, depth=10, batch=2)], repetitions=4)
    rates = [2 * 6 / seconds for seconds in result.seconds]
    assert len(rates) == 4 and all(rate > 0 for rate in rates)
    assert result.tps == pytest.approx(np.mean(rates)) and result.tps_sd == pytest.approx(np.std(rates, ddof=1))
    engine = subject.engine
    config = engine.config
    head = 2 * config.num_hidden_layers * vars(config)["num_key_value_heads"] * vars(config)["head_dim"]
    weights = weight_bytes(engine)
    assert weights is not None and result.bandwidth is not None
    expected = (weights + 2 * head * 4 * (10 + 4.5)) * 6 / np.mean(result.seconds)  # each has made one token before
    assert result.bandwidth == pytest.approx(expected)
    assert 0 < result.peak_memory < result.peak_rss
    (prompt,) = run(subject, [Case("pp", 6)], repetitions=1)
    assert prompt.bandwidth is None and prompt.tps_sd == 0


@pytest.mark.parametrize("name", [str(MODEL), "shape:SmolLM2-135M"])
def test_a_model_is_loaded_on_the_thread_that_computes_with_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the loading thread has made and not computed, no other can compute: ranks' kernels were made so."""
    seen: list[bool] = []

    def assemble(*arguments: Any, **options: Any) -> Loaded:
        seen.append(OWNER.here)
        raise UsageError("enough")

    monkeypatch.setattr("runner.bench.models.assemble", assemble)
    with pytest.raises(UsageError, match="enough"):
        open_subject(name)
    assert seen == [True]


def test_a_table_that_is_only_looked_up_is_not_counted_as_read() -> None:
    for tied in (True, False):
        engine = tiny(tie_word_embeddings=tied)
        table = 96 * 64 * 2
        assert weight_bytes(engine) == engine.nbytes - (0 if tied else table)


def test_a_window_bounds_what_is_read_of_a_cache() -> None:
    engine = tiny(model_type="mistral", sliding_window=8)
    caches = filled(engine, np.zeros((1, 30), dtype=np.int32))
    row = caches[0].arrays[0].shape[3] * caches[0].arrays[0].dtype.size
    assert cache_bytes(caches, 30) == 2 * 2 * 2 * row * 8


@pytest.mark.parametrize("name", list(QUANTIZATIONS))
def test_random_weights_load_and_give_finite_logits(name: str) -> None:
    raw = {**TINY, "hidden_size": 128, "head_dim": 32}
    engine = assemble(raw, random_weights(raw, form=QUANTIZATIONS[name], seed=1))
    logits = engine.logits([1, 2, 3])
    assert bool(mx.all(mx.isfinite(logits))) and float(mx.std(logits)) > 1e-3
    assert describe("tiny", engine).quantization.startswith(f"{QUANTIZATIONS[name].bits}-bit")


def test_random_weights_depend_on_seed_and_name_alone() -> None:
    one, again, other = (random_weights(TINY, seed=seed) for seed in (1, 1, 2))
    q, k = (f"model.layers.0.self_attn.{name}_proj.weight" for name in "qk")
    assert mx.array_equal(one.read(q), again.read(q)) and not mx.array_equal(one.read(q), other.read(q))
    assert not mx.array_equal(one.read(q)[:32], one.read(k))
    values = np.array(one.read(q).astype(mx.float32))
    assert values.std() == pytest.approx(0.02, rel=0.05) and abs(values.mean()) < 1e-3


@pytest.mark.parametrize("form", [None, Quantization(4, 32, "affine")])
def test_a_part_of_random_weights_is_made_without_the_rest(
    form: Quantization | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = random_weights(TINY, form=form)
    rows: Axis = ((3, 5), (0, 9))
    for name, header in source.headers.items():
        cut: Cut = tuple(rows if size >= 16 else None for size in header.shape)
        monkeypatch.setattr("runner.bench.models._block", lambda: 1 << 30)
        whole = source.read(name)
        assert whole.shape == header.shape
        monkeypatch.setattr("runner.bench.models._block", lambda: 7)
        part = source.read_part(name, cut)
        assert part.shape == cut_shape(header.shape, cut) and mx.array_equal(part, cut_out(whole, cut)), name


def test_packed_random_weights_have_the_same_spread() -> None:
    for bits in (4, 8):
        source = random_weights(TINY, form=Quantization(bits, 32, "affine"), seed=0)
        name = "model.layers.0.mlp.gate_proj"
        full = mx.dequantize(*(source.read(f"{name}.{part}") for part in ("weight", "scales", "biases")), 32, bits)
        assert float(mx.std(full.astype(mx.float32))) == pytest.approx(0.02, rel=0.1)
        assert abs(float(mx.mean(full.astype(mx.float32)))) < 1e-3


@pytest.mark.parametrize(
    "name", [name for name in resources.names("shapes") if resources.read("shapes", name)["model_type"] in FAMILIES]
)
def test_every_published_shape_that_has_a_family_can_be_planned(name: str) -> None:
    """Only headers are made, nothing is allocated; the number of parameters is close to the one in the shape's name."""
    headers = random_weights(resources.read("shapes", name)).headers
    billions = {"B": 1e9, "M": 1e6}
    said = next(word for word in name.split("-") if word[:1].isdigit() and word[-1] in billions and word[-2].isdigit())
    found = sum(math.prod(header.shape) for header in headers.values())
    assert found == pytest.approx(float(said[:-1]) * billions[said[-1]], rel=0.25)


def test_the_command_prints_each_form(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", str(MODEL), "-p", "8", "-n", "4", "-d", "0,16", "-r", "2"]
    assert command([*arguments, "-o", "json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["test"] for row in rows] == ["pp8", "pp8 @ d16", "tg4", "tg4 @ d16"]
    assert {row["model"] for row in rows} == {"llama-gqa"} and all(row["read_bandwidth"] > 1e8 for row in rows)
    assert command([*arguments, "-o", "csv"]) == 0
    table = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["test"] for row in table] == [row["test"] for row in rows] and list(table[0]) == list(rows[0])
    assert command([*arguments, "-o", "md"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8 and len({line.count("|") for line in lines[:6]}) == 1
    assert lines[4].split("|")[8].strip() == "tg4" and "%" in lines[4]
    assert command(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("llama-gqa: ") and lines[2] == "" and lines[3].split()[:2] == ["test", "t/s"]
    assert [line[:9].strip() for line in lines[4:8]] == ["pp8", "pp8 @ d16", "tg4", "tg4 @ d16"]
    assert all(len(line) <= 100 for line in lines) and lines[6].endswith("%")
    assert len(lines) == 10 and len({len(line) for line in [lines[3], *lines[6:8]]}) == 1


@pytest.mark.parametrize("form", ["table", "md", "json", "csv"])
def test_ctrl_c_keeps_the_rows_that_are_there(
    form: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows are written as they come: the second test is interrupted, and the first one's row has been shown."""
    whole = measure.wired
    shown: list[str] = []

    def interrupted(engine: Loaded, case: Case, repetitions: int, seed: int) -> Any:
        shown.append(capsys.readouterr().out)
        if case.kind == "tg":
            raise KeyboardInterrupt
        return whole(engine, case, repetitions, seed)

    monkeypatch.setattr(measure, "wired", interrupted)
    assert command(["bench", str(MODEL), "-p", "8", "-n", "4", "-r", "1", "-o", form]) == 130
    rest = capsys.readouterr().out
    header, row = shown
    assert ("test" in header) == (form != "json") and "pp8" not in header and "pp8" in row and "tg4" not in row + rest
    if form == "json":
        assert [each["test"] for each in json.loads(header + row + rest)] == ["pp8"]
    if form in ("table", "md"):
        assert "This machine reads" in rest


def test_names_and_sizes_are_checked_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measured(*arguments: Any) -> float:
        raise AssertionError("measured")

    monkeypatch.setattr("runner.bench.bandwidth.read_bandwidth", measured)
    for arguments in (["Llama-3.2-1b"], ["./nowhere"], [str(MODEL), "-d", "100000"]):
        assert command(["bench", *arguments]) in (1, 2)
        assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([str(MODEL), "-p", "x"], "-p takes whole numbers"),
        ([str(MODEL), "-p", "0", "-n", "0"], "nothing to measure"),
        ([str(MODEL), "-d", "100000"], "positions"),
        ([str(MODEL), "--quantize", "4"], "with 'runner convert' first"),
        (["Llama-3.2-1B", "--quantize", "1"], "--quantize must be one of"),
        (["Llama-3.2-1B", "--group-size", "32"], "--group-size needs --quantize"),
        (["Llama-3.2-1B", "--quantize", "4", "--group-size", "48"], "32, 64 or 128"),
        ([str(MODEL), "--plot", "a.pdf"], ".png or .svg"),
    ],
)
def test_what_makes_no_sense_is_refused_in_a_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(["bench", *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1 and not captured.out


def test_a_plot_without_matplotlib_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"mlx-runner\[plot\]"):
        report.check_plot(Path("a.svg"), cases([1], [1], depths=[0, 1]))


def test_a_plot_draws_what_varies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The axis that varies is chosen; where matplotlib is installed, a file is drawn."""
    found = report.importlib.util.find_spec("matplotlib")
    monkeypatch.setattr(report.importlib.util, "find_spec", lambda name: object())
    assert report.check_plot(tmp_path / "a.svg", cases([8], [0], depths=[0, 8])) == "depth"
    assert report.check_plot(tmp_path / "a.png", cases([8], [0], batches=[1, 2])) == "batch"
    with pytest.raises(UsageError, match="give several"):
        report.check_plot(tmp_path / "a.png", cases([8], [0]))
    if found is not None:
        subject = open_subject(str(MODEL))
        results = list(run(subject, cases([8], [4], depths=[0, 8]), repetitions=2))
        report.plot(tmp_path / "a.svg", "depth", subject, results)
        text = (tmp_path / "a.svg").read_text()
        assert "<svg" in text and (tmp_path / "a.svg").stat().st_size > 4000


def test_bandwidth_is_that_of_memory() -> None:
    """Kernels and NumPy read the same memory, so they agree within a factor that is wide for a busy machine."""
    measured, plain = read_bandwidth(passes=3), (256 << 20) / _numpy_pass(256 << 20, 3)
    assert 1e9 < measured < 2e12
    if mx.default_device() == mx.Device(mx.cpu):
        assert 0.2 < measured / plain < 8
