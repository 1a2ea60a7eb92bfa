"""Adapters against what PEFT and mlx-lm computed with them, and what is refused.

The references are made by scripts/fixtures/make_adapters and make_mlx_adapters.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf_writer
import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from places import TESTS
from plain_path import decode_step
from references import routed
from sources import Arrays

import runner
from runner.adapters import AdapterFiles, fit, open_adapters
from runner.adapters.config import AdapterConfig
from runner.checkpoint.model_files import open_files
from runner.convert.convert import convert, merged
from runner.convert.quantize import quantizer
from runner.engine.loaded import Loaded, assemble, open_loaded
from runner.engine.prefill import new_caches, prefill
from runner.engine.prompt_cache import PromptCache
from runner.errors import CheckpointError, ConfigError, UsageError, WeightsError
from runner.families import find
from runner.nn.batch import Batch
from runner.nn.linear import Linear
from runner.ops.device import CPU_WITHOUT_KERNELS, Device
from runner.ops.table import PORTABLE
from runner.weights import loading

CASES = sorted(path.parent for path in TESTS.glob("fixtures/adapters/*/expected.json"))
TOLERANCE = 2e-4
"""Largest logit error allowed, as a fraction of the logits' standard deviation."""

QUANTISED = 2e-3
"""Error allowed for quantized weights: CPU kernels multiply them with activations rounded to integers."""

QV = TESTS / "fixtures" / "adapters" / "llama-qv"
PROMPT = [1, *range(30, 60)]

by_case = pytest.mark.parametrize("case", CASES, ids=lambda path: path.name)


