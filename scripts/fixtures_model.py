"""Random weights, logits and greedy tokens of one case, computed by transformers on torch in float32.

Weights come from NumPy's generator keyed by (seed, tensor name), so they do not depend on torch's version, and adding a
tensor moves no other one. Nothing is left at its initial value: norm weights, biases, sinks and router corrections too.
"""

from __future__ import annotations

import copy
import json
import zlib
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from fixtures_case import Case, Config
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

Logits = dict[str, np.ndarray]  # by prompt name

TOLERANCE = 2e-3  # of the logits' standard deviation: what the tests allow
GREEDY_TOKENS = 24
PROMPT_LENGTHS = {"short": 6, "long": 40}
MIN_MARGIN = 5 * TOLERANCE  # top-1 minus top-2 at every greedy step, in standard deviations
MIN_DISTINCT = 5  # different tokens among the greedy ones: a model that repeats itself tests little
MIN_SENSITIVITY = 15 * TOLERANCE  # how far a wrong config value or a trivial vector must move some logit
MAX_SEEDS = 400
EMBEDDINGS = ("embed_tokens", "wte", "wpe", "word_embeddings", "embed_in", "embed_positions")
# Matrices kept as [.., in, out] instead of [.., out, in].
IN_OUT = {"gpt2": ("c_attn", "c_proj", "c_fc"), "gpt_oss": ("gate_up_proj", "down_proj")}
STRUCTURAL = ("tie_word_embeddings", "vocab_size")  # shown by the tensors that are there
# Probed for every case that has the key: the value a careless reader would use must change the numbers.
PROBES: dict[str, float] = {
    "rope_theta": 3.0,
    "rotary_emb_base": 3.0,
    "rope_local_base_freq": 3.0,
    "partial_rotary_factor": 0.5,
    "rotary_pct": 0.5,
    "sliding_window": 1.5,
    "embedding_multiplier": 1.5,
    "attention_multiplier": 1.5,
    "residual_multiplier": 1.5,
    "logits_scaling": 1.5,
    "logit_scale": 1.5,
    "query_pre_attn_scalar": 2.0,
    "final_logit_softcapping": 1.5,
    "attn_logit_softcapping": 1.5,
    "routed_scaling_factor": 1.5,
    "swiglu_limit": 0.5,
    "swiglu_alpha": 1.5,
    "clip_qkv": 2.0,
}


@dataclass(frozen=True)
class Reference:
    """Logits [T, V] at every position, greedy tokens with and without a cache, and how close the closest choice was."""

    logits: Logits
    greedy: dict[str, list[int]]
    greedy_uncached: dict[str, list[int]]
    margin: float


def quiet() -> None:
    """One thread (sums in one order) and no progress output."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.set_grad_enabled(False)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def build(config: Config) -> Any:
    """The transformers model of a hub-spelled config, float32, eager attention, weights not yet meaningful."""
    config = copy.deepcopy(config)
    config_class = CONFIG_MAPPING[config["model_type"]]
    dtype = {key: config.pop(key) for key in ("torch_dtype", "dtype") if key in config}
    parsed = config_class.from_dict(config)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(parsed, dtype=torch.float32, attn_implementation=attention(config))
    set_experts(model)
    del dtype  # the case's storage decides
    return model.eval()


def attention(config: Config) -> str:
    """Eager, but for Falcon with ALiBi: transformers 5.23's eager path adds the distances twice (once in the mask)."""
    return "sdpa" if config["model_type"] == "falcon" and config.get("alibi") else "eager"


def set_experts(model: Any) -> None:
    """Experts one by one, in plain matmuls, where the family has them."""
    if "_experts_implementation" in vars(model.config) or hasattr(model.config, "_experts_implementation"):
        model.config._experts_implementation = "eager"


def fill(model: Any, case: Case, seed: int) -> None:
    """Overwrites every parameter and known persistent buffer in place, rounded to the case's storage dtype."""
    storage: torch.dtype = getattr(torch, case.storage)
    trivial = initial_vectors(model)
    transposed = IN_OUT.get(model.config.model_type, ())
    entries = dict(model.named_parameters())
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            entries[name] = buffer
    for name, tensor in entries.items():
        rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
        noise = torch.from_numpy(rng.standard_normal(tuple(tensor.shape)).astype(np.float32))
        tensor.copy_(fresh(name, noise, trivial.get(name), case, transposed).to(storage).to(tensor.dtype))


def initial_vectors(model: Any) -> dict[str, torch.Tensor]:
    """1-D parameters as a new model has them (norm weights 1 or 0, biases 0), remembered on the first call."""
    store: dict[str, torch.Tensor] | None = vars(model).get("fixture_initial_vectors")
    if store is None:
        store = {name: p.clone() for name, p in model.named_parameters() if p.ndim == 1}
        vars(model)["fixture_initial_vectors"] = store
    return store


