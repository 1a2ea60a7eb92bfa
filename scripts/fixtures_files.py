"""Writes one case's directory: config, tensors, generation config, tokenizer, and the expected values beside them."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from fixtures_case import Case, Config
from safetensors import safe_open
from safetensors.torch import save_file

Tensors = dict[str, torch.Tensor]

RECIPE = {
    "script": "scripts/make_fixtures.py",
    "torch": str(torch.__version__).split("+")[0],
    "transformers": transformers.__version__,
    "reference": "float32, eager attention, one thread, on the stored weights",
}


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """One top-level key a line: readable, and small for lists of ids."""
    lines = [f"  {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in content.items()]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def write_config(path: Path, config: Config) -> None:
    """`config.json` as repositories have it: indented by two."""
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def redundant_head(tensors: Tensors, config: Config) -> Tensors:
    """Granite and others ship `lm_head.weight` although it is tied: the same values once more."""
    return {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}


def old_inv_freq(tensors: Tensors, config: Config) -> Tensors:
    """Conversions of 2023 kept each layer's rotary buffer. The values are wrong on purpose: they must not be used."""
    dims = config["hidden_size"] // config["num_attention_heads"]
    names = [f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(config["num_hidden_layers"])]
    return {**tensors, **{name: torch.full((dims // 2,), 0.5) for name in names}}


def bare_transformer(tensors: Tensors, config: Config) -> Tensors:
    """gpt2 and bloom repositories hold the base model: names without `transformer.`, no head."""
    return {name.removeprefix("transformer."): value for name, value in tensors.items() if name != "lm_head.weight"}


def gpt2_buffers(tensors: Tensors, config: Config) -> Tensors:
    """The causal masks that old gpt2 files carry."""
    size = config["n_positions"]
    mask = torch.ones(1, 1, size, size, dtype=torch.uint8).tril()
    return {**tensors, **{f"h.{i}.attn.bias": mask.clone() for i in range(config["n_layer"])}}


def neox_buffers(tensors: Tensors, config: Config) -> Tensors:
    """The buffers that pythia files carry."""
    extra: Tensors = {}
    for i in range(config["num_hidden_layers"]):
        prefix = f"gpt_neox.layers.{i}.attention."
        extra[prefix + "bias"] = torch.ones(1, 1, 8, 8, dtype=torch.bool).tril()
        extra[prefix + "masked_bias"] = torch.tensor(-1e9)
        extra[prefix + "rotary_emb.inv_freq"] = torch.full((2,), 0.5)
    return {**tensors, **extra}


def prediction_layer(tensors: Tensors, config: Config) -> Tensors:
    """DeepSeek-V3 files carry a multi-token-prediction layer after the last one, which plain decoding does not use."""
    last = config["num_hidden_layers"] - 1
    old, new = f"model.layers.{last}.", f"model.layers.{last + 1}."
    kept = {name: value for name, value in tensors.items() if name.startswith(old) and ".experts." not in name}
    extra = {name.replace(old, new): value.clone() for name, value in kept.items()}
    hidden = config["hidden_size"]
    extra[new + "eh_proj.weight"] = torch.zeros(hidden, 2 * hidden)
    extra[new + "enorm.weight"] = torch.ones(hidden)
    extra[new + "hnorm.weight"] = torch.ones(hidden)
    extra[new + "shared_head.norm.weight"] = torch.ones(hidden)
    return {**tensors, **extra}


EXTRA_TENSORS: dict[str, Callable[[Tensors, Config], Tensors]] = {
    "redundant_head": redundant_head,
    "old_inv_freq": old_inv_freq,
    "bare_transformer": bare_transformer,
    "gpt2_buffers": gpt2_buffers,
    "neox_buffers": neox_buffers,
    "prediction_layer": prediction_layer,
}


def read_tensors(directory: Path) -> Tensors:
    """Every tensor of every shard in a directory."""
    found: Tensors = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    return found


def write_shards(directory: Path, tensors: Tensors, shard_bytes: int) -> None:
    """Shards of at most `shard_bytes`, their index, and a stray shard that a glob would load and the index does not."""
    groups: list[Tensors] = [{}]
    for name, tensor in sorted(tensors.items()):
        size = sum(t.nbytes for t in groups[-1].values())
        if groups[-1] and size + tensor.nbytes > shard_bytes:
            groups.append({})
        groups[-1][name] = tensor
    weight_map: dict[str, str] = {}
    for number, group in enumerate(groups, 1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        save_file(group, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(group, file)
    index = {
        "metadata": {"total_size": sum(t.nbytes for t in tensors.values())},
        "weight_map": dict(sorted(weight_map.items())),
    }
    write_config(directory / "model.safetensors.index.json", index)
    stray = {
        "model.norm.weight": torch.full_like(tensors["model.norm.weight"], float("nan")),
        "model.layers.9.unknown.weight": torch.zeros(2, 2),
    }
    save_file(stray, directory / f"model-{len(groups) + 1:05d}-of-{len(groups):05d}.safetensors", {"format": "pt"})


def write_checkpoint(case: Case, model: Any, directory: Path) -> None:
    """The files that a repository would hold, in the case's spelling and storage dtype."""
    storage: torch.dtype = getattr(torch, case.storage)
    model.config.dtype = storage
    precise = {n: t.clone() for n, t in model.state_dict().items() if any(part in n for part in case.keep_float32)}
    copy.deepcopy(model).to(storage).save_pretrained(directory)  # a copy: the cast rounds rotary buffers for good
    tensors = read_tensors(directory)
    for name, value in precise.items():
        tensors[name] = value
    for extra in case.extra_tensors:
        tensors = EXTRA_TENSORS[extra](tensors, case.config)
    for path in directory.glob("*.safetensors*"):
        path.unlink()
    if case.shard_bytes is None:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    else:
        write_shards(directory, tensors, case.shard_bytes)
    if case.spelling == "hub":
        write_config(directory / "config.json", {**case.config, "torch_dtype": case.storage})
    if case.generation_config is not None:
        write_config(directory / "generation_config.json", dict(case.generation_config))


def add_eos(directory: Path, token: int) -> None:
    """Makes `token` one more end-of-sequence id, in generation_config.json only."""
    path = directory / "generation_config.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    write_config(path, {**content, "eos_token_id": [content["eos_token_id"], token]})