def expected(case: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((case / "expected.json").read_text())
    return result


def adapters(case: Path, **weights: float) -> list[AdapterFiles]:
    given: dict[str, float] = expected(case)["adapters"] | weights
    return [AdapterFiles.open(case / name, name, weight) for name, weight in given.items()]


def base(case: Path) -> Path:
    return TESTS / str(expected(case)["base"])


def error(found: mx.array, wanted: mx.array) -> float:
    return float(mx.max(mx.abs(found - wanted)) / mx.std(wanted))


def tolerance(case: Path) -> float:
    return QUANTISED if "-mlx-" in case.name or "mxfp4" in case.name else TOLERANCE


def check_logits(case: Path, engine: Loaded, allowed: float | None = None) -> None:
    wanted = mx.load(str(case / "expected.safetensors"))
    for name, prompt in expected(case)["prompts"].items():
        assert error(engine.logits(prompt), wanted[f"logits.{name}"]) < (allowed or tolerance(case))


@by_case
def test_logits(case: Path) -> None:
    check_logits(case, open_loaded(base(case), dtype="float32", adapters=adapters(case)))


@by_case
def test_greedy_tokens(case: Path) -> None:
    engine = open_loaded(base(case), dtype="float32", adapters=adapters(case))
    data = expected(case)
    for name, prompt in data["prompts"].items():
        caches = new_caches(engine.config)
        logits = prefill(engine.model, prompt, caches)
        tokens = []
        for _ in range(24):
            token = int(mx.argmax(logits))
            tokens.append(token)
            hidden = engine.model(Batch(mx.array([[token]]), caches[0].offset), caches)
            logits = engine.model.logits(hidden)[0, -1]
        assert tokens == data["greedy"][name]


@by_case
def test_merged_is_applied(case: Path) -> None:
    files = open_files(base(case))
    added = fit(files.config, find(files.config), Float32(files.source), adapters(case)).merged()
    # MXFP4 scales are never float32: merging rounds the sum to bfloat16.
    check_logits(case, assemble(added.raw, added.source, dtype="float32"), 0.03 if "mxfp4" in case.name else None)
    assert set(added.source.headers) >= set(name for name in files.source.headers if name.endswith("bias"))


@pytest.mark.parametrize(
    ("number", "message"),
    [(float("nan"), "with its adapters has a number that is not finite"), (1e38, "too large for float16; bfloat16 or")],
)
@pytest.mark.parametrize("packing", [None, "mxfp4"])
def test_sums_that_the_base_cannot_hold_are_refused(
    number: float, message: str, packing: str | None, tmp_path: Path
) -> None:
    """Written, they were infinities and NaN; packed, they looked like any model."""

    def hurt(arrays: Arrays) -> None:
        arrays[f"{Q0}.lora_B.weight"] *= number

    path = damaged(tmp_path / "adapter", tensors=hurt)
    convert(open_files(base(QV)), tmp_path / "half", dtype="float16")
    files = merged(open_files(tmp_path / "half"), [AdapterFiles.open(path, "a")])
    with pytest.raises(CheckpointError, match=message):
        convert(files, tmp_path / "out", quantizer=None if packing is None else quantizer(packing))
    assert not (tmp_path / "out").exists()


@by_case
def test_merged_tensors_are_as_their_headers_say(case: Path) -> None:
    files = open_files(base(case))
    source = fit(files.config, find(files.config), files.source, adapters(case)).merged().source
    changed = 0
    for name, header in source.headers.items():
        array = source.read(name)
        assert array.shape == header.shape and array.nbytes == header.nbytes
        old = files.source.headers.get(name)
        if old is None or old.shape != header.shape or not mx.array_equal(array, files.source.read(name)):
            changed += 1
            assert header.dtype in ("F32", "BF16", "F16")
    assert changed


class Float32:
    """A source whose quantized matrices have float32 scales, so that merging them rounds nothing."""

    def __init__(self, source: Any) -> None:
        self.source = source
        self.headers = {name: Wide(header) for name, header in source.headers.items()}

    def read(self, name: str) -> mx.array:
        array = self.source.read(name)
        return array.astype(mx.float32) if self.headers[name].dtype == "F32" else array


class Wide:
    def __init__(self, header: Any) -> None:
        wide = header.dtype in ("F32", "F16", "BF16")
        self.dtype = "F32" if wide else header.dtype
        self.shape = header.shape
        self.nbytes = header.nbytes


@by_case
def test_weight_zero_is_the_base(case: Path) -> None:
    names = expected(case)["adapters"]
    prompt = expected(case)["prompts"]["short"]
    engine = open_loaded(base(case), adapters=adapters(case, **dict.fromkeys(names, 0.0)))
    assert mx.array_equal(engine.logits(prompt), open_loaded(base(case)).logits(prompt))


@by_case
def test_stored_dtype_runs_close_to_float32(case: Path) -> None:
    prompt = expected(case)["prompts"]["long"]
    stored = open_loaded(base(case), adapters=adapters(case)).logits(prompt)
    exact = open_loaded(base(case), dtype="float32", adapters=adapters(case)).logits(prompt)
    most = 2 if routed(json.loads((base(case) / "config.json").read_text())) else 1  # rounding picks other experts
    assert error(stored, exact) < most  # where bfloat16 is what the device computes in
    half = open_loaded(base(case), dtype="bfloat16", adapters=adapters(case))
    assert error(half.logits(prompt), exact) < most
    assert half.model(Batch(mx.array([prompt])), half.new_caches()).dtype == mx.bfloat16


@by_case
def test_weights_change_after_loading(case: Path) -> None:
    engine = open_loaded(base(case), dtype="float32", adapters=adapters(case))
    assert engine.adapters is not None
    names = expected(case)["adapters"]
    prompt = expected(case)["prompts"]["short"]
    if engine.adapters.fixed:
        with pytest.raises(UsageError, match="whole tensors"):
            engine.adapters.set_weights(dict.fromkeys(names, 0))
        return
    with_adapters = engine.logits(prompt)
    engine.adapters.set_weights(dict.fromkeys(names, 0))
    assert mx.array_equal(engine.logits(prompt), open_loaded(base(case), dtype="float32").logits(prompt))
    engine.adapters.set_weights(names)
    assert mx.array_equal(engine.logits(prompt), with_adapters)


@by_case
def test_the_base_is_shared_untouched(case: Path) -> None:
    engine = open_loaded(base(case), adapters=adapters(case))
    plain = open_loaded(base(case))
    saved = dict(loading.tensors(engine.model, engine.layout))
    changed = 0
    for name, array in loading.tensors(plain.model, plain.layout):
        if name in saved:
            changed += saved[name].shape != array.shape or not bool(mx.array_equal(saved[name], array))
    assert changed == 0 or (engine.adapters is not None and engine.adapters.fixed)


# --- other devices and other files of the same base -------------------------------------------------------------------

SOME = [
    "llama-patterns", "llama-dora-bias", "llama-embeddings", "llama-mlx-4bit-dora", "llama-mlx-tied-tokens", "mixtral",
    "gpt_oss-mxfp4", "gpt2", "gpt_neox-dora",
]  # fmt: skip
TABLES = {CPU_WITHOUT_KERNELS.name: CPU_WITHOUT_KERNELS}
if mx.default_device() == mx.Device(
    mx.cpu
):  # on an NVIDIA GPU some of MLX's own products are wrong: see runner.ops.device
    TABLES[PORTABLE.name] = PORTABLE


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("name", SOME)
def test_on_every_table_of_ops(name: str, table: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runner.engine.loaded.current", lambda: Device(table, TABLES[table]))
    case = TESTS / "fixtures" / "adapters" / name
    engine = open_loaded(base(case), dtype="float32", adapters=adapters(case))
    assert engine.device.ops is TABLES[table]
    check_logits(case, engine)


@by_case
def test_no_token_casts_a_matrix(case: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16 neither a factor nor the base's matrix is brought to another dtype, routers' factors included."""
    monkeypatch.setattr("runner.engine.loaded.current", lambda: Device("mlx", PORTABLE))
    engine = open_loaded(base(case), dtype="bfloat16", adapters=adapters(case))
    assert [step for step in decode_step(engine, monkeypatch) if step.casts_a_matrix] == []


@pytest.mark.parametrize("kind", [gguf_writer.Type.F32, gguf_writer.Type.Q8_0], ids=lambda kind: kind.name)
def test_on_a_gguf_file(kind: Any, tmp_path: Path) -> None:
    """A GGUF file permutes queries and keys; reading undoes that, and adapters must fit the result."""
    raw = json.loads((base(QV) / "config.json").read_text())
    weights = gguf_writer.weights_of(base(QV))
    path = gguf_writer.write_model(tmp_path / "m.gguf", raw, weights, lambda name: kind)
    engine = open_loaded(path, dtype="float32", adapters=adapters(QV))
    if kind == gguf_writer.Type.F32:
        check_logits(QV, engine)
    files = open_files(path)
    added = fit(files.config, find(files.config), Float32(files.source), adapters(QV)).merged()
    wanted = assemble(added.raw, added.source, dtype="float32").logits(PROMPT)
    assert error(engine.logits(PROMPT), wanted) < QUANTISED
    assert error(open_loaded(path, dtype="float32").logits(PROMPT), wanted) > 0.5


def as_mlx_lm_writes(files: Any) -> Arrays:
    """Tensors as mlx-lm writes them: the experts of a layer in one `[E, out, in]`, with gate and up apart."""
    arrays = {name: files.source.read(name) for name in files.source.headers}
    for layer in range(files.config["num_hidden_layers"]):
        above = f"model.layers.{layer}.block_sparse_moe"
        for old, new in (("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj")):
            each = [arrays.pop(f"{above}.experts.{i}.{old}.weight") for i in range(4)]
            arrays[f"{above}.switch_mlp.{new}.weight"] = mx.stack(each)
    return Arrays(arrays)


def test_parameters_of_experts_that_mlx_lm_stacked() -> None:
    case = TESTS / "fixtures" / "adapters" / "mixtral-parameters"
    files = open_files(base(case))
    source = as_mlx_lm_writes(files)
    check_logits(case, assemble(files.config, source, dtype="float32", adapters=adapters(case)))
    merged = fit(files.config, find(files.config), Float32(source), adapters(case)).merged()
    check_logits(case, assemble(merged.raw, merged.source, dtype="float32"))
    with pytest.raises(WeightsError, match=r"unused: .*experts\.\*\.w1\.lora_A\.weight"):
        fit(files.config, find(files.config), source, adapters(TESTS / "fixtures" / "adapters" / "mixtral"))


def test_rows_that_mlx_lm_put_in_another_order() -> None:
    """gpt-oss: rows of gate and up alternate in transformers, and so in its adapters, but not in mlx-lm's files."""
    case = TESTS / "fixtures" / "adapters" / "gpt_oss"
    files = open_files(base(case))
    arrays = {name: files.source.read(name) for name in files.source.headers}
    for layer in range(files.config["num_hidden_layers"]):
        above = f"model.layers.{layer}.mlp.experts"
        matrix, bias = arrays.pop(f"{above}.gate_up_proj").swapaxes(-1, -2), arrays.pop(f"{above}.gate_up_proj_bias")
        for first, name in enumerate(("gate_proj", "up_proj")):
            arrays[f"{above}.{name}.weight"] = mx.contiguous(matrix[:, first::2])
            arrays[f"{above}.{name}.bias"] = mx.contiguous(bias[:, first::2])
        arrays[f"{above}.down_proj.weight"] = mx.contiguous(arrays.pop(f"{above}.down_proj").swapaxes(-1, -2))
        arrays[f"{above}.down_proj.bias"] = arrays.pop(f"{above}.down_proj_bias")
    check_logits(case, assemble(files.config, Arrays(arrays), dtype="float32", adapters=adapters(case)))
    merged = fit(files.config, find(files.config), Float32(Arrays(arrays)), adapters(case)).merged()
    check_logits(case, assemble(merged.raw, merged.source, dtype="float32"))


# --- several at once --------------------------------------------------------------------------------------------------


TWO = TESTS / "fixtures" / "adapters" / "llama-two"
DORAS = TESTS / "fixtures" / "adapters" / "llama-two-doras"
DORA = TESTS / "fixtures" / "adapters" / "llama-dora"


def changed(layer: Linear) -> mx.array:
    """A layer's matrix with what adapters do to it."""
    matrix = layer.matrix()
    for update in layer.updates():
        matrix = matrix + (update.up * update.scale) @ update.down
        matrix = matrix if update.gain is None else update.gain[:, None] * matrix
    return matrix


def test_adapters_add_up() -> None:
    """The matrix of a layer with two adapters is the base's plus what each adds alone."""
    alone, matrices = {"first": (1, 0), "second": (0, 1), "both": (1, 1), "none": (0, 0)}, {}
    engine = open_loaded(base(TWO), dtype="float32", adapters=adapters(TWO))
    assert engine.adapters is not None
    for name, (first, second) in alone.items():
        engine.adapters.set_weights({"first": first, "second": second})
        engine.use_adapters((1, engine.adapter_weights))
        matrices[name] = changed(engine.model.layers[0].self_attn.qkv_proj)
    total = matrices["first"] + matrices["second"] - matrices["none"]
    assert mx.allclose(matrices["both"], total, atol=1e-6)
    assert not mx.allclose(matrices["both"], matrices["first"], atol=1e-2)


def test_what_adapters_do_to_a_matrix_is_what_its_layer_multiplies_with() -> None:
    for case in (TWO, DORA, TESTS / "fixtures" / "adapters" / "llama-patterns"):
        layer = open_loaded(base(case), dtype="float32", adapters=adapters(case)).model.layers[1].self_attn.qkv_proj
        x = mx.random.normal((3, layer.matrix().shape[1]))
        assert mx.allclose(layer(x), x @ changed(layer).T, atol=1e-4)


def test_a_dora_has_weight_0_or_1_and_its_rows_for_itself() -> None:
    with pytest.raises(UsageError, match="adapter adapter is a DoRA: its weight can only be 0 or 1"):
        open_loaded(base(DORA), adapters=adapters(DORA, adapter=0.5))
    both = [*adapters(DORA), *adapters(QV)]
    both = [AdapterFiles(name, 1.0, item.config, item.source) for name, item in zip("ab", both, strict=True)]
    with pytest.raises(UsageError, match=r"adapters a and b both change model.layers.0.self_attn.q_proj"):
        open_loaded(base(DORA), adapters=both)
    one_off = [both[0], AdapterFiles("b", 0.0, both[1].config, both[1].source)]
    engine = open_loaded(base(DORA), dtype="float32", adapters=one_off)
    check_logits(DORA, engine)
    assert engine.adapters is not None
    with pytest.raises(UsageError, match="both"):
        engine.adapters.set_weights({"b": 2})
    check_logits(DORA, engine)  # a refused change changes nothing
    engine.adapters.set_weights({"a": 0, "b": 1})
    check_logits(QV, engine)


def test_names_and_weights_that_do_not_exist_are_refused() -> None:
    engine = open_loaded(base(TWO), adapters=adapters(TWO))
    assert engine.adapters is not None
    with pytest.raises(UsageError, match="no adapter is called 'third'; there are first, second"):
        engine.adapters.set_weights({"third": 1})
    for weight in (float("nan"), "1", True):
        with pytest.raises(UsageError, match="must be a finite number"):
            engine.adapters.set_weights({"first": weight})


def test_two_adapters_cannot_bring_the_same_tensor() -> None:
    case = TESTS / "fixtures" / "adapters" / "llama-saved"
    one = adapters(case)[0]
    with pytest.raises(UsageError, match=r"adapters adapter and again both replace lm_head.weight"):
        open_loaded(base(case), adapters=[one, AdapterFiles("again", 1.0, one.config, one.source)])
    with pytest.raises(UsageError, match="whole: its weight can only be 0 or 1"):
        open_loaded(base(case), adapters=adapters(case, adapter=0.5))


# --- the front doors --------------------------------------------------------------------------------------------------


def test_a_language_model_with_adapters() -> None:
    """A change of weights also counts within a conversation, whose cache was computed with other weights."""
    plain, prompt = runner.load(base(TWO), dtype="float32"), PROMPT
    lm = runner.load(base(TWO), dtype="float32", adapters=[f"{TWO}/first=0.75", f"{TWO}/second=-0.5"])
    assert lm.adapters == {"first": 0.75, "second": -0.5} and plain.adapters == {}
    assert lm.engine.nbytes > plain.engine.nbytes

    def answer(model: runner.LanguageModel, kept: PromptCache | None = None) -> tuple[list[int], int]:
        chunks = list(model.stream(prompt, max_tokens=8, temperature=0, prompt_cache=kept))
        assert chunks[-1].timings is not None
        return [chunk.token for chunk in chunks], chunks[-1].timings.cached_tokens

    kept = lm.prompt_cache()
    adapted, base_tokens = answer(lm)[0], answer(plain)[0]
    assert adapted != base_tokens
    assert answer(lm, kept) == (adapted, 0) and answer(lm, kept) == (adapted, len(prompt) - 1)
    lm.set_adapters({"first": 0, "second": 0})
    assert answer(lm, kept) == (base_tokens, 0)
    lm.set_adapters({"first": 0.75})
    lm.set_adapters({"second": -0.5})
    assert answer(lm, kept) == (adapted, 0)
    with pytest.raises(UsageError, match="loaded without adapters"):
        plain.set_adapters({"first": 1})


def test_the_command_line() -> None:
    def run(*options: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "runner", "generate", str(base(TWO)), "abc", "--raw", *options]
        command += ["--temperature", "0", "--max-tokens", "8", "--dtype", "float32"]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)

    lm = runner.load(base(TWO), dtype="float32", adapters=[f"{TWO}/first", f"{TWO}/second=0.5"])
    wanted = lm.generate("abc", temperature=0, max_tokens=8).text
    assert run("--adapter", f"{TWO}/first", "--adapter", f"{TWO}/second=0.5").stdout.rstrip("\n") == wanted.rstrip("\n")
    assert run().stdout.rstrip("\n") != wanted.rstrip("\n")
    failed = run("--adapter", f"{TWO}/first=x")
    assert failed.returncode == 2 and "expected PATH or PATH=WEIGHT" in failed.stderr


# --- the argument of `load` -------------------------------------------------------------------------------------------


def test_adapters_by_path_weight_and_name(tmp_path: Path) -> None:
    for name in ("a/style", "b/style", "odd=1"):
        shutil.copytree(QV / "adapter", tmp_path / name)

    def opened(given: Any) -> dict[str, float]:
        return {item.name: item.weight for item in open_adapters(given, Path)}

    style, other, odd = f"{tmp_path}/a/style", f"{tmp_path}/b/style", f"{tmp_path}/odd=1"
    assert opened([style, f"{odd}=0.5"]) == {"style": 1.0, "odd=1": 0.5}
    assert opened([odd]) == {"odd=1": 1.0}
    assert opened({style: 0.25, odd: -1}) == {"style": 0.25, "odd=1": -1.0}
    assert opened([f"{style}/=0.5", other]) == {f"{style}/": 0.5, other: 1.0}
    (tmp_path / "link").symlink_to(style)
    for wrong, message in (
        ([style, f"{style}/."], f"the adapter {style}/. is given twice: {style} is the same directory"),
        ([f"{style}/", f"{style}=0.5"], "is given twice"),
        ({style: 1, f"{tmp_path}/b/../a/style": 2}, "is given twice"),
        ([f"{tmp_path}/link", style], "is given twice"),
        ([f"{style}=much"], "expected PATH or PATH=WEIGHT, and 'much' is not a number"),
        ([f"{style}=inf"], "must be a finite number"),
        ([style, f"{style}=2"], "is given twice"),
        (style, "not the string"),
        ({style: "1"}, "must be a finite number"),
    ):
        with pytest.raises(UsageError, match=message):
            opened(wrong)


# --- what is refused --------------------------------------------------------------------------------------------------


def damaged(tmp_path: Path, case: Path = QV, tensors: Any = None, **config: Any) -> Path:
    """A copy of an adapter with other keys in its config, or with its tensors passed through a function."""
    path = tmp_path / "adapter"
    shutil.copytree(case / "adapter", path)
    raw = json.loads((path / "adapter_config.json").read_text()) | config
    (path / "adapter_config.json").write_text(json.dumps(raw))
    if tensors is not None:
        arrays = dict(mx.load(str(path / "adapter_model.safetensors")))
        tensors(arrays)
        mx.save_safetensors(str(path / "adapter_model.safetensors"), arrays)
    return path


Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type 'LOHA' is not supported, only 'LORA' is"),
        ({"task_type": "SEQ_CLS"}, "task_type 'SEQ_CLS' is not supported"),
        ({"init_lora_weights": "pissa"}, "'pissa' changed the base before training"),
        ({"init_lora_weights": "pissa_niter_4"}, "changed the base"),
        ({"init_lora_weights": "olora"}, "changed the base"),
        ({"init_lora_weights": "loftq"}, "changed the base"),
        ({"init_lora_weights": "new"}, "'new' is not understood"),
        ({"layer_replication": [[0, 2]]}, "'layer_replication' = .* could change the numbers"),
        ({"lora_bias": True}, "'lora_bias' = True could change"),
        ({"megatron_config": {"a": 1}}, "'megatron_config'"),
        ({"alora_invocation_tokens": [1]}, "'alora_invocation_tokens'"),
        ({"target_parameters": 3}, "target_parameters must be a list of names"),
        ({"use_qalora": True}, "'use_qalora'"),
        ({"unheard_of": 0.5}, "'unheard_of' = 0.5 could change the numbers"),
        ({"r": 0}, "r must be an integer from 1"),
        ({"r": True}, "r must be an integer"),
        ({"lora_alpha": "8"}, "lora_alpha must be a finite number"),
        ({"use_dora": 1}, "use_dora must be true or false"),
        ({"bias": "some"}, "bias must be none, all or lora_only"),
        ({"rank_pattern": {"q_proj": -1}}, "rank_pattern must be an integer from 1"),
        ({"alpha_pattern": {"(": 1}}, "alpha_pattern must be a regular expression"),
        ({"target_modules": "(?P<x>q)_proj"}, "target_modules must not use"),
        ({"target_modules": "(((q*)*)*)*"}, "target_modules must not have loops within 3 groups"),
        ({"target_modules": [1]}, "target_modules must be a list of names"),
        ({"target_modules": "q", "layers_to_transform": [1]}, "layers_to_transform needs target_modules as a list"),
        ({"lora_parameters": {"rank": 8}}, "'lora_parameters' = .* could change the numbers"),
    ],
)
def test_configs_that_are_refused(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        AdapterFiles.open(damaged(tmp_path, **config), "a")
    assert "adapter_config.json" in str(caught.value)


ODD = [None, True, False, 0, 1, -1, 8, 1 << 40, 0.5, 1e300, "", "q_proj", "all", "lora_only", ".*", "("]
odd = st.sampled_from(ODD)
values = odd | st.lists(odd, max_size=3) | st.dictionaries(st.sampled_from(["", "a", "q_.*", ")"]), odd, max_size=3)
KEYS = [
    *AdapterConfig.__dataclass_fields__,
    "peft_type",
    "task_type",
    "init_lora_weights",
    "layer_replication",
    "other",
]


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from(KEYS), values, max_size=6))
def test_any_config_is_read_or_refused(raw: dict[str, Any]) -> None:
    with contextlib.suppress(ConfigError):
        config = AdapterConfig.from_dict({"peft_type": "LORA", **raw})
        assert config.scale(["model.layers.0.self_attn.q_proj"]) is not None
        config.targets(["model.layers.0.self_attn.q_proj"], linear=True)


