"""What a model computes in where one dtype serves for all: chosen once, kept to, wide enough for loud activations."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf_writer
import mlx.core as mx
import numpy as np
import pytest
from gguf_cases import mixed_model
from mlx_formats import LLAMA, MOE, Format, floats, packed
from places import TESTS
from plain_path import KEYS, PLAIN, Step, decode_step, loud
from published_reference import Case, awq, ct_float4, ct_integers, fp8, gptq, linears, write_model
from references import FIXTURES, TOLERANCE, error, expected
from sources import Arrays

from runner.config.memory import State
from runner.engine import loaded as engines
from runner.engine.dtypes import choose
from runner.engine.loaded import Loaded, assemble, open_loaded
from runner.nn.batch import Batch
from runner.ops import cpu
from runner.ops.cpu._load import Unavailable
from runner.ops.device import Device, current
from runner.ops.table import PORTABLE
from runner.weights import loading

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]

MLX: dict[str, Callable[[Path, str | None], Loaded]] = {
    f"mlx {form.name}": lambda _, dtype, form=form, raw=raw: assemble(
        {**raw, "quantization": form.entry}, Arrays(packed(floats(raw), form)[0]), dtype=dtype
    )
    for form in (Format(4, 64), Format(8, 32), Format(4, 32, "mxfp4"), Format(8, 32, "mxfp8"), Format(4, 16, "nvfp4"))
    for raw in (LLAMA, MOE)[: 1 if form.mode == "affine" else 2]
}


def gguf(path: Path, dtype: str | None, mix: str) -> Loaded:
    file = path / f"{mix}.gguf"
    mixed_model(file, mix)
    return open_loaded(file, dtype=dtype)


def published(path: Path, dtype: str | None, build: Callable[..., Case]) -> Loaded:
    """The Llama fixture in a published format; config.json says bfloat16."""
    fixture = TESTS / "fixtures" / "llama" / "llama-gqa"
    cases = {name: build(np.random.default_rng(0), *shape) for name, shape in linears(fixture).items()}
    return open_loaded(write_model(path / str(dtype), fixture, cases, next(iter(cases.values())).options), dtype=dtype)


PACKINGS: dict[str, Callable[[Path, str | None], Loaded]] = {
    **MLX,
    **{
        f"gguf {mix}": lambda path, dtype, mix=mix: gguf(path, dtype, mix)
        for mix in ("Q4_0", "Q5_0", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "IQ1_S", "MXFP4")
    },
    **{
        name: lambda path, dtype, build=build: published(path, dtype, build)
        for name, build in {
            "gptq": gptq,
            "gptq with zero points": lambda *a: gptq(*a, sym=False),
            "awq": awq,
            "fp8": fp8,
            "compressed-tensors": ct_integers,
            "compressed-tensors with zero points": lambda *a: ct_integers(*a, symmetric=False),
            "compressed-tensors nvfp4": ct_float4,
        }.items()
    },
}  # fmt: skip
"""A model in each form of packing; the scales of Q4_K, Q5_K, AWQ and of zero points are float32."""


def default(packing: str, found: Loaded) -> mx.Dtype:
    """What a model packed so is computed in: published forms come with a config.json that says bfloat16."""
    named = not packing.startswith(("mlx", "gguf"))
    return mx.bfloat16 if named or found.config.model_type != "llama" else mx.float16


def short(path: Path) -> bool:
    """Whether a fixture is the first of its family."""
    kind = expected_type(path)
    return path == next(other for other in FIXTURES if expected_type(other) == kind)


def expected_type(path: Path) -> str:
    return str(json.loads((path / "config.json").read_text())["model_type"])


by_fixture = pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=[] if short(path) else [pytest.mark.long], id=path.name) for path in FIXTURES],
)
by_packing = pytest.mark.parametrize("packing", PACKINGS)


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "current", lambda: PLAIN)


# --- what is chosen ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "declared", "stored", "wanted"),
    [
        ("llama", {"torch_dtype": "float16"}, mx.float16, mx.float16),
        ("llama", {"dtype": "torch.float16"}, mx.float32, mx.float16),
        ("gemma", {"torch_dtype": "float16"}, mx.float16, mx.bfloat16),
        ("gemma3_text", {"dtype": "float16"}, mx.float16, mx.bfloat16),
        ("qwen2", {"dtype": "float16"}, mx.float16, mx.bfloat16),
        ("llama", {"torch_dtype": "bfloat16"}, mx.float32, mx.bfloat16),
        ("llama", {"dtype": "bfloat16", "torch_dtype": "float16"}, mx.float16, mx.bfloat16),
        ("llama", {}, mx.float16, mx.float16),
        ("gemma", {}, mx.float16, mx.bfloat16),
        ("llama", {}, mx.bfloat16, mx.bfloat16),
        ("llama", {"dtype": "auto"}, mx.float32, mx.float32),
        ("llama", {"torch_dtype": "float32"}, mx.float32, mx.float32),
        ("llama", {"torch_dtype": "float32"}, mx.float16, mx.bfloat16),
    ],
)
def test_the_model_decides_once(family: str, declared: Any, stored: mx.Dtype, wanted: mx.Dtype) -> None:
    raw = next(json.loads((path / "config.json").read_text()) for path in FIXTURES if expected_type(path) == family)
    raw = {key: value for key, value in raw.items() if key not in ("dtype", "torch_dtype")} | declared
    # Norms are in float32, as in every GGUF file: they say nothing about the model.
    tensors = {k: v if "norm" in k else v.astype(stored) for k, v in floats(raw).items()}
    found = assemble(raw, Arrays(tensors))
    assert found.dtype == wanted
    assert {array.dtype for _, array in loading.arrays(found.model)} == {wanted}
    assert assemble(raw, Arrays(tensors), dtype="float32").dtype == mx.float32


@by_packing
def test_packing_does_not_decide(packing: str, tmp_path: Path) -> None:
    found = PACKINGS[packing](tmp_path, None)
    # Random MLX checkpoints have float32 scales; nothing in them names a dtype.
    wanted = default(packing, found)
    assert found.dtype == wanted
    for path, array in loading.arrays(found.model):
        assert array.dtype in (wanted, mx.uint32, mx.uint8) or "router" in path, path
    caches = found.new_caches()
    found.model(Batch(mx.array([PROMPT])), caches)
    assert {array.dtype for array in caches.arrays} == {wanted}


def test_what_must_stay_exact_stays_float32() -> None:
    """A router, plain or packed, and the correction of its scores; also where the checkpoint has them in 16 bits."""
    seen = set()
    for name in ("deepseek_v3-v5", "gpt_oss-v5", "mixtral-base", "granitemoe-base", "qwen3_moe-base"):
        model = open_loaded(TESTS / "fixtures" / "families" / name).model
        for path, array in loading.arrays(model):
            exact = ".router." in path or path.endswith((".correction", ".rope.freqs"))
            seen.add(path.rsplit(".", 1)[-1] if exact else "")
            assert array.dtype in ((mx.float32,) if exact else (mx.bfloat16, mx.uint32, mx.uint8)), path
    assert {"weight", "bias", "correction"} <= seen
    stored = packed(floats(MOE), Format(4, 64))[0]
    router = assemble({**MOE, "quantization": Format(4, 64).entry}, Arrays(stored), dtype="bfloat16").model
    dtypes = {path: array.dtype for path, array in loading.arrays(router) if ".router." in path}
    assert set(dtypes.values()) == {mx.uint32, mx.float32}


def test_kernels_take_weights_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device whose kernels multiply any dtype with float32 is given what is stored."""
    monkeypatch.setattr(engines, "current", lambda: Device("kernels", PORTABLE, mx.float32))
    for name in ("gemma3_text-base", "mixtral-base"):
        found = open_loaded(TESTS / "fixtures" / "families" / name)
        assert found.dtype == mx.float32
        large = [array.dtype for path, array in loading.arrays(found.model) if array.ndim > 1]
        assert set(large) == {mx.bfloat16}


