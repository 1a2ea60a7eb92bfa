"""Adapters in mlx-lm's format: families that mlx-lm's own fixtures lack, and what is refused.

`test_adapters.py` compares those that mlx-lm wrote with what it computed. Here PEFT's fixtures are rewritten in
mlx-lm's format, and must give what PEFT computed with them.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from places import TESTS

from runner.adapters import AdapterFiles, fit
from runner.adapters.mlx_config import MlxConfig, is_mlx
from runner.checkpoint.model_files import open_files
from runner.engine.loaded import assemble, open_loaded
from runner.errors import CheckpointError, ConfigError, RunnerError, WeightsError
from runner.families import find

FIXTURES = TESTS / "fixtures" / "adapters"
QV, FULL = FIXTURES / "mlxlm-qv", FIXTURES / "mlxlm-full"
MIXTRAL = FIXTURES / "mlxlm-mixtral"
TOLERANCE = 2e-4


def expected(case: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((case / "expected.json").read_text())
    return result


def base(case: Path) -> Path:
    return TESTS / str(expected(case)["base"])


def check(case: Path, path: Path) -> None:
    """Applied and merged, the adapter at `path` gives what the reference of `case` has."""
    wanted = mx.load(str(case / "expected.safetensors"))
    files = open_files(base(case))
    adapter = AdapterFiles.open(path, "adapter")
    engine = assemble(files.config, files.source, dtype="float32", adapters=[adapter])
    for name, prompt in expected(case)["prompts"].items():
        logits = wanted[f"logits.{name}"]
        assert mx.max(mx.abs(engine.logits(prompt) - logits)) / mx.std(logits) < TOLERANCE
    merged = fit(files.config, find(files.config), files.source, [adapter]).merged()
    prompt = expected(case)["prompts"]["short"]
    close = assemble(merged.raw, merged.source, dtype="float32").logits(prompt)
    assert mx.max(mx.abs(close - engine.logits(prompt))) / mx.std(close) < 0.1  # rounded to the base's bfloat16


# --- PEFT's adapters, rewritten ---------------------------------------------------------------------------------------


def rewritten(case: Path, path: Path, **config: Any) -> Path:
    """Write the adapter of one of PEFT's fixtures, whose modules all have one rank and alpha, as mlx-lm would."""
    raw = json.loads((case / "adapter" / "adapter_config.json").read_text())
    tensors = {}
    for full, array in mx.load(str(case / "adapter" / "adapter_model.safetensors")).items():
        name = full.removeprefix("base_model.model.")
        # mlx-lm calls every trunk `model`.
        name = re.sub(r"^(transformer|gpt_neox|model\.decoder)\.", "model.", name)
        if name.endswith("lora_magnitude_vector"):
            tensors[name.replace("lora_magnitude_vector", "m")] = array
        elif "lora_embedding" in name:
            tensors[re.sub(r"lora_embedding_([AB])", lambda part: f"lora_{part[1].lower()}", name)] = array.T
        else:
            tensors[re.sub(r"lora_([AB])\.weight", lambda part: f"lora_{part[1].lower()}", name)] = array.T
    parameters = {"rank": raw["r"], "scale": raw["lora_alpha"] / raw["r"], "dropout": 0.0}
    kind = "dora" if raw["use_dora"] else "lora"
    tensors = {name: mx.contiguous(array) for name, array in tensors.items()}
    write(path, tensors, fine_tune_type=kind, num_layers=-1, lora_parameters=parameters, **config)
    return path


def write(path: Path, tensors: dict[str, mx.array], **config: Any) -> None:
    path.mkdir()
    mx.save_safetensors(str(path / "adapters.safetensors"), tensors)
    (path / "adapter_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    "name",
    ["llama-qv", "llama-bfloat16", "llama-dora", "llama-dora-bias", "gpt2", "gpt2-dora", "gpt_neox", "gpt_neox-dora",
     "phi3", "falcon"],
)  # fmt: skip
def test_pefts_adapters_in_the_format_of_mlx_lm(name: str, tmp_path: Path) -> None:
    check(FIXTURES / name, rewritten(FIXTURES / name, tmp_path / "a"))