def test_patterns_that_would_never_end_name_key_and_file(tmp_path: Path) -> None:
    path = damaged(tmp_path, rank_pattern={f"({'(.*.*)*' * 495}x)*{index}": 2 for index in range(9)})
    item = AdapterFiles.open(path, "a")
    item.config.rank_pattern.effort.steps = 100_000  # type: ignore[union-attr]  # as if the model had more matrices
    with pytest.raises(ConfigError, match=r"adapter_config\.json: rank_pattern takes more than 4000000 steps"):
        open_loaded(base(QV), adapters=[item])


def test_names_that_no_model_has_are_refused(tmp_path: Path) -> None:
    """Each is compared with every tensor, word by word: a file of a megabyte took minutes."""
    long = "model." * 100 + "q_proj"
    with pytest.raises(ConfigError, match="'modules_to_save' has a name of 606 letters"):
        AdapterFiles.open(damaged(tmp_path, modules_to_save=["x", long]), "a")
    with pytest.raises(ConfigError, match="'trainable_token_indices' has a name of 606 letters"):
        AdapterFiles.open(damaged(tmp_path / "tokens", trainable_token_indices={long: [1]}), "a")
    path = damaged(tmp_path / "tensor", tensors=lambda arrays: arrays.update({long: mx.zeros((1,))}))
    with pytest.raises(CheckpointError, match="a tensor's name has 606 letters"):
        AdapterFiles.open(path, "a")


