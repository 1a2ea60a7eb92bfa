"""`config.json` and `generation_config.json` of a GGUF file, made from its metadata and what its tensors tell."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from runner.checkpoint.gguf.architecture import (
    COMMON_KEYS,
    ENCODER_KEYS,
    HARMLESS,
    ROPE_TENSORS,
    STACK_KEYS,
    ZERO_MEANS_NONE,
    Architecture,
)
from runner.checkpoint.gguf.architectures import ARCHITECTURES
from runner.checkpoint.gguf.container import Container, brief
from runner.config.base import MAX_DIMENSION
from runner.config.problems import listed
from runner.config.rope import RopeScaling, attention_factor, inverse_frequencies
from runner.errors import CheckpointError
from runner.local_files import quoted

_PUBLISHED_LLAMA3 = ((8.0, 8192), (32.0, 8192))  # factor and original context of Llama 3.1 / 3.3, and of 3.2


def architecture_of(container: Container) -> Architecture:
    """Look up the file's architecture in the table.

    Raises:
        CheckpointError: the table does not have it; the message names the supported ones.
    """
    name, kind = container.metadata.get("general.architecture"), container.metadata.get("general.type", "model")
    if kind != "model":
        raise CheckpointError(f"{container.path}: general.type is {brief(kind)}; only whole models are supported")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise CheckpointError(f"{container.path}: architecture {brief(name)} is not supported; supported: {known}")
    found = ARCHITECTURES[name]
    return found.with_experts if found.with_experts and container.metadata.get(f"{name}.expert_count") else found


def config_of(container: Container) -> dict[str, Any]:
    """Make the file's `config.json`, with transformers' keys but without token ids.

    Raises:
        CheckpointError: a key is missing, has a value of the wrong kind, or is unknown and could affect the results.
    """
    return _Metadata(container, architecture_of(container)).config()


def generation_config_of(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Make `generation_config.json` from the sampling defaults `general.sampling.*`; `{}` where the file has none."""
    names = {
        "temp": "temperature",
        "top_k": "top_k",
        "top_p": "top_p",
        "min_p": "min_p",
        "penalty_repeat": "repetition_penalty",
    }
    found = {
        key: _decimal(metadata[f"general.sampling.{name}"])
        for name, key in names.items()
        if isinstance(metadata.get(f"general.sampling.{name}"), int | float)
    }
    return {**found, "do_sample": True} if found else {}