def test_a_cpu_without_kernels_computes_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """In 16 bits MLX takes longer there, and rounds as a GPU does; `dtype` asks for them all the same."""
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.cpu))
    monkeypatch.setattr(cpu, "unavailable", lambda: Unavailable("not built", None))
    without = current()
    assert without.notice is not None and without.activations is None
    assert choose(None, without, {"model_type": "llama", "dtype": "bfloat16"}, {}) == (mx.float32, mx.float32)
    assert choose("bfloat16", without, {"model_type": "llama"}, {}) == (mx.bfloat16, mx.bfloat16)


# --- what is computed -------------------------------------------------------------------------------------------------


def typical(found: mx.array, wanted: mx.array) -> float:
    """The error of the middle position, in standard deviations of the logits: a router's near ties are no error."""
    errors = mx.sqrt(mx.mean(mx.square(found - wanted), axis=-1)) / mx.std(wanted)
    return float(mx.sort(errors)[errors.size // 2])


@by_fixture
def test_every_family_in_either_dtype(path: Path) -> None:
    """In bfloat16 and float32 against transformers; then so loud that float16 overflows, against float32 elsewhere."""
    prompt, wanted = expected(path)["prompts"]["long"], mx.load(str(path / "expected.safetensors"))["logits.long"]
    with pytest.MonkeyPatch.context() as other:
        other.setattr(engines, "current", current)
        exact = loud(open_loaded(path, dtype="float32")).logits(prompt)
    narrow, wide = open_loaded(path, dtype="bfloat16"), open_loaded(path, dtype="float32")
    assert typical(narrow.logits(prompt), wanted) < 0.05
    assert typical(wide.logits(prompt), wanted) < TOLERANCE
    assert typical(loud(narrow).logits(prompt), exact) < 0.05
    assert typical(loud(wide).logits(prompt), exact) < TOLERANCE
    half = loud(open_loaded(path, dtype="float16")).logits(prompt)
    assert not bool(mx.all(mx.isfinite(half)))  # or it was not loud enough to show anything


@by_packing
def test_every_packing_in_either_dtype(packing: str, tmp_path: Path) -> None:
    narrow, wide = PACKINGS[packing](tmp_path, "bfloat16"), PACKINGS[packing](tmp_path, "float32")
    found = PACKINGS[packing](tmp_path, None)
    half = default(packing, found) == mx.float16
    named = PACKINGS[packing](tmp_path, "float16") if half else narrow
    assert mx.array_equal(found.logits(PROMPT), named.logits(PROMPT))
    assert typical(named.logits(PROMPT), wide.logits(PROMPT)) < (0.0125 if half else 0.1)
    assert typical(narrow.logits(PROMPT), wide.logits(PROMPT)) < 0.1
    assert typical(loud(narrow).logits(PROMPT), loud(wide).logits(PROMPT)) < 0.05


@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q4_0"])
def test_gemma_in_a_gguf_file(kind: str, tmp_path: Path) -> None:
    """Float16 in the file, and activations beyond its range: as Gemma 3's are, whose answer was NaN."""
    path = TESTS / "fixtures" / "families" / "gemma3_text-base"
    raw, weights = json.loads((path / "config.json").read_text()), gguf_writer.weights_of(path)
    file = gguf_writer.write_model(tmp_path / "m.gguf", raw, weights, lambda name: gguf_writer.Type[kind])
    found = loud(open_loaded(file))
    assert found.dtype == mx.bfloat16
    assert typical(found.logits(PROMPT), loud(open_loaded(file, dtype="float32")).logits(PROMPT)) < 0.05


def test_capped_scores_stay_in_range() -> None:
    """Products of queries and keys leave float16 before they are scaled; scaled first, they do not."""
    path = TESTS / "fixtures" / "families" / "gemma2-base"
    # The fixture's scalar is 8. With queries and keys 128 times as large, 8 * 128**4 gives the same scores.
    raw = {**json.loads((path / "config.json").read_text()), "query_pre_attn_scalar": 2**31}
    tensors = dict(mx.load(str(path / "model.safetensors")))
    for name in tensors:
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            tensors[name] = tensors[name] * 128
    found = {dtype: assemble(raw, Arrays(tensors), dtype=dtype).logits(PROMPT) for dtype in ("float16", "float32")}
    assert error(found["float16"], found["float32"]) < 0.02


# --- what a token costs -----------------------------------------------------------------------------------------------


def unasked(steps: list[Step], *, asks: bool, hidden: int) -> list[Step]:
    """The float32 arrays of a step, without what is stored so and what code asks for: scores, and a router's input."""
    wide = [step for step in steps if step.dtype == mx.float32 and not step.stored]
    if not asks:
        return wide
    reshaped = ("AsType", "Flatten", "Reshape")
    return [step for step in wide if np.prod(step.shape) >= hidden and step.name not in reshaped]


def check(engine: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = decode_step(engine, monkeypatch)
    assert len(steps) > 20
    # Routers (of streams, too), soft-capped scores and ALiBi's biases are computed in float32; the biases once for all.
    alibi = getattr(engine.model, "alibi", None) is not None
    assert [step for step in steps if step.casts_a_matrix and not (alibi and step.shape[-1] == KEYS)] == []
    # Nor are a recurrence and a short convolution held to 16 bits, and they are most of a layer that has them.
    if any(
        isinstance(memory, State)
        for index in range(engine.config.num_hidden_layers)
        for memory in engine.config.memory(index)
    ):
        return
    keys = ("num_experts_per_tok", "attn_logit_softcapping", "altup_num_inputs")
    asks = alibi or any(getattr(engine.config, key, None) for key in keys)
    model: Any = engine.model
    hidden = model.embed_tokens(mx.array(0)).size
    assert unasked(steps, asks=asks, hidden=hidden) == []


@by_fixture
def test_no_token_casts_a_matrix(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "current", lambda: Device("mlx", PORTABLE))
    check(open_loaded(path, dtype="bfloat16"), monkeypatch)


@by_packing
def test_no_token_casts_a_packed_matrix(packing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "current", lambda: Device("mlx", PORTABLE))
    check(PACKINGS[packing](tmp_path, None), monkeypatch)


def test_the_walk_finds_what_it_looks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model whose dtypes are mixed has casts of matrices in its step, and float32 activations."""
    monkeypatch.setattr(engines, "current", lambda: Device("mixed", PORTABLE, mx.float32))
    for name in ("llama/llama-gqa", "families/mixtral-base", "families/gemma3_text-base"):
        steps = decode_step(open_loaded(TESTS / "fixtures" / name), monkeypatch)
        assert [step for step in steps if step.casts_a_matrix]
        assert unasked(steps, asks=True, hidden=32)
