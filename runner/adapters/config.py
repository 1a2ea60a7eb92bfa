"""`adapter_config.json` of PEFT's LoRA and DoRA: every key that changes results is used, or refused by name.

Source of the keys' meaning: PEFT 0.21 (`peft.tuners.lora.config`, `check_target_module_exists`, `get_pattern_key`).
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, ItemsView, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from runner.adapters.pattern import Effort, NamePattern
from runner.adapters.pattern_table import PatternTable
from runner.adapters.values import number, positive, short_value
from runner.config.problems import listed
from runner.errors import ConfigError
from runner.local_files import quoted

Modules = frozenset[str] | NamePattern
"""Module names (ends of full names, at a dot), or a pattern that matches full names."""

HARMLESS = frozenset(
    ["auto_mapping", "base_model_name_or_path", "corda_config", "ephemeral_gpu_offload", "eva_config",
     "fan_in_fan_out", "inference_mode", "loftq_config", "lora_dropout", "lora_ga_config", "megatron_core",
     "peft_version", "qalora_group_size", "revision", "runtime_config", "velora_config"]
)  # fmt: skip
"""Keys that are ignored: about training, about where the base came from, or settings of methods that other keys turn
on. `fan_in_fan_out` says how the base stores its matrices, which the base's family knows."""

STARTS = (True, False, "gaussian", "eva", "orthogonal", "mica")
"""Values of `init_lora_weights` that leave the base unchanged."""

CHANGED_BASE = re.compile(r"pissa(_niter_\d+)?|olora|corda|lora_ga|loftq")
"""Values of `init_lora_weights` that changed the base before training: the adapter fits only that changed base."""

