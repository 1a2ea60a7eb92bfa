"""One fault of an adapter is one line: what follows from it is not reported as a fault of its own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from places import TESTS

from runner.adapters import AdapterFiles
from runner.engine.loaded import open_loaded
from runner.errors import WeightsError

FIXTURES = TESTS / "fixtures" / "adapters"
Damage = Callable[[str, mx.array], mx.array | None]
ABOVE = "base_model.model.model"
Q0, EXPERTS = f"{ABOVE}.layers.0.self_attn.q_proj", f"{ABOVE}.layers.0.mlp.experts"


def report(case: str, tmp_path: Path, damage: Damage, **config: Any) -> list[str]:
    """The lines of the message, without its title, where `damage` changes or drops (None) tensors by name."""
    path = tmp_path / "adapter"
    shutil.copytree(FIXTURES / case / "adapter", path)
    raw = json.loads((path / "adapter_config.json").read_text()) | config
    (path / "adapter_config.json").write_text(json.dumps(raw))
    arrays = mx.load(str(path / "adapter_model.safetensors"))
    assert isinstance(arrays, dict)
    changed = {name: damage(name, array) for name, array in arrays.items()}
    kept = {name: array for name, array in changed.items() if array is not None}
    mx.save_safetensors(str(path / "adapter_model.safetensors"), kept)
    base = TESTS / json.loads((FIXTURES / case / "expected.json").read_text())["base"]
    with pytest.raises(WeightsError) as caught:
        open_loaded(base, adapters=[AdapterFiles.open(path, "a")])
    return [line.strip() for line in str(caught.value).splitlines()[1:]]


def where(part: str, made: Callable[[mx.array], mx.array | None]) -> Damage:
    """Change the tensors whose name contains `part`."""
    return lambda name, array: made(array) if part in name else array


def short(array: mx.array) -> mx.array:
    return array[:3]


def whole(array: mx.array) -> mx.array:
    return array.astype(mx.int32)


def gone(array: mx.array) -> None:
    return None


BIAS = "layers.0.mlp.down_proj.base_layer.bias"
HEAD = "base_model.model.lm_head"
FLOATS = "expected BF16 or F16 or F32, found I32"


@pytest.mark.parametrize(
    ("case", "damage", "line"),
    [
        ("llama-saved", where("lm_head", short), f"wrong shape: {HEAD}.weight: expected [336, 32], found [3, 32]"),
        ("llama-saved", where("lm_head", whole), f"wrong dtype: {HEAD}.weight: {FLOATS}"),
        ("llama-saved", where("lm_head", gone),
         "modules_to_save names 'lm_head', but the adapter has none of its tensors"),
        ("llama-biases", where(BIAS, short), f"wrong shape: {ABOVE}.{BIAS}: expected [32], found [3]"),
        ("llama-biases", where(BIAS, whole), f"wrong dtype: {ABOVE}.{BIAS}: {FLOATS}"),
        ("llama-qv", where(f"{Q0}.lora_A", whole), f"wrong dtype: {Q0}.lora_A.weight: {FLOATS}"),
        ("llama-qv", where(f"{Q0}.lora_A", short), f"wrong shape: {Q0}.lora_A.weight: expected [4, 32], found [3, 32]"),
        ("llama-qv", where(f"{Q0}.lora_A", gone), f"missing: {Q0}.lora_A.weight: expected [4, 32]"),
        ("llama-qv", where(f"{Q0}.lora_", gone), f"missing: {Q0}.lora_A.weight: expected [4, 32]"),
        ("llama-dora", where(f"{Q0}.lora_magnitude", gone), f"missing: {Q0}.lora_magnitude_vector: expected [32]"),
        ("mixtral-parameters", where(f"{EXPERTS}.base_layer.lora_A", short),
         f"wrong shape: {EXPERTS}.base_layer.lora_A.weight: expected [16, 32], found [3, 32]"),
        ("mixtral-parameters", where(f"{EXPERTS}.base_layer.lora_A", gone),
         f"missing: {EXPERTS}.base_layer.lora_A.weight: expected [16, 32]"),
        ("mixtral-parameters", where(f"{EXPERTS}.lora_B", whole), f"wrong dtype: {EXPERTS}.lora_B.weight: {FLOATS}"),
        ("llama-tokens", where("trainable_tokens", lambda rows: rows[:2]),
         f"wrong shape: {ABOVE}.embed_tokens.token_adapter.trainable_tokens_delta: expected [3, 32], found [2, 32]"),
        ("llama-tokens", where("trainable_tokens", gone),
         "trainable_token_indices promises rows for 3 tokens of model.embed_tokens, but the adapter has none"),
    ],
)  # fmt: skip
def test_one_fault_is_one_line(tmp_path: Path, case: str, damage: Damage, line: str) -> None:
    assert report(case, tmp_path, damage) == [line]


def test_a_pair_that_is_missing_is_named_by_its_parameter(tmp_path: Path) -> None:
    lines = report("mixtral-parameters", tmp_path, where(f"{EXPERTS}.base_layer", gone))
    assert lines == [
        "target_parameters names model.layers.0.mlp.experts.gate_up_proj, but the adapter has no A [16, 32] and "
        "B [48, 16] for it"
    ]


def test_every_fault_is_still_there(tmp_path: Path) -> None:
    def damage(name: str, array: mx.array) -> mx.array | None:
        if "layers.0.self_attn.q_proj.lora_A" in name:
            return None
        return array[:3] if "layers.1.self_attn.v_proj.lora_B" in name else array

    assert report("llama-qv", tmp_path, damage) == [
        f"wrong shape: {ABOVE}.layers.1.self_attn.v_proj.lora_B.weight: expected [16, 4], found [3, 4]",
        f"missing: {Q0}.lora_A.weight: expected [4, 32]",
    ]