@pytest.mark.parametrize("kind", [mx.int8, mx.float32])
def test_nothing_more_is_looked_for_where_a_thousand_tensors_have_no_place(kind: Any, tmp_path: Path) -> None:
    def many(arrays: Arrays) -> None:
        arrays.update({f"unknown.{index}.weight": mx.zeros((1,), kind) for index in range(3000)})

    item = AdapterFiles.open(damaged(tmp_path, tensors=many), "a")
    with pytest.raises(WeightsError, match=r"no more was looked for \(1001 problems\)"):
        open_loaded(base(QV), adapters=[item])


def test_nothing_more_is_looked_for_where_a_thousand_factors_do_not_fit(tmp_path: Path) -> None:
    """A module has any number of spellings; those whose factors have a wrong shape are kept by no site."""
    prefixes = ("model.", "transformer.", "language_model.")
    spellings = ["".join(words) for words in itertools.product(prefixes, repeat=7)]

    def many(arrays: Arrays) -> None:
        for start in spellings:
            arrays[f"base_model.model.{start}layers.0.self_attn.q_proj.lora_A.weight"] = mx.zeros((1, 1))

    item = AdapterFiles.open(damaged(tmp_path, tensors=many), "a")
    with pytest.raises(WeightsError, match=r"no more was looked for \(100[12] problems\)"):
        open_loaded(base(QV), adapters=[item])