ALL_LINEAR = "all-linear"
MAX_NAMES = 1024
"""Names in a list that is searched for every module; lists of targets, which are looked up, have no limit."""


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """The keys of `adapter_config.json` that are used. Modules have transformers' names (no `base_model.model.`)."""

    r: int = 8
    lora_alpha: float = 8
    use_rslora: bool = False
    use_dora: bool = False
    bias: str = "none"
    target_modules: Modules = frozenset()
    exclude_modules: Modules = frozenset()
    layers_to_transform: frozenset[int] = frozenset()
    layers_pattern: tuple[str, ...] = ()
    modules_to_save: tuple[str, ...] = ()
    rank_pattern: PatternTable[int] | None = None
    alpha_pattern: PatternTable[float] | None = None
    target_parameters: frozenset[str] = frozenset()
    trainable_token_indices: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    ensure_weight_tying: bool = False

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> AdapterConfig:
        """Read the object in `adapter_config.json`.

        Raises:
            ConfigError: the method is not LoRA, a value is invalid, or a key that could change results is not
                understood; the message lists all problems.
        """
        problems = _refused(raw)
        values: dict[str, Any] = {}
        for item in dataclasses.fields(cls):
            if raw.get(item.name) is None:
                continue
            try:
                values[item.name] = _READ[item.name](raw[item.name])
            except ConfigError as error:
                problems.append(f"{item.name} {error}, not {short_value(raw[item.name])}")
        if isinstance(values.get("target_modules"), NamePattern) and values.get("layers_to_transform"):
            problems.append("layers_to_transform needs target_modules as a list")
        if problems:
            raise ConfigError(listed(problems, "; "))
        return cls(**values)

    def targets(self, names: Sequence[str], *, linear: bool) -> bool:
        """Whether the config gives the module an adapter.

        Args:
            names: all names of the module: a match with any of them counts.
            linear: whether the module is a matrix within the layers, which `all-linear` includes.
        """
        return any(self._targets(name, linear) for name in names)

    def targets_parameter(self, names: Sequence[str]) -> bool:
        """Whether the config gives a parameter (all experts of a layer in one tensor), known by `names`, an adapter."""
        return any(_listed(self.target_parameters, name) for name in names)

    def _targets(self, name: str, linear: bool) -> bool:
        # Modules that are excluded or trained as a whole have no factors, whatever else matches.
        if _listed(self.exclude_modules, name) or any(_within(saved, name) for saved in self.modules_to_save):
            return False
        if isinstance(self.target_modules, NamePattern):
            all_linear = self.target_modules.text.lower() == ALL_LINEAR
            return linear if all_linear else self.target_modules.matches(name)
        if name in self.target_modules:  # a full name is not restricted to `layers_to_transform`
            return True
        return _listed(self.target_modules, name) and (not self.layers_to_transform or self._layer(name))

    def _layer(self, name: str) -> bool:
        """Whether the layer index in `name` is one of `layers_to_transform`.

        The index is the first number after one of `layers_pattern`, or after any word where that is empty.
        """
        words = name.split(".")
        numbers = [at for at, word in enumerate(words[:-1]) if word.isdecimal() and len(word) < 10]
        if self.layers_pattern:
            # A pattern may be several words long; the earliest place in the name counts.
            ends = [(at - len(part.split(".")), at) for part in self.layers_pattern for at in numbers
                    if f".{'.'.join(words[:at])}".endswith(f".{part}")]  # fmt: skip
            return bool(ends) and int(words[min(ends)[1]]) in self.layers_to_transform
        first = next((at for at in numbers if at >= 2), None)
        return first is not None and int(words[first]) in self.layers_to_transform

    def rank(self, names: Sequence[str]) -> int:
        """The rank r of the module known by `names`."""
        return self.r if self.rank_pattern is None else self.rank_pattern.find(names, self.r)

    def scale(self, names: Sequence[str]) -> float:
        """The factor that multiplies B A: alpha / r, or alpha / sqrt(r) (rsLoRA, arXiv:2312.03732)."""
        rank = self.rank(names)
        alpha = self.lora_alpha if self.alpha_pattern is None else self.alpha_pattern.find(names, self.lora_alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def saves(self, name: str) -> bool:
        """Whether the module was trained as a whole (`modules_to_save`)."""
        return any(_within(saved, name) or name.endswith(saved) for saved in self.modules_to_save)


def _refused(raw: Mapping[str, Any]) -> list[str]:
    """List the problems with keys that are not fields of `AdapterConfig`."""
    problems = []
    if raw.get("peft_type") != "LORA":
        problems.append(f"peft_type {short_value(raw.get('peft_type'))} is not supported, only 'LORA' is")
    if raw.get("task_type") not in (None, "CAUSAL_LM"):
        problems.append(f"task_type {short_value(raw['task_type'])} is not supported, only 'CAUSAL_LM' is")
    start = raw.get("init_lora_weights", True)
    if isinstance(start, str) and CHANGED_BASE.fullmatch(start):
        problems.append(
            f"init_lora_weights {start!r} changed the base before training, so the adapter does not fit the base "
            "itself: save it with PEFT's path_initial_model_for_weight_conversion"
        )
    elif start is not None and start not in STARTS:
        problems.append(f"init_lora_weights {short_value(start)} is not understood")
    # An unknown key is harmless only while it is off.
    known = {item.name for item in dataclasses.fields(AdapterConfig)}
    known |= HARMLESS | {"peft_type", "task_type", "init_lora_weights"}
    for name in raw:
        if name not in known and raw[name] not in (None, False, [], {}):
            shown = f"key {quoted(name)} = {short_value(raw[name])}"
            problems.append(f"{shown} could change the numbers and is not supported")
    return problems


# --- matching names ---------------------------------------------------------------------------------------------------


def _listed(modules: Modules, name: str) -> bool:
    """Whether `name` matches a pattern as a whole, or ends with one of the names in a list, at a dot."""
    if isinstance(modules, NamePattern):
        return modules.matches(name)
    words = name.split(".")
    return any(".".join(words[at:]) in modules for at in range(len(words)))


def _within(module: str, name: str) -> bool:
    """Whether `name` is the module or lies in it; `module` may start at any dot of `name`."""
    return f".{module}." in f".{name}."


# --- reading values ---------------------------------------------------------------------------------------------------


def _index(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 31:
        raise ConfigError("must be an index or a list of indices")
    return value


def _flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise ConfigError("must be true or false")
    return value


def _bias(value: object) -> str:
    if value not in ("none", "all", "lora_only"):
        raise ConfigError("must be none, all or lora_only")
    return str(value)


def _strings(value: object) -> list[str]:
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list) or not all(isinstance(item, str) and item for item in value):
        raise ConfigError("must be a list of names")
    return value


def _names(value: object) -> tuple[str, ...]:
    names = tuple(_strings(value))
    if len(names) > MAX_NAMES:
        raise ConfigError(f"must have at most {MAX_NAMES} names")
    return names


def _set(value: object) -> frozenset[str]:
    return frozenset(_strings(value))


def _modules(key: str, value: object) -> Modules:
    return NamePattern.compile(value, Effort(key)) if isinstance(value, str) else _set(value)


def _indices(value: object) -> tuple[int, ...]:
    return tuple(_index(item) for item in (value if isinstance(value, list) else [value]))


def _layers(value: object) -> frozenset[int]:
    return frozenset(_indices(value))


def _tokens(value: object) -> dict[str, tuple[int, ...]]:
    """Token ids by the name of a table; a bare list is for the model's embeddings, under the name ""."""
    named = value if isinstance(value, dict) else {"": value}
    if len(named) > MAX_NAMES:
        raise ConfigError(f"must name at most {MAX_NAMES} tables")
    return {name: _indices(indices) for name, indices in named.items()}


def _ranks(value: object) -> PatternTable[int]:
    return PatternTable.compile("rank_pattern", {pattern: positive(rank) for pattern, rank in _entries(value)})


def _alphas(value: object) -> PatternTable[float]:
    return PatternTable.compile("alpha_pattern", {pattern: number(alpha) for pattern, alpha in _entries(value)})


def _entries(value: object) -> ItemsView[str, object]:
    """The entries of an object whose keys are patterns of module names."""
    if not isinstance(value, dict):
        raise ConfigError("must be an object of patterns and their values")
    return value.items()


_READ: Mapping[str, Callable[[object], Any]] = {
    "r": positive,
    "lora_alpha": number,
    "use_rslora": _flag,
    "use_dora": _flag,
    "bias": _bias,
    "target_modules": partial(_modules, "target_modules"),
    "exclude_modules": partial(_modules, "exclude_modules"),
    "layers_to_transform": _layers,
    "layers_pattern": _names,
    "modules_to_save": _names,
    "rank_pattern": _ranks,
    "alpha_pattern": _alphas,
    "target_parameters": _set,
    "trainable_token_indices": _tokens,
    "ensure_weight_tying": _flag,
}