def fresh(
    name: str, noise: torch.Tensor, initial: torch.Tensor | None, case: Case, transposed: tuple[str, ...]
) -> torch.Tensor:
    """New values for one tensor: the noise scaled by what the tensor is."""
    leaves = name.split(".")[-2:]
    if name.endswith(("bias", "e_score_correction_bias")):
        return 0.2 * noise
    if name.endswith("sinks"):
        return noise
    if noise.ndim == 1 or "norm" in leaves[0]:  # per-head norms are [heads, head_dim] (cohere)
        return (torch.ones_like(noise) if initial is None else initial) + 0.3 * noise
    if leaves[0] in EMBEDDINGS:
        return case.embedding_std * noise
    in_out = any(part in leaves for part in transposed)
    return case.gain * noise / noise.shape[-2 if in_out else -1] ** 0.5


def prompts(config: Any, seed: int) -> dict[str, list[int]]:
    """Random ids of both prompt lengths; ids below 8 (where the special tokens are) only as the first one."""
    rng = np.random.default_rng([seed, 1])
    found = {}
    for name, length in PROMPT_LENGTHS.items():
        ids = rng.integers(8, min(config.vocab_size, 256), length).tolist()
        found[name] = [1, *ids[1:]]
    return found


def logits_of(model: Any, ids: list[int]) -> np.ndarray:
    """Logits [T, V], float32, one pass without a cache."""
    forget_lengths(model)
    return model(torch.tensor([ids]), use_cache=False).logits[0].float().numpy()  # type: ignore[no-any-return]


def forget_lengths(model: Any) -> None:
    """Dynamic rotary frequencies remember the longest sequence ever seen; a reference must start afresh."""
    for module in model.modules():
        if "original_inv_freq" in module._buffers and module.rope_type == "dynamic":
            module.inv_freq = module.original_inv_freq.clone()
            module.max_seq_len_cached = module.original_max_seq_len


def greedy(model: Any, ids: list[int], *, cached: bool) -> tuple[list[int], float]:
    """24 greedy tokens (end-of-sequence ids do not stop it) and the smallest margin, in standard deviations."""
    forget_lengths(model)
    cache = DynamicCache(config=model.config) if cached else None
    tokens: list[int] = []
    margin = float("inf")
    step = ids
    while len(tokens) < GREEDY_TOKENS:
        out = model(torch.tensor([step]), past_key_values=cache, use_cache=cached).logits[0, -1].float()
        top = torch.topk(out, 2)
        margin = min(margin, float((top.values[0] - top.values[1]) / out.std()))
        tokens.append(int(top.indices[0]))
        step = [tokens[-1]] if cached else [*ids, *tokens]
        if margin < MIN_MARGIN:
            break
    return tokens, margin


def refusal(tokens: list[int], margin: float, reserved: set[int]) -> str | None:
    """Why these greedy tokens make a poor reference."""
    if margin < MIN_MARGIN:
        return "close choice"
    if len(set(tokens)) < MIN_DISTINCT:
        return "too few tokens"
    return "special token" if reserved & set(tokens) else None


def stable(model: Any, ids: list[int]) -> bool:
    """Whether embeddings off by one part in 100,000 leave the logits alone: no expert is chosen by a hair."""
    weight = model.get_input_embeddings().weight
    kept = weight.clone()
    before = logits_of(model, ids)
    noise = np.random.default_rng(0).standard_normal(tuple(weight.shape)).astype(np.float32)
    weight.mul_(1 + 1e-5 * torch.from_numpy(noise))
    after = logits_of(model, ids)
    weight.copy_(kept)
    return distance(before, after) < TOLERANCE / 2


def find_seed(case: Case, model: Any, prepare: Callable[[int], None]) -> int:
    """The first seed whose greedy tokens are clear choices, varied, and free of special ids.

    `prepare(seed)` gives the model that seed's weights, and they are in place on return.
    """
    reserved = set(range(8)) if case.tokenizer else set()
    reserved |= set(np.atleast_1d(model.config.eos_token_id).tolist())
    refusals: Counter[str] = Counter()
    for seed in range(case.seed, case.seed + MAX_SEEDS):
        prepare(seed)
        reasons = (
            refusal(*greedy(model, ids, cached=cached), reserved) or (None if stable(model, ids) else "unstable")
            for ids in prompts(model.config, seed).values()
            for cached in ([True, False] if case.rope_by_length else [True])
        )
        reason = next((reason for reason in reasons if reason), None)
        if reason is None:
            return seed
        refusals[reason] += 1
    raise SystemExit(f"{case.name}: no usable seed among {MAX_SEEDS}, change gain or embedding_std: {dict(refusals)}")