def test_every_bad_key_is_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"LOHA.*lora_bias.*r must"):
        AdapterFiles.open(damaged(tmp_path, peft_type="LOHA", lora_bias=True, r=0), "a")


def drop(*names: str) -> Any:
    return lambda arrays: [arrays.pop(name) for name in names]


def put(**tensors: mx.array) -> Any:
    return lambda arrays: arrays.update({name.replace("__", "."): value for name, value in tensors.items()})


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        (drop(f"{Q0}.lora_B.weight"), {}, rf"missing: {Q0}.lora_B.weight: expected \[\d+, 4\]"),
        (drop(f"{Q0}.lora_A.weight", f"{Q0}.lora_B.weight"), {}, rf"missing: {Q0}.lora_A.weight"),
        (None, {"target_modules": ["q_proj"]}, "layers.0.self_attn.v_proj has an adapter, but .* does not target it"),
        (
            None,
            {"target_modules": ["q_proj", "v_proj", "up_proj"]},
            r"missing: .*mlp.up_proj.lora_A.weight \(2 tensors\)",
        ),
        (None, {"target_modules": "all-linear"}, "missing: .*down_proj"),
        (None, {"r": 8}, r"wrong shape: .*expected \[8, \d+\], found \[4, \d+\]"),
        (None, {"use_dora": True}, r"missing: .*lora_magnitude_vector"),
        (
            None,
            {"modules_to_save": ["lm_head"]},
            "modules_to_save names 'lm_head', but the adapter has none of its",
        ),
        (put(other__weight=mx.zeros((2, 2))), {}, r"unused: other.weight: \[2, 2\] is not part of this model"),
        (put(**{f"{Q0}.lora_C.weight": mx.zeros((2,))}), {}, "unused: .*lora_C.weight"),
        (put(**{f"{Q0}.lora_B.bias": mx.zeros((2,))}), {}, "unused: .*lora_B.bias"),
        (
            put(**{f"{Q0}.lora_A.weight": mx.zeros((4, 32), mx.int32)}),
            {},
            "wrong dtype: .*lora_A.weight: expected BF16",
        ),
        (
            put(base_model__model__model__norm__weight=mx.zeros((3,))),
            {"modules_to_save": ["norm"]},
            r"wrong shape: base_model.model.model.norm.weight: expected \[\d+\], found \[3\]",
        ),
        (put(base_model__model__model__norm__weight=mx.zeros((32,))), {}, "unused: base_model.model.model.norm.weight"),
        (
            put(base_model__model__lm_head__weight=mx.zeros((340, 32))),
            {"modules_to_save": ["lm_head"]},
            r"wrong shape: base_model.model.lm_head.weight: expected \[336, \d+\], found \[340, 32\]",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(tmp_path: Path, tensors: Any, config: dict[str, Any], message: str) -> None:
    path = damaged(tmp_path, tensors=tensors, **config)
    with pytest.raises(WeightsError, match=message) as caught:
        open_loaded(base(QV), adapters=[AdapterFiles.open(path, "a")])
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("name", [Q0.replace("model.model.model.", "model.model."), f"{Q0}.default"])
def test_two_names_of_one_matrix(tmp_path: Path, name: str) -> None:
    def again(arrays: dict[str, mx.array]) -> None:
        for part in ("A", "B"):
            copy = f"{Q0}.lora_{part}.default.weight" if "default" in name else f"{name}.lora_{part}.weight"
            arrays[copy] = arrays[f"{Q0}.lora_{part}.weight"]

    with pytest.raises(WeightsError, match="is given twice, under two names"):
        open_loaded(base(QV), adapters=[AdapterFiles.open(damaged(tmp_path, tensors=again), "a")])


def test_biases_that_were_trained_must_be_there(tmp_path: Path) -> None:
    case, bias = (
        TESTS / "fixtures" / "adapters" / "llama-biases-lora-only",
        "model.layers.0.mlp.down_proj.base_layer.bias",
    )
    path = damaged(tmp_path, case, drop(f"base_model.model.{bias}"))
    with pytest.raises(WeightsError, match=r"missing: base_model.model.model.layers.0.mlp.down_proj.bias: expected"):
        open_loaded(base(case), adapters=[AdapterFiles.open(path, "a")])
    shutil.rmtree(path)
    path = damaged(tmp_path, case, bias="all")
    with pytest.raises(WeightsError, match=r"missing: .*\(2 tensors\)"):
        open_loaded(base(case), adapters=[AdapterFiles.open(path, "a")])
    shutil.rmtree(path)
    path = damaged(tmp_path, case, bias="none")
    with pytest.raises(WeightsError, match=r"unused: .*down_proj.base_layer.bias \(2 tensors\)"):
        open_loaded(base(case), adapters=[AdapterFiles.open(path, "a")])


@pytest.mark.parametrize("indices", [[3, 100, 336], [3, 3, 7]])
def test_tokens_outside_the_vocabulary_or_twice(tmp_path: Path, indices: list[int]) -> None:
    case = TESTS / "fixtures" / "adapters" / "llama-tokens"
    path = damaged(tmp_path, case, trainable_token_indices=indices)
    with pytest.raises(WeightsError, match="expected distinct token ids below 336"):
        open_loaded(base(case), adapters=[AdapterFiles.open(path, "a")])


def test_directories_that_are_no_adapters(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such directory"):
        AdapterFiles.open(tmp_path / "none", "a")
    with pytest.raises(CheckpointError, match=r"no adapter_config\.json"):
        AdapterFiles.open(tmp_path, "a")
    path = damaged(tmp_path)
    (path / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no adapter_model\.safetensors"):
        AdapterFiles.open(path, "a")
    (path / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(CheckpointError, match=r"only adapter_model\.bin, a pickle"):
        AdapterFiles.open(path, "a")
    (path / "adapter_model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors"):
        AdapterFiles.open(path, "a")


@pytest.mark.parametrize("case", [QV, QV.with_name("mlxlm-qv")], ids=lambda case: case.name)
def test_links_may_lead_within_an_adapter_but_not_out(tmp_path: Path, case: Path) -> None:
    path = tmp_path / "adapter"
    shutil.copytree(case / "adapter", path)
    for file in sorted(path.iterdir()):
        moved = file.rename(path / f"moved-{file.name}")
        file.symlink_to(moved.name)
        AdapterFiles.open(path, "a")
        outside = moved.rename(tmp_path / file.name)
        file.unlink()
        file.symlink_to(outside)
        with pytest.raises(CheckpointError, match=rf"{file.name}: links to .*, outside the model's directory"):
            AdapterFiles.open(path, "a")
        file.unlink()
        outside.rename(file)


def test_no_tensor_is_read_before_all_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    item = AdapterFiles.open(damaged(tmp_path, r=8), "a")

    def fail(*_: object) -> mx.array:
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(type(item.source), "read", fail)
    with pytest.raises(WeightsError):
        open_loaded(base(QV), adapters=[item])


@by_case
def test_convert_writes_the_model_with_its_adapters(case: Path, tmp_path: Path) -> None:
    files = merged(open_files(base(case)), adapters(case))
    convert(files, tmp_path / "out")
    wanted = assemble(files.config, files.source, dtype="float32")
    found = open_loaded(tmp_path / "out", dtype="float32")
    for ids in expected(case)["prompts"].values():
        assert error(found.logits(ids), wanted.logits(ids)) < 1e-6


def test_convert_and_perplexity_take_adapters(tmp_path: Path) -> None:
    def run(*words: str) -> str:
        command = [sys.executable, "-m", "runner", *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        return done.stdout

    (tmp_path / "text").write_text("the quick brown fox jumps over the lazy dog " * 30)
    out, text, adapter = str(tmp_path / "out"), str(tmp_path / "text"), f"{QV / 'adapter'}=0.5"
    run("convert", str(base(QV)), out, "--adapter", adapter)
    judged = ("--chunk", "64", "--dtype", "float32", "--json")
    alone, applied, written = (
        json.loads(run("perplexity", *words, *judged))["perplexity"]
        for words in ((str(base(QV)), text), (str(base(QV)), text, "--adapter", adapter), (out, text))
    )
    assert applied == pytest.approx(written, rel=2e-3)  # the matrices written are rounded to the base's dtype
    assert applied != pytest.approx(alone, rel=2e-2)
