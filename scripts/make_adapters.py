#!/usr/bin/env python
"""Writes tests/fixtures_adapters: adapters of the tiny checkpoints as PEFT saves them, and what PEFT makes of them.

    pip install -r scripts/requirements-oracle.txt
    python scripts/make_adapters.py                 everything
    python scripts/make_adapters.py llama-qv ...    some of them

The adapters are random: each product B A has about half the size of the matrix it changes. Every adapter is written by
`save_pretrained`, read back by `PeftModel.from_pretrained` onto a fresh base, and only then asked for logits. A packed
base is unpacked first: the reference is the sum of the unpacked numbers and the adapter.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import peft
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from safetensors.numpy import save_file
from safetensors.torch import load_file
from safetensors.torch import save_file as torch_save_file
from transformers import AutoModelForCausalLM

TESTS = Path(__file__).resolve().parent.parent / "tests"
GREEDY_TOKENS = 24
MIN_MARGIN = 0.01  # top-1 minus top-2 at every greedy step, in standard deviations of the logits
MIN_MOVED = 0.2  # how far the adapters move some logit, in the same unit
MAX_SEEDS = 100
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Case:
    """Adapters of one base by name, and the weights that the reference gives them (1 where there is none).

    `by_checkpoint`: with tensors for the matrices of the checkpoint, as PEFT wrote them when transformers had a module
    for each expert; PEFT reads them still.
    """

    name: str
    base: str
    adapters: Mapping[str, LoraConfig]
    weights: Mapping[str, float] = field(default_factory=dict)
    storage: torch.dtype = torch.float32
    by_checkpoint: bool = False


def lora(targets: list[str] | str, **keys: Any) -> LoraConfig:
    return LoraConfig(task_type="CAUSAL_LM", target_modules=targets, **{"r": 4, "lora_alpha": 8, **keys})


def one(name: str, base: str, config: LoraConfig, **keys: Any) -> Case:
    return Case(name, base, {"adapter": config}, **keys)


CASES = [
    one("llama-qv", "fixtures/llama-gqa", lora(["q_proj", "v_proj"])),
    one("llama-bfloat16", "fixtures/llama-gqa", lora(["q_proj", "v_proj"]), storage=torch.bfloat16),
    one(
        "llama-patterns",
        "fixtures/llama-gqa",
        lora(
            "all-linear",
            use_rslora=True,
            rank_pattern={r"layers\.1\.mlp\.(gate|up)_proj": 2, "o_proj": 6},
            alpha_pattern={"^model.layers.0.self_attn.q_proj": 2, "down_proj": 20},
        ),
    ),
    one("llama-regex", "fixtures/llama-gqa", lora(r".*\.1\.(self_attn|mlp)\..*(k|down)_proj")),
    one("llama-layers", "fixtures/llama-gqa", lora(ALL, layers_to_transform=[1], exclude_modules=["up_proj"])),
    one("llama-dora", "fixtures/llama-gqa", lora(ALL, use_dora=True)),
    one("llama-dora-bias", "fixtures/llama-both-biases-tied", lora(["q_proj", "up_proj", "o_proj"], use_dora=True)),
    one("llama-biases", "fixtures/llama-both-biases-tied", lora(["v_proj", "down_proj"], bias="all")),
    one("llama-biases-lora-only", "fixtures/llama-both-biases-tied", lora(["v_proj", "down_proj"], bias="lora_only")),
    one("llama-saved", "fixtures/llama-gqa", lora(["q_proj"], modules_to_save=["lm_head", "embed_tokens"])),
    one("llama-saved-tied", "fixtures/llama-tied", lora(["q_proj"], modules_to_save=["lm_head", "embed_tokens"])),
    one("llama-saved-embeddings-tied", "fixtures/llama-tied", lora(["q_proj"], modules_to_save=["embed_tokens"])),
    one("llama-saved-head-tied", "fixtures/llama-tied", lora(["q_proj"], modules_to_save=["lm_head"])),
    one("llama-saved-norms", "fixtures/llama-gqa", lora(["q_proj"], modules_to_save=["post_attention_layernorm"])),
    one("llama-embeddings", "fixtures/llama-gqa", lora(["q_proj", "embed_tokens", "lm_head"])),
    one("llama-embeddings-tied", "fixtures/llama-tied", lora(["q_proj", "embed_tokens"])),
    one("llama-head-tied", "fixtures/llama-tied", lora(["q_proj", "lm_head"])),
    one("llama-tokens", "fixtures/llama-gqa", lora(["q_proj"], trainable_token_indices=[3, 100, 7])),
    one(
        "llama-tokens-tied",
        "fixtures/llama-tied",
        lora(["q_proj"], trainable_token_indices={"embed_tokens": [9, 2]}),
        storage=torch.bfloat16,
    ),
    Case(
        "llama-two",
        "fixtures/llama-gqa",
        {"first": lora(["q_proj", "v_proj", "down_proj"]), "second": lora(["q_proj", "k_proj", "gate_proj"], r=2)},
        {"first": 0.75, "second": -0.5},
    ),
    Case(
        "llama-two-doras",
        "fixtures/llama-gqa",
        {"first": lora(["q_proj", "down_proj"], use_dora=True), "second": lora(["v_proj", "o_proj"], use_dora=True)},
    ),
    one("llama-mlx-4bit", "fixtures/llama-mlx-4bit", lora(ALL)),
    one("llama-mlx-4bit-dora", "fixtures/llama-mlx-4bit", lora(["q_proj", "down_proj"], use_dora=True)),
    one("llama-mlx-mixed", "fixtures/llama-mlx-mixed", lora(ALL)),
    one("llama-mlx-tied", "fixtures/llama-mlx-tied", lora(["v_proj", "embed_tokens"])),
    one("llama-mlx-tied-saved", "fixtures/llama-mlx-tied", lora(["v_proj"], modules_to_save=["lm_head"])),
    one(
        "llama-mlx-tied-tokens",
        "fixtures/llama-mlx-tied",
        lora(["v_proj"], trainable_token_indices=[3, 5]),
        storage=torch.bfloat16,
    ),
    one("gpt2", "fixtures_families/gpt2-base", lora(["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)),
    one("gpt2-dora", "fixtures_families/gpt2-base", lora(["c_attn", "c_fc"], fan_in_fan_out=True, use_dora=True)),
    one("phi3", "fixtures_families/phi3-base", lora(["qkv_proj", "gate_up_proj", "down_proj"])),
    one("gpt_neox", "fixtures_families/gpt_neox-base", lora(["query_key_value", "dense"])),
    one("gpt_neox-dora", "fixtures_families/gpt_neox-base", lora(["query_key_value"], use_dora=True)),
    one("bloom", "fixtures_families/bloom-base", lora(["query_key_value", "word_embeddings"])),
    one("falcon", "fixtures_families/falcon-40b", lora(["query_key_value", "dense_h_to_4h"])),
    one("gemma2", "fixtures_families/gemma2-base", lora(["q_proj", "up_proj", "embed_tokens"])),
    one("mixtral", "fixtures_families/mixtral-base", lora(["q_proj", "w1", "w2", "w3"]), by_checkpoint=True),
    one("mixtral-some", "fixtures_families/mixtral-base", lora(["o_proj", "w2"]), by_checkpoint=True),
    one(
        "mixtral-parameters",
        "fixtures_families/mixtral-base",
        lora(
            ["q_proj"], target_parameters=["experts.gate_up_proj", "experts.down_proj"], rank_pattern={"down_proj": 2}
        ),
    ),
    one("qwen3_moe", "fixtures_families/qwen3_moe-base", lora([], target_parameters=["1.mlp.experts.down_proj"])),
    one(
        "gpt_oss",
        "fixtures_families/gpt_oss-base",
        lora(
            ["q_proj", "o_proj"],
            target_parameters=["0.mlp.experts.gate_up_proj", "0.mlp.experts.down_proj", "1.mlp.experts.gate_up_proj"],
        ),
    ),
    one(
        "gpt_oss-mxfp4",
        "fixtures_families/gpt_oss-mxfp4",
        lora(["q_proj", "o_proj"], target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]),
    ),
    one("opt", "fixtures_families/opt-base", lora(["q_proj", "fc1", "out_proj"])),
]


def random(name: str, seed: int, shape: tuple[int, ...]) -> torch.Tensor:
    """Normal numbers that depend on name and seed alone."""
    generator = np.random.default_rng([seed, zlib.crc32(name.encode())])
    return torch.from_numpy(generator.standard_normal(shape).astype(np.float32))


def open_base(path: Path) -> Any:
    """The base in float32, packed matrices as the numbers they stand for."""
    with tempfile.TemporaryDirectory() as scratch:
        directory = path
        config = json.loads((path / "config.json").read_text())
        if "quantization" in config:
            directory = Path(scratch)
            form = config["quantization"]
            arrays = mx.load(str(path / "model.safetensors"))
            plain = {}
            for name, array in arrays.items():
                leaf, _, last = name.rpartition(".")
                if last in ("scales", "biases"):
                    continue
                if array.dtype == mx.uint32:
                    bits = {"group_size": form["group_size"], "bits": form["bits"], **(form.get(leaf) or {})}
                    scales, biases = (arrays[f"{leaf}.{part}"].astype(mx.float32) for part in ("scales", "biases"))
                    array = mx.dequantize(array, scales, biases, group_size=bits["group_size"], bits=bits["bits"])
                plain[name] = array.astype(mx.float32)
            mx.save_safetensors(str(directory / "model.safetensors"), plain, metadata={"format": "pt"})
            kept = {key: value for key, value in config.items() if not key.startswith("quantization")}
            (directory / "config.json").write_text(json.dumps(kept))
        return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()


def fill(model: Any, base: Mapping[str, torch.Tensor], seed: int) -> None:
    """Random values for everything that the adapter trains."""
    for name, value in model.named_parameters():
        if not value.requires_grad or "lora_magnitude_vector" in name or "lora_B" in name or "embedding_B" in name:
            continue
        noise = random(name, seed, tuple(value.shape))
        if "lora_" in name:
            value.data = noise
        else:
            value.data = value.data + noise * (value.data.std().nan_to_num(0) * 0.5 + 0.05)
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        inner = layer.get_base_layer()
        while isinstance(inner, LoraLayer):
            inner = inner.get_base_layer()
        weight = (layer.get_param() if isinstance(layer, ParamWrapper) else inner.weight).data
        for adapter in layer.scaling:
            table = adapter in layer.lora_embedding_B
            up = layer.lora_embedding_B[adapter] if table else layer.lora_B[adapter].weight
            up.data = random(f"{name}.up", seed, tuple(up.shape))
            up.data *= 0.5 * weight.norm() / layer.get_delta_weight(adapter).norm()
            if adapter in layer.lora_magnitude_vector:
                length = layer.lora_magnitude_vector[adapter].weight
                length.data = length.data * (1 + 0.3 * random(f"{name}.m", seed, tuple(length.shape)).clamp(-2, 2))


def write_by_checkpoint(case: Case, directory: Path, seed: int) -> None:
    for name, config in case.adapters.items():
        factors = {}
        for full, weight in load_file(TESTS / case.base / "model.safetensors").items():
            module = full.removesuffix(".weight")
            if module.rpartition(".")[2] not in config.target_modules:
                continue
            down = random(f"{module}.down", seed, (config.r, weight.shape[1]))
            up = random(f"{module}.up", seed, (weight.shape[0], config.r))
            up *= 0.5 * weight.float().norm() / ((up @ down).norm() * config.lora_alpha / config.r)
            factors |= {
                f"base_model.model.{module}.lora_A.weight": down,
                f"base_model.model.{module}.lora_B.weight": up,
            }
        config.save_pretrained(directory / name)
        torch_save_file(factors, directory / name / "adapter_model.safetensors", metadata={"format": "pt"})
        tidy(directory / name, case)


def write(case: Case, directory: Path, seed: int) -> None:
    if case.by_checkpoint:
        write_by_checkpoint(case, directory, seed)
        return
    for name, config in case.adapters.items():
        model = open_base(TESTS / case.base)
        base = {key: value.clone() for key, value in model.state_dict().items()}
        adapted = get_peft_model(model, config)
        fill(adapted, base, seed + len(name))
        if case.storage != torch.float32:
            for key, value in adapted.named_parameters():
                if "lora_" in key or "trainable_tokens" in key:
                    value.data = value.data.to(case.storage)
        adapted.save_pretrained(directory / name)
        tidy(directory / name, case)


def tidy(directory: Path, case: Case) -> None:
    """Without a model card, and the config the same each time."""
    (directory / "README.md").unlink(missing_ok=True)
    path = directory / "adapter_config.json"
    raw = json.loads(path.read_text())
    raw["base_model_name_or_path"] = case.base
    for key in ("target_modules", "exclude_modules", "modules_to_save"):
        if isinstance(raw[key], list):
            raw[key] = sorted(raw[key])  # PEFT holds them in a set
    path.write_text(json.dumps(raw, indent=2, sort_keys=True) + "\n")


def read_back(case: Case, directory: Path) -> Any:
    """A fresh base with the saved adapters, all of them active with the case's weights."""
    first, *others = case.adapters
    model = PeftModel.from_pretrained(open_base(TESTS / case.base), directory / first, adapter_name=first)
    for name in others:
        model.load_adapter(directory / name, adapter_name=name)
    model.base_model.set_adapter(list(case.adapters))
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            for name, weight in case.weights.items():
                if name in layer.scaling:
                    layer.set_scale(name, weight)
    return model.eval()