def reference(model: Any, case: Case, asked: Mapping[str, list[int]]) -> Reference:
    """Everything the tests compare with, from a model that was read back from the files."""
    found = Reference({}, {}, {}, 0.0)
    margins = []
    for name, ids in asked.items():
        found.logits[name] = logits_of(model, ids)
        found.greedy[name], margin = greedy(model, ids, cached=True)
        found.greedy_uncached[name], uncached_margin = greedy(model, ids, cached=False)
        margins += [margin, uncached_margin]
        if found.greedy[name] != found.greedy_uncached[name] and not case.rope_by_length:
            raise SystemExit(f"{case.name}: transformers disagrees with itself with and without a cache ({name})")
    return Reference(found.logits, found.greedy, found.greedy_uncached, min(margins))


def distance(one: np.ndarray, other: np.ndarray) -> float:
    """Largest difference of two logit arrays, in standard deviations of the first."""
    return float(np.abs(one - other).max() / one.std())


def read_back(directory: Path) -> Any:
    """The model as transformers reads it from the finished directory, in float32."""
    model = AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=torch.float32,
        attn_implementation=attention(json.loads((directory / "config.json").read_text())),
    )
    set_experts(model)
    return model.eval()


def sensitivity(case: Case, model: Any, asked: Mapping[str, list[int]], expected: Logits) -> dict[str, float | str]:
    """How far the logits move for each config value and each kind of vector that a reader could get wrong."""
    state = model.state_dict()
    moved: dict[str, float | str] = {}
    for label, config in config_trials(case).items():
        if config != case.config:
            moved[label] = config_distance(config, state, asked, expected)
    for label, names in vector_kinds(model).items():
        if not any(blind in label for blind in case.blind_vectors):
            moved[label] = vector_distance(model, names, asked, expected)
    weak = {key: value for key, value in moved.items() if isinstance(value, float) and value < MIN_SENSITIVITY}
    if weak:
        raise SystemExit(f"{case.name}: these would go unnoticed when wrong: {json.dumps(weak)}")
    return moved


def config_trials(case: Case) -> dict[str, Config]:
    """Wrong configs by label: a changed key at its base value, a probed number scaled, each entry of a nested dict."""
    skipped = {*case.inert, *STRUCTURAL}
    trials: dict[str, Config] = {key: case.without(key) for key in case.change if key not in skipped}
    for key, factor in PROBES.items():
        value = case.config.get(key)
        if isinstance(value, (int, float)) and key not in skipped:
            trials[f"{key} * {factor:g}"] = {**case.config, key: type(value)(value * factor)}
    scaling = case.config.get("rope_scaling") or {}
    for key, value in scaling.items():
        label = f"rope_scaling.{key}"
        if not isinstance(value, str) and label not in skipped:
            other = not value if isinstance(value, bool) else value[::-1] if isinstance(value, list) else value * 2
            trials[label] = {**case.config, "rope_scaling": {**scaling, key: other}}
    return trials


def furthest(model: Any, asked: Mapping[str, list[int]], expected: Logits) -> float:
    """The largest distance over the prompts."""
    return max(distance(expected[name], logits_of(model, ids)) for name, ids in asked.items())


def config_distance(config: Config, state: Mapping[str, Any], asked: Mapping[str, list[int]], expected: Logits) -> Any:
    """The distance under another config with the same tensors, or why it cannot be had."""
    try:
        other = build(config)
        result = other.load_state_dict(state, strict=False)
        if [name for name in result.missing_keys if "lm_head" not in name]:
            return "other tensors"
        return furthest(other, asked, expected)
    except Exception as error:  # whatever transformers raises, a reader would notice too
        return f"refused ({type(error).__name__})"


def vector_kinds(model: Any) -> dict[str, list[str]]:
    """1-D parameters grouped by name without layer numbers."""
    kinds: dict[str, list[str]] = {}
    for name in initial_vectors(model):
        label = ".".join("*" if part.isdigit() else part for part in name.split("."))
        kinds.setdefault(label, []).append(name)
    return kinds


def vector_distance(model: Any, names: list[str], asked: Mapping[str, list[int]], expected: Logits) -> float:
    """The distance when these vectors are what a new model has: norms plain, biases zero."""
    parameters = dict(model.named_parameters())
    trivial = initial_vectors(model)
    kept = {name: parameters[name].clone() for name in names}
    for name in names:
        parameters[name].copy_(trivial[name])
    moved = furthest(model, asked, expected)
    for name in names:
        parameters[name].copy_(kept[name])
    return moved