def test_experts_whose_rows_alternate_in_transformers(tmp_path: Path) -> None:
    """gpt-oss: one pair of factors for gate and up in PEFT, two in mlx-lm, and rows in another order."""
    case = FIXTURES / "gpt_oss"
    raw = json.loads((case / "adapter" / "adapter_config.json").read_text())
    experts, rank = json.loads((base(case) / "config.json").read_text())["num_local_experts"], raw["r"]
    tensors: dict[str, mx.array] = {}
    for full, array in mx.load(str(case / "adapter" / "adapter_model.safetensors")).items():
        name = full.removeprefix("base_model.model.")
        module, part = name.rsplit(".lora_", 1)
        if "experts" not in module:
            tensors[f"{module}.lora_{part[0].lower()}"] = array.T
            continue
        # Which parameter a pair belongs to: only B of `down_proj` has as many rows as the model is wide, and the layer
        # with one pair has it for `gate_up_proj`.
        layer = module.split(".")[2]
        gate_up = module.endswith(".base_layer") or layer == "1"
        module = module.removesuffix(".base_layer")
        if part[0] == "A":
            a = array.reshape(experts, rank, -1)
            for last in ("gate_proj", "up_proj") if gate_up else ("down_proj",):
                tensors[f"{module}.{last}.lora_a"] = a
        else:
            b = array.reshape(array.shape[0], rank, experts).transpose(2, 0, 1)
            if gate_up:
                tensors[f"{module}.gate_proj.lora_b"] = mx.contiguous(b[:, 0::2])
                tensors[f"{module}.up_proj.lora_b"] = mx.contiguous(b[:, 1::2])
            else:
                tensors[f"{module}.down_proj.lora_b"] = mx.contiguous(b)
    tensors = {name: mx.contiguous(array) for name, array in tensors.items()}
    # mlx-lm's layers all have the same modules; this adapter lacks `down_proj` in one: a product of zeros stands there.
    width = next(array for name, array in tensors.items() if name.endswith("down_proj.lora_a"))
    other = next(array for name, array in tensors.items() if name.endswith("down_proj.lora_b"))
    tensors |= {
        "model.layers.1.mlp.experts.down_proj.lora_a": width,
        "model.layers.1.mlp.experts.down_proj.lora_b": mx.zeros_like(other),
    }
    parameters = {"rank": rank, "scale": raw["lora_alpha"] / rank}
    write(tmp_path / "a", tensors, fine_tune_type="lora", num_layers=2, lora_parameters=parameters)
    check(case, tmp_path / "a")


# --- the config -------------------------------------------------------------------------------------------------------


def test_which_config_is_whose() -> None:
    assert is_mlx({"fine_tune_type": "lora"}) and is_mlx({"lora_layers": 4, "lora_parameters": {}})
    assert not is_mlx({"peft_type": "LORA", "lora_parameters": {}}) and not is_mlx({"r": 8})