@torch.no_grad()
def logits(model: Any, ids: list[int]) -> np.ndarray:
    return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float().numpy()


def reference(case: Case, directory: Path) -> tuple[dict[str, np.ndarray], dict[str, list[int]], float, float]:
    """Logits, greedy tokens, the smallest margin and how far the base is away, by prompt."""
    model, base = read_back(case, directory), open_base(TESTS / case.base)
    prompts = json.loads((TESTS / case.base / "expected.json").read_text())["prompts"]
    found, greedy, margin, moved = {}, {}, np.inf, np.inf
    for name, prompt in prompts.items():
        found[name] = logits(model, prompt)
        std = found[name].std()
        moved = min(moved, float(np.abs(found[name] - logits(base, prompt)).max() / std))
        ids = list(prompt)
        for _ in range(GREEDY_TOKENS):
            row = logits(model, ids)[-1]
            low, high = np.sort(row)[-2:]
            margin = min(margin, float((high - low) / std))
            ids.append(int(row.argmax()))
        greedy[name] = ids[len(prompt) :]
    return found, greedy, margin, moved


def make(case: Case, target: Path) -> None:
    for seed in range(MAX_SEEDS):
        with tempfile.TemporaryDirectory() as scratch:
            directory = Path(scratch)
            write(case, directory, seed)
            found, greedy, margin, moved = reference(case, directory)
            if margin < MIN_MARGIN or moved < MIN_MOVED:
                continue
            prompts = json.loads((TESTS / case.base / "expected.json").read_text())["prompts"]
            save_file({f"logits.{name}": value for name, value in found.items()}, directory / "expected.safetensors")
            recipe = {
                "script": "scripts/make_adapters.py",
                "torch": str(torch.__version__).split("+")[0],
                "transformers": transformers.__version__,
                "peft": peft.__version__,
                "seed": seed,
            }
            content = {
                "recipe": recipe,
                "base": case.base,
                "adapters": {name: case.weights.get(name, 1.0) for name in case.adapters},
                "prompts": prompts,
                "greedy": greedy,
                "greedy_margin": round(margin, 4),
                "moved": round(moved, 3),
            }
            lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in content.items()]
            (directory / "expected.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")
            for path in directory.rglob("*"):
                path.chmod(0o755 if path.is_dir() else 0o644)
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(directory, target)
            size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
            print(
                f"{case.name:30s} {size / 1000:6.1f} kB  seed {seed}  margin {margin:.3f}  moved {moved:.2f}",
                flush=True,
            )
            return
    raise SystemExit(f"{case.name}: no seed of {MAX_SEEDS} has clear greedy choices")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    for case in CASES:
        if not options.names or case.name in options.names:
            make(case, TESTS / "fixtures_adapters" / case.name)


if __name__ == "__main__":
    main()