class _Metadata:
    """The metadata keys below `<architecture>.`.

    Each key that is asked for is noted in `read`; a key that is never read must be one that cannot affect the results.
    """

    def __init__(self, container: Container, architecture: Architecture) -> None:
        self.container = container
        self.architecture = architecture
        self.prefix = f"{container.metadata['general.architecture']}."
        self.values = {
            key.removeprefix(self.prefix): value
            for key, value in container.metadata.items()
            if key.startswith(self.prefix)
        }
        self.read: set[str] = set()

    def error(self, what: str) -> CheckpointError:
        """An error that names the file and the problem, for the caller to raise."""
        return CheckpointError(f"{self.container.path}: {what}")

    def get(self, key: str) -> Any:
        """The value of a key, None where it is missing. A list of one equal value per layer counts as that value."""
        self.read.add(key)
        value = self.values.get(key)
        if isinstance(value, np.ndarray):
            if not value.size or not (value == value[0]).all():
                raise self.error(f"{self.prefix}{key} differs from layer to layer, which is not supported")
            return value[0].item()
        return value

    def number(self, key: str) -> int | float | None:
        """A finite number, None where the key is missing."""
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
            raise self.error(f"{self.prefix}{key} is {brief(value)}, expected a number")
        return _decimal(value)

    def first(self, *keys: str, default: float) -> float:
        """The number under the first of the keys that is there: 0 is one, and means nothing else."""
        return float(next((value for key in keys if (value := self.number(key)) is not None), default))

    def size(self, key: str) -> int | None:
        """A positive integer (a dimension or a count), None where the key is missing."""
        value = self.number(key)
        if value is not None and (not isinstance(value, int) or not 1 <= value <= MAX_DIMENSION):
            raise self.error(f"{self.prefix}{key} is {value}, expected an integer from 1 to {MAX_DIMENSION}")
        return value

    @property
    def layers(self) -> int:
        """How many layers the model has, without those for multi-token prediction."""
        layers = self.needs("block_count")
        return layers - (self.count("nextn_predict_layers", layers - 1) if self.architecture.predicts else 0)

    @property
    def tensors(self) -> Mapping[str, Any]:
        """The file's tensors, by GGUF's names."""
        return self.container.tensors

    def needs(self, key: str) -> int:
        """A size that must be there."""
        value = self.size(key)
        if value is None:
            raise self.error(f"{self.prefix}{key} is missing")
        return value

    def floats(self, key: str) -> Sequence[float] | None:
        """A number for each layer, which may be infinite; None where there is no such list."""
        self.read.add(key)
        values, layers = self.values.get(key), self.layers
        if values is None:
            return None
        if not isinstance(values, np.ndarray) or len(values) < layers or values.dtype.kind != "f":
            raise self.error(f"{self.prefix}{key} is {brief(values)}, expected a number for each of {layers} layers")
        return [float(value) for value in values[:layers]]

    def truth(self, key: str) -> bool:
        """A boolean, false where the key is missing."""
        value = self.get(key)
        if value not in (None, True, False):
            raise self.error(f"{self.prefix}{key} is {brief(value)}, expected true or false")
        return bool(value)

    def each(self, key: str) -> Sequence[int] | None:
        """An integer from 0 on, or a flag as 0 or 1, for each layer, from a list or from one for all; None: no key."""
        self.read.add(key)
        values, layers = self.values.get(key), self.layers
        if values is None:
            return None
        if isinstance(values, int) and not isinstance(values, bool):
            values = np.full(layers, values)
        if not isinstance(values, np.ndarray) or len(values) < layers or values.dtype.kind not in "iub":
            raise self.error(f"{self.prefix}{key} is {brief(values)}, expected a number for each of {layers} layers")
        found = [int(value) for value in values[:layers]]
        if not all(0 <= value <= MAX_DIMENSION for value in found):
            raise self.error(f"{self.prefix}{key} holds a number that is not from 0 to {MAX_DIMENSION}")
        return found

    def config(self) -> dict[str, Any]:
        """The whole of `config.json`, once every key of the file has been accounted for."""
        table = self.architecture
        config: dict[str, Any] = {"architectures": [table.class_name], "model_type": table.model_type, **table.fixed}
        if table.layer_kinds is not None:
            self.kinds(config, table.layer_kinds)
        if table.own is not None:
            config |= table.own(self)
        if not table.attends:
            self.read |= COMMON_KEYS.keys()
        for key, name in (COMMON_KEYS if table.attends else STACK_KEYS).items():
            config[name] = config.get(name) or self.size(key)
            # Where all layers have experts, there may be no width of an MLP.
            optional = key == "feed_forward_length" and "expert_feed_forward_length" in table.keys
            if config[name] is None and optional:
                del config[name]
            elif config[name] is None and key != "attention.head_count_kv":
                raise self.error(f"{self.prefix}{key} is missing")
        missing = [key for key in sorted(table.needed) if self.get(key) is None]
        if missing:
            raise self.error(f"{self.prefix}{missing[0]} is missing")
        # Then the family's own keys, which a file may leave out: `fixed` or the config class has defaults.
        for key, name in table.keys.items():
            value = self.number(key)
            if value is not None:
                config[name] = None if value == 0 and name in ZERO_MEANS_NONE else value
        for key, name in table.truths.items():
            config[name] = self.truth(key)
        config["num_hidden_layers"] = self.layers
        if table.recurrent:
            self.recurrence(config)
        if table.attends:
            config["num_key_value_heads"] = config["num_key_value_heads"] or config["num_attention_heads"]
        # The rest is read off the tensors: optional biases, the vocabulary's size, and whether the head is tied.
        tensors = self.container.tensors
        if "token_embd.weight" not in tensors:
            raise self.error(
                "no tensor token_embd.weight, so this is not a model; does the file hold a vocabulary alone?"
            )
        config |= {flag: name in tensors for flag, name in table.flags.items()}
        config["vocab_size"] = tensors["token_embd.weight"].shape[0]
        config["tie_word_embeddings"] = "output.weight" not in tensors
        self.windows(config)
        if table.latent:
            self.latents(config)
        elif table.sized:
            self.heads(config)
        if table.rotates:
            self.rope(config)
        if table.rope_by_type:
            base, scaling = config.pop("rope_theta"), config.pop("rope_scaling", None) or {"rope_type": "default"}
            windowed = self.first("rope.freq_base_swa", default=base)
            config["rope_parameters"] = {
                "full_attention": {**scaling, "rope_theta": base},
                "sliding_attention": {"rope_type": "default", "rope_theta": windowed},
            }
        for name, other in table.renames.items():
            value = config.pop(name, None)
            if other is not None and value is not None:
                config[other] = value
        self.refuse_unknown()
        return config

    def kinds(self, config: dict[str, Any], names: tuple[str, str]) -> None:
        """Set `layer_types` and `num_key_value_heads` from a list of key-value heads for each layer, some of them 0."""
        key, layers = "attention.head_count_kv", self.size("block_count")
        counts = self.values.get(key)
        if not isinstance(counts, np.ndarray) or len(counts) != layers or counts.dtype.kind not in "iu":
            raise self.error(f"{self.prefix}{key} is {brief(counts)}, expected a number for each of {layers} layers")
        different = sorted({int(count) for count in counts if count})
        if len(different) != 1 or not 0 < different[0] <= MAX_DIMENSION:
            raise self.error(f"{self.prefix}{key} is {brief(counts)}, expected one number of heads and 0")
        self.read.add(key)
        config["num_key_value_heads"] = different[0]
        config["layer_types"] = [names[bool(count)] for count in counts]

    def count(self, key: str, most: int) -> int:
        """An integer from 0 to `most`, 0 where the key is missing."""
        value = self.number(key) or 0
        if not isinstance(value, int) or not 0 <= value <= most:
            raise self.error(f"{self.prefix}{key} is {value}, expected an integer from 0 to {most}")
        return value

    def recurrence(self, config: dict[str, Any]) -> None:
        """Set `layer_types` and `linear_value_head_dim`."""
        layers, heads, size = config["num_hidden_layers"], self.size("ssm.time_step_rank"), self.size("ssm.inner_size")
        needed = ("ssm.conv_kernel", "ssm.state_size", "ssm.group_count", "ssm.time_step_rank", "ssm.inner_size")
        missing = [key for key in needed if self.size(key) is None]
        if missing or heads is None or size is None or size % heads:
            raise self.error(f"{self.prefix}{missing[0]} is missing" if missing else f"{size} numbers in {heads} heads")
        config["linear_value_head_dim"] = size // heads
        self.read |= {"attention.recurrent_layers", "rope.dimension_sections"}  # the sections of images: text has one
        flags, period = self.values.get("attention.recurrent_layers"), self.size("full_attention_interval") or 4
        if flags is None:
            flags = [(index + 1) % period != 0 for index in range(layers)]
        elif not isinstance(flags, np.ndarray) or len(flags) < layers:
            raise self.error(f"{self.prefix}attention.recurrent_layers is {brief(flags)}, expected {layers} flags")
        kinds = ("full_attention", "linear_attention")
        config["layer_types"] = [kinds[bool(flag)] for flag in flags[:layers]]

    def windows(self, config: dict[str, Any]) -> None:
        """Set `sliding_window`, and which layers use it."""
        table, window = self.architecture, config.get("sliding_window")
        # Mistral's files have the architecture "llama"; only the window makes a difference to the results.
        if table.windowed is not None and window:
            config |= {"model_type": table.windowed[0], "architectures": [table.windowed[1]]}
        elif table.windowed is not None:
            config.pop("sliding_window", None)
        if table.window_period is None or (table.windowed is not None and not window):
            return
        # The file gives a period or a flag for each layer; `local` says for each layer whether it has a window.
        layers = config["num_hidden_layers"]
        self.read.add("attention.sliding_window_pattern")
        pattern = self.values.get("attention.sliding_window_pattern", table.window_period)
        if isinstance(pattern, int) and not isinstance(pattern, bool) and 0 < pattern < 1 << 16:
            local = [(index + 1) % pattern != 0 for index in range(layers)]
        elif isinstance(pattern, np.ndarray) and len(pattern) == layers:
            local = [bool(flag) for flag in pattern]
        else:
            raise self.error(
                f"{self.prefix}attention.sliding_window_pattern is {brief(pattern)}, "
                f"expected a period or a flag for each of {layers} layers"
            )
        local = local if window else [False] * layers
        # Written as a period where the family has a key for one and one fits (the usual one is tried first); not at all
        # where the family's usual period fits; else as a list.
        usual = table.window_period
        # Of others only the place of the first layer without a window can be one.
        first = local.index(False) + 1 if False in local else usual
        periods = [p for p in (usual, first) if local == [(i + 1) % p != 0 for i in range(layers)]]
        if table.period_key is not None and periods:
            config[table.period_key] = periods[0]
        elif usual not in periods:
            config["layer_types"] = ["sliding_attention" if flag else "full_attention" for flag in local]

    def heads(self, config: dict[str, Any]) -> None:
        """Set `head_dim`, `query_pre_attn_scalar`, and `partial_rotary_factor`."""
        table, heads, hidden = self.architecture, config["num_attention_heads"], config["hidden_size"]
        # Families that derive the head size get the key `head_dim` only where the file's size is another.
        derived = hidden // heads
        width = self.size("attention.key_length") or derived
        if not width:
            raise self.error(f"{heads} attention heads, but a hidden size of {hidden}, which leaves nothing for a head")
        if (self.size("attention.value_length") or width) != width:
            raise self.error("keys and values of different sizes are not supported")
        if table.head_dim or width != derived:
            config["head_dim"] = width
        rotated = self.size("rope.dimension_count") or width
        if rotated != width:
            config["partial_rotary_factor"] = rotated / width
        # The attention scale is query_pre_attn_scalar^-0.5; where the file lacks it, the number of layers decides.
        if table.query_scalar is not None:
            scale = self.number("attention.scale")
            usual = derived if config["num_hidden_layers"] == table.query_scalar else width
            config["query_pre_attn_scalar"] = _near_whole(scale**-2) if scale and scale > 0 else usual

    def latents(self, config: dict[str, Any]) -> None:
        """Set the sizes of DeepSeek's latent attention, and V3's name and way of choosing experts where a file has it.

        llama.cpp has one name for V2 and V3, which differ in the scores of experts: softmaxes, or sigmoids.
        """
        config["num_key_value_heads"] = config["num_attention_heads"]
        # Files from before 2025-04 give the sizes of a head; later ones a latent's, and a head's under other names.
        given = [self.size(f"attention.{part}_length") for part in ("key", "value")]
        heads = [self.size(f"attention.{part}_length_mla") for part in ("key", "value")]
        (key, value), rotated = heads if all(heads) else given, self.size("rope.dimension_count")
        if key is None or value is None or rotated is None or key <= rotated:
            raise self.error(f"attention with keys of {key} numbers, {rotated} of them rotated, and values of {value}")
        config |= {"qk_rope_head_dim": rotated, "qk_nope_head_dim": key - rotated, "v_head_dim": value}
        # Files of GLM-4.7-Flash do not say; only V3's scores come with corrections.
        corrected = any(name.endswith("exp_probs_b.bias") for name in self.tensors)
        scores = self.number("expert_gating_func") or (2 if corrected else 1)
        if scores not in (1, 2):
            raise self.error(f"{self.prefix}expert_gating_func is {scores}, expected 1 (softmax) or 2 (sigmoid)")
        if scores == 2:
            if self.architecture.model_type == "deepseek_v2":
                config |= {"model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"]}
            if "n_group" not in config or "topk_group" not in config:
                # Files from before 2025-11, of which nobody can tell whether the model has groups.
                raise self.error(f"{self.prefix}expert_group_count is missing; a newer converter writes it")
        elif config.get("n_group", 1) > 1:
            config["topk_method"] = "group_limited_greedy"

    def rope(self, config: dict[str, Any]) -> None:
        """Set `rope_theta` and `rope_scaling`: from the file's tables of factors if there are any, else from keys."""
        config["rope_theta"] = self.first("rope.freq_base", "rope.global.freq_base", default=10000.0)
        local = self.number("rope.freq_base_swa")
        read = self.architecture.rope_by_type or "rope.freq_base_swa" in self.architecture.keys
        if local not in (None, config["rope_theta"]) and not read:
            raise self.error(f"{self.prefix}rope.freq_base_swa is {local}, but {config['rope_theta']} without a window")
        tables = [name for name in ROPE_TENSORS if name in self.container.tensors]
        kind, factor = self.get("rope.scaling.type"), self.number("rope.scaling.factor")
        attention = self.number("rope.scaling.attn_factor")
        # Tables of factors win over keys; a table together with another kind of scaling has no known meaning.
        if tables == ["rope_freqs.weight"] and kind in (None, "none"):
            config["rope_scaling"] = self.divisors(config, self.table("rope_freqs.weight"))
        elif tables == list(ROPE_TENSORS[1:]) and kind in (None, "longrope"):
            config["rope_scaling"] = self.longrope(config, attention)
        elif tables:
            raise self.error(f"{' and '.join(tables)} with rope.scaling.type {brief(kind)} is not supported")
        elif kind == "yarn":
            config["rope_scaling"] = self.yarn(factor)
        elif factor not in (None, 0, 1) and kind in (None, "linear"):
            config["rope_scaling"] = {"rope_type": "linear", "factor": factor}
        elif kind not in (None, "none", "linear"):
            raise self.error(f"rope.scaling.type {brief(kind)} is not supported")
        # Only longrope uses the attention factor; elsewhere it would be ignored silently.
        if attention not in (None, 1.0) and tables != list(ROPE_TENSORS[1:]):
            raise self.error(f"{self.prefix}rope.scaling.attn_factor = {attention} is not supported here")

    def yarn(self, factor: float | None) -> dict[str, Any]:
        """YaRN's `rope_scaling` (arXiv:2309.00071)."""
        names = {
            "original_context_length": "original_max_position_embeddings",
            "yarn_attn_factor": "attention_factor",
            "yarn_beta_fast": "beta_fast",
            "yarn_beta_slow": "beta_slow",
        }
        found = {name: self.number(f"rope.scaling.{key}") for key, name in names.items()}
        if self.number("rope.scaling.yarn_ext_factor") not in (None, 1.0):
            raise self.error(f"{self.prefix}rope.scaling.yarn_ext_factor other than 1 is not supported")
        given = {name: value for name, value in found.items() if value is not None}
        table = self.architecture
        if table.log_multiplier is not None and (scale := self.number("rope.scaling.yarn_log_multiplier")):
            # Only one of the two is stored: llama.cpp takes them for equal, so that they cancel in RoPE's own factor.
            scale = float(f"{scale / table.log_multiplier:.6g}")
            given |= {"mscale": scale, "mscale_all_dim": scale}
        if table.tempered and (beta := self.number("attention.temperature_scale")):
            given["llama_4_scaling_beta"] = beta
        return {"rope_type": "yarn", "factor": factor or 1.0, **table.yarn, **given}

    def longrope(self, config: dict[str, Any], attention: float | None) -> dict[str, Any]:
        """Phi-3's `rope_scaling`, with its two tables.

        The attention factor usually follows from the two context lengths; it is written only where it does not.
        """
        scaling: dict[str, Any] = {
            "rope_type": "longrope",
            "long_factor": self.table("rope_factors_long.weight"),
            "short_factor": self.table("rope_factors_short.weight"),
        }
        original = config.get("original_max_position_embeddings")
        # What the model would compute from the config alone, to be compared with the file's factor.
        parsed = RopeScaling.from_dict({**scaling, "original_max_position_embeddings": original})
        usual = attention_factor(parsed, max_position_embeddings=config["max_position_embeddings"])
        if attention is not None and not math.isclose(attention, usual, rel_tol=1e-5):
            scaling["attention_factor"] = attention
        return scaling

    def divisors(self, config: dict[str, Any], table: list[float]) -> dict[str, Any]:
        """The `rope_scaling` that equals a table of divisors, one for each frequency: llama.cpp's form of Llama 3's.

        Where the table equals a published Llama 3 scaling to float32's precision, that is written as "llama3". Any
        other table is written as it is, as a longrope whose short and long factors are the same.
        """
        base, dims, limit = config["rope_theta"], 2 * len(table), config["max_position_embeddings"]
        plain = inverse_frequencies(RopeScaling(), dims=dims, base=base, max_position_embeddings=limit)
        # A divisor is the plain frequency over the scaled one; try each published scaling against the whole table.
        for factor, original in _PUBLISHED_LLAMA3:
            named = {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": original,
            }
            scaled = inverse_frequencies(
                RopeScaling.from_dict(named), dims=dims, base=base, max_position_embeddings=limit
            )
            if np.allclose([p / s for p, s in zip(plain, scaled, strict=True)], table, rtol=2e-6, atol=0):
                return named
        return {
            "rope_type": "longrope",
            "short_factor": table,
            "long_factor": table,
            "attention_factor": 1.0,
            "original_max_position_embeddings": limit,
        }

    def table(self, name: str) -> list[float]:
        """Read a small float32 vector of positive numbers."""
        entry = self.container.tensors[name]
        if entry.format.dtype != "F32" or entry.format.count != 1 or len(entry.shape) != 1 or entry.shape[0] > 4096:
            raise self.error(f"{name} is {entry.format.name} {list(entry.shape)}, expected a vector of F32")
        numbers = np.concatenate([rows.view("<f4")[:, 0] for _, rows in self.container.rows(entry)])
        if not (np.isfinite(numbers) & (numbers > 0)).all():
            raise self.error(f"{name} holds a number that is not finite and positive")
        return [float(_decimal(float(number))) for number in numbers]

    def refuse_unknown(self) -> None:
        """Raise an error that names the keys nobody read and whose values could affect the results."""
        unknown = []
        for key, value in self.values.items():
            own = self.architecture.only
            allowed = (own[key],) if key in own else HARMLESS.get(key, ())
            if (
                key not in self.read
                and not key.startswith(ENCODER_KEYS)
                and allowed is not None
                and value not in allowed
            ):
                unknown.append(f"{quoted(self.prefix + key)} = {brief(value)}")
        if unknown:
            raise self.error(f"metadata that is not understood and could change the numbers: {listed(unknown)}")


def _decimal(value: int | float) -> int | float:
    """The shortest decimal that rounds to the float32 `value`: 1e-05 was stored, not 9.999999747378752e-06."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _near_whole(value: float) -> float:
    """`value`, or the integer that it equals to a relative 1e-5."""
    return round(value) if math.isclose(value, round(value), rel_tol=1e-5) else value