def test_older_spellings_mean_the_same() -> None:
    parameters = {"rank": 8, "scale": 10.0, "dropout": 0.0}
    new = MlxConfig.from_dict({"fine_tune_type": "dora", "num_layers": 4, "lora_parameters": parameters})
    assert new == MlxConfig(kind="dora", rank=8, scale=10.0, num_layers=4)
    old = {"use_dora": True, "lora_layers": 4, "lora_parameters": {**parameters, "alpha": 16}}
    assert MlxConfig.from_dict(old) == new
    assert MlxConfig.from_dict({**old, "use_dora": False}).kind == "lora"
    for every in (-1, 0):
        assert MlxConfig.from_dict({"num_layers": every, "lora_parameters": parameters}).num_layers is None


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"fine_tune_type": "prefix"}, "fine_tune_type must be lora, dora or full, not 'prefix'"),
        ({"num_layers": "4"}, "num_layers must be the number of layers with adapters, not '4'"),
        ({"num_layers": None}, "num_layers must be the number of layers"),
        ({"lora_parameters": None}, "lora_parameters must be an object with rank and scale"),
        ({"lora_parameters": {"scale": 1.0}}, "lora_parameters.rank must be an integer from 1 to 16384, not None"),
        ({"lora_parameters": {"rank": 4, "alpha": 16}}, "lora_parameters.scale must be a finite number, not None"),
        ({"lora_parameters": {"rank": 4, "scale": 1, "keys": "q_proj"}}, "lora_parameters.keys must be a list of"),
        ({"lora_parameters": {"rank": 0, "scale": "1"}}, "rank must .*; lora_parameters.scale must"),
    ],
)
def test_configs_that_are_refused(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        AdapterFiles.open(damaged(tmp_path, **config), "a")
    assert "adapter_config.json" in str(caught.value)


def test_weights_of_another_kind_are_named(tmp_path: Path) -> None:
    path = damaged(tmp_path)
    (path / "adapters.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no adapters\.safetensors"):
        AdapterFiles.open(path, "a")
    (path / "adapters.npz").write_bytes(b"zip")
    with pytest.raises(CheckpointError, match=r"only adapters\.npz, as mlx-lm wrote until March 2024"):
        AdapterFiles.open(path, "a")


# --- the tensors ------------------------------------------------------------------------------------------------------


def damaged(tmp_path: Path, case: Path = QV, tensors: Any = None, **config: Any) -> Path:
    """A copy of an adapter with other keys in its config, or with its tensors passed through a function."""
    path = tmp_path / "adapter"
    shutil.copytree(case / "adapter", path)
    raw = json.loads((path / "adapter_config.json").read_text()) | config
    (path / "adapter_config.json").write_text(json.dumps(raw))
    if tensors is not None:
        arrays = dict(mx.load(str(path / "adapters.safetensors")))
        tensors(arrays)
        mx.save_safetensors(str(path / "adapters.safetensors"), arrays)
    return path


def drop(*names: str) -> Any:
    return lambda arrays: [arrays.pop(name) for name in names]


def put(name: str, value: mx.array) -> Any:
    return lambda arrays: arrays.update({name: value})


Q0, EXPERT = "model.layers.0.self_attn.q_proj", "model.layers.1.block_sparse_moe.switch_mlp.up_proj"
PARAMETERS = {"rank": 4, "scale": 5.0, "dropout": 0.0}


@pytest.mark.parametrize(
    ("case", "tensors", "config", "message"),
    [
        (QV, drop(f"{Q0}.lora_b"), {}, rf"\(1 problem.*missing: {Q0}.lora_b: expected \[4, 32\]"),
        # A tensor too many does not make up for the one that is missing.
        (QV, lambda arrays: arrays.update({f"{Q0}.m": arrays.pop(f"{Q0}.lora_b")}), {}, rf"missing: {Q0}.lora_b"),
        (QV, drop(f"{Q0}.lora_a", f"{Q0}.lora_b"), {}, rf"\(1 problem.*missing: {Q0}.lora_a: expected \[32, 4\]"),
        (QV, put(f"{Q0}.lora_a", mx.zeros((4, 32))), {}, r"\(1 problem.*wrong shape: .*expected \[32, 4\], found \[4"),
        (QV, put(f"{Q0}.lora_a", mx.zeros((32, 4), mx.int32)), {}, r"\(1 problem.*wrong dtype: .*lora_a: expected"),
        (QV, put(f"{Q0}.m", mx.zeros((32,))), {}, r"\(1 problem.*unused: .*q_proj.m: \[32\]"),
        (QV, put("other.lora_a", mx.zeros((32, 4))), {}, r"\(1 problem.*unused: other.lora_a"),
        (QV, put(f"{Q0}.weight", mx.zeros((32, 32))), {}, r"\(1 problem.*unused: .*q_proj.weight"),
        (QV, None, {"num_layers": 1}, r"layers.0.self_attn.q_proj has an adapter, but num_layers and .* exclude it"),
        (QV, None, {"lora_parameters": {**PARAMETERS, "keys": ["self_attn.q_proj"]}}, r"v_proj has an adapter, but"),
        (QV, None, {"lora_parameters": {**PARAMETERS, "keys": ["self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj"]}},
         r"missing: model.layers.\*.mlp.up_proj.lora_a \(2 tensors\): expected \[32, 4\]"),
        (QV, None, {"fine_tune_type": "dora"}, r"missing: model.layers.\*.self_attn.q_proj.m \(2 tensors\)"),
        (QV, None, {"lora_parameters": {**PARAMETERS, "rank": 8}}, r"expected \[32, 8\], found \[32, 4\]"),
        (QV, lambda arrays: arrays.clear(), {"lora_parameters": PARAMETERS}, r"\(1 problem.*adapter has no tensors"),
        (MIXTRAL, drop(f"{EXPERT}.lora_a", f"{EXPERT}.lora_b"), {}, rf"\(1 problem.*missing: {EXPERT}.lora_a"),
        (MIXTRAL, drop(f"{EXPERT}.lora_b"), {}, rf"\(1 problem.*missing: {EXPERT}.lora_b"),
        (MIXTRAL, put(f"{EXPERT}.lora_a", mx.zeros((4, 32, 4))), {}, r"\(1 problem.*wrong shape: .*up_proj.lora_a"),
        (MIXTRAL, None, {"fine_tune_type": "dora"}, "switch_mlp.up_proj: DoRA is supported for linear layers only"),
        (FULL, drop(f"{Q0}.weight"), {}, rf"\(1 problem.*missing: {Q0}.weight"),
        (FULL, put(f"{Q0}.weight", mx.zeros((32, 31))), {}, rf"\(1 problem.*wrong shape: {Q0}.weight"),
        (FULL, put(f"{Q0}.scales", mx.zeros((32, 1))), {}, rf"\(1 problem.*unused: {Q0}.scales"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_named(
    tmp_path: Path, case: Path, tensors: Any, config: dict[str, Any], message: str
) -> None:
    path = damaged(tmp_path, case, tensors, **config)
    with pytest.raises(RunnerError, match=f"(?s){message}") as caught:
        open_loaded(base(case), adapters=[AdapterFiles.open(path, "a")])
    assert isinstance(caught.value, WeightsError) and str(path) in str(caught.value)


def test_nothing_more_is_looked_for_where_a_thousand_tensors_have_no_place(tmp_path: Path) -> None:
    def many(arrays: dict[str, mx.array]) -> None:
        arrays.update({f"unknown.{index}": mx.zeros((1,), mx.int8) for index in range(3000)})

    item = AdapterFiles.open(damaged(tmp_path, tensors=many), "a")
    with pytest.raises(WeightsError, match=r"no more was looked for \(1001 problems\)"):
        open_loaded(base(QV), adapters=[item])


def test_a_head_that_shares_the_embeddings_takes_their_adapter_too() -> None:
    """mlx-lm multiplies with the adapted table in both places; PEFT adapts the embeddings alone."""
    case = FIXTURES / "mlxlm-embeddings-tied"
    engine = open_loaded(base(case), dtype="float32", adapters=[AdapterFiles.open(case / "adapter", "a")])
    assert engine.adapters is not None
    assert {"model.embed_tokens", "lm_head"} <= engine.adapters.parts.factors.keys()
    check(case, case / "adapter")
