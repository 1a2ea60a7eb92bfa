"""Config classes: frozen, keyword-only dataclasses that carry `config.json`'s names, read by one function.

A field is named as its key is, or carries the key as a tag: `eps: float = key("rms_norm_eps", default=1e-6)`. Both
spellings of transformers give the same object. A key that no field reads, and that is not known to be harmless, is
refused by name: a runner that skips a key it does not know computes something else than the model's authors did.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field
from typing import Any, ClassVar, Self, TypeVar

from runner.config.harmless_keys import HARMLESS
from runner.config.rope import RopeScaling
from runner.errors import ConfigError

_KEY = "runner.key"
_ALSO = "runner.also"
_MINIMUM = "runner.minimum"
C = TypeVar("C", bound="Config")

FULL, SLIDING = "full_attention", "sliding_attention"
"""`layer_types` of transformers."""

MAX_DIMENSION = 1 << 24
"""No published size comes near it; a larger one is a damaged or hostile file, refused before anything is allocated."""


def key(name: str | None = None, *, also: str | None = None, default: Any = MISSING, minimum: int = 1) -> Any:
    """A field read from `config.json`'s key `name` (None: the field's own name); an integer is at least `minimum`.

    `also` is an older name of the same key; where both are there, they must agree.
    """
    metadata = {_MINIMUM: minimum, _ALSO: also, **({} if name is None else {_KEY: name})}
    return field(default=default, metadata=metadata)


def fixed(value: Any) -> Any:
    """A field of the parent class that is always `value` here, and no key of `config.json`."""
    return field(init=False, default=value)


@dataclass(frozen=True)
class Quantized:
    """`quantization` of an MLX checkpoint: the form of packed layers, and the layers that differ.

    A form is `(bits, group_size, mode)`; None says that a layer is not packed.
    """

    default: tuple[int, int, str]
    layers: Mapping[str, tuple[int, int, str] | None]

    @classmethod
    def from_dict(cls, raw: object) -> Quantized:
        """Read the object as mlx-lm writes it.

        Raises:
            ConfigError: it has another form, or names a mode that is not MLX's.
        """
        if not isinstance(raw, Mapping):
            raise ConfigError(f"quantization must be an object, not {_short(raw)}")
        if "quant_method" in raw:
            raise ConfigError(
                f"quant_method {raw['quant_method']!r} is not supported for this model; gptq, awq, fp8, "
                "compressed-tensors, MLX's own and plain checkpoints are"
            )
        layers: dict[str, tuple[int, int, str] | None] = {}
        for name, value in raw.items():
            if isinstance(value, Mapping):
                layers[name] = _form(value)
            elif value is False:
                layers[name] = None
        return cls(_form(raw), layers)


def _form(raw: Mapping[str, Any]) -> tuple[int, int, str]:
    bits, group_size, mode = raw.get("bits"), raw.get("group_size"), raw.get("mode", "affine")
    if (
        mode not in ("affine", "mxfp4", "mxfp8", "nvfp4")
        or not isinstance(bits, int)
        or not isinstance(group_size, int)
    ):
        raise ConfigError(f"quantization needs bits, group_size and a mode MLX knows, not {_short(dict(raw))}")
    return bits, group_size, mode


@dataclass(frozen=True, kw_only=True)
class Config:
    """What every family has. Dimensions in elements, `max_position_embeddings` in tokens."""

    model_type: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    quantization: Quantized | None = None
    layer_index: int | None = field(init=False, default=None, metadata={_MINIMUM: 0})
    INERT: ClassVar[frozenset[str]] = frozenset()
    """Keys of this family's files that change no number: each class that names some says why."""
    ONLY: ClassVar[Mapping[str, object]] = {}
    """Keys of this family's files that have one value in all of them; a model for another was never published."""
    NULL: ClassVar[Mapping[str, object]] = {}
    """What null stands for where it is not the default."""

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            _check_minimum(item, getattr(self, item.name))

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Self:
        """Read `config.json`'s object.

        Raises:
            ConfigError: a key is missing, has a value of the wrong type, or is unknown (and set); all of them at once.
        """
        return read(cls, raw)

    def for_layer(self, index: int) -> Self:
        """The config that layer `index` is built from: its `layer_index` is set, so that properties may differ."""
        layer = copy.copy(self)
        object.__setattr__(layer, "layer_index", index)
        return layer

    @classmethod
    def reads_packed(cls, method: Mapping[str, Any]) -> bool:
        """Whether the family's own tags read what this `quantization_config` packs."""
        return False

    def quantization_of(self, name: str) -> tuple[int, int, str] | None:
        """What `quantization` says of the layer `name`: (bits, group size, mode); None where it says nothing."""
        if self.quantization is None:
            return None
        return self.quantization.layers.get(name, self.quantization.default)

    @property
    def rope_depends_on_length(self) -> bool:
        """Whether the keys of earlier tokens would differ in a longer sequence, so that a cache of them can't go on."""
        return False

    def ignores(self, name: str) -> bool:
        """Whether a tensor of this name may stay unread: parts of a published model that decoding does not use."""
        return False

    def cache_window(self, index: int) -> int | None:
        """How many keys layer `index` looks back on, itself included; None: all."""
        return None


def _check_minimum(item: dataclasses.Field[Any], value: object) -> None:
    minimum = item.metadata.get(_MINIMUM, 1)
    if isinstance(value, int) and not isinstance(value, bool) and value < minimum:
        name = item.metadata.get(_KEY, item.name)
        raise ConfigError(f"config.json: {name} must be at least {minimum}, not {value}")


def normalise(raw: Mapping[str, Any]) -> dict[str, Any]:
    """One spelling: v5's `rope_parameters` becomes `rope_theta` + `rope_scaling` (+ `partial_rotary_factor`).

    Where they are given for each type of layer, those of windowed layers become `rope_local_base_freq`. A null
    `rope_scaling` counts as left out, one that does not scale becomes None.

    Raises:
        ConfigError: both spellings are present and disagree.
    """
    result = dict(raw)
    if result.get("rope_scaling", ...) is None:
        del result["rope_scaling"]
    parameters = result.pop("rope_parameters", None)
    if parameters is not None:
        _take_rope_parameters(result, parameters)
    scaling = result.get("rope_scaling")
    if isinstance(scaling, Mapping) and all(scaling.get(name) in (None, "default") for name in ("rope_type", "type")):
        result["rope_scaling"] = None
    return result


def _take_rope_parameters(result: dict[str, Any], parameters: object) -> None:
    if not isinstance(parameters, Mapping):
        raise ConfigError(f"config.json: rope_parameters must be an object, not {parameters!r}")
    scaling = dict(parameters)
    if set(scaling) & {FULL, SLIDING}:
        if set(scaling) - {FULL, SLIDING}:
            raise ConfigError(f"config.json: rope_parameters must be for all layers or by type, not {_short(scaling)}")
        if not all(isinstance(value, Mapping) for value in scaling.values()):
            raise ConfigError(
                f"config.json: rope_parameters needs an object for each type of layer, not {_short(scaling)}"
            )
        local = dict(scaling.get(SLIDING, {}))
        scaling = dict(scaling.get(FULL, {}))
        if set(local) - {"rope_theta", "rope_type"} or local.get("rope_type", "default") != "default":
            raise ConfigError(f"config.json: rope_parameters of {SLIDING} can only have a rope_theta, not {local!r}")
        if "rope_theta" in local:
            result.setdefault("rope_local_base_freq", local["rope_theta"])
    for name in ("rope_theta", "partial_rotary_factor"):
        if name in scaling:
            value = scaling.pop(name)
            if result.setdefault(name, value) not in (value, None):
                raise ConfigError(f"config.json says {name} twice: {result[name]!r}, and {value!r} in rope_parameters")
            result[name] = value
    legacy = result.get("rope_scaling")
    if legacy is not None and RopeScaling.from_dict(legacy) != RopeScaling.from_dict(scaling):
        raise ConfigError(f"config.json: rope_scaling {legacy!r} and rope_parameters {dict(parameters)!r} disagree")
    result["rope_scaling"] = scaling


def read(cls: type[C], raw: Mapping[str, Any]) -> C:
    """Build `cls` from `config.json`'s object; see `Config.from_dict`."""
    values = normalise(raw)
    method = raw.get("quantization_config")
    if isinstance(method, Mapping) and "quant_method" in method and not cls.reads_packed(method):
        Quantized.from_dict(method)
    hints = typing.get_type_hints(cls)
    problems: list[str] = []
    parameters = raw.get("rope_parameters")
    if "rope_local_base_freq" in hints and isinstance(parameters, Mapping) and set(parameters) - {FULL, SLIDING}:
        problems.append(f"rope_parameters needs an object for each type of layer, not {_short(dict(parameters))}")
    arguments: dict[str, Any] = {}
    known: set[str | None] = {*cls.INERT, *cls.ONLY}
    for item in dataclasses.fields(cls):
        if not item.init:
            continue
        name = _present(item, values, problems)
        known |= {item.metadata.get(_KEY, item.name), item.metadata.get(_ALSO)}
        required = item.default is MISSING and item.default_factory is MISSING
        if name in cls.NULL and name in values and values[name] is None:
            arguments[item.name] = cls.NULL[name]
            continue
        if hints[item.name] is bool and name in values and values[name] is None:
            arguments[item.name] = False  # as Python's own code would read it
            continue
        if name not in values or (values[name] is None and not _accepts_none(hints[item.name])):
            if required:
                problems.append(f"missing key {name!r}")
            continue
        try:
            arguments[item.name] = _convert(values[name], hints[item.name], name)
            _check_minimum(item, arguments[item.name])  # before a class divides by it
        except ConfigError as error:
            problems.append(str(error))
    for name, only in cls.ONLY.items():
        if values.get(name) not in (None, only):
            problems.append(f"key {name!r} = {_short(values[name])} is not supported, only {only!r} is")
    problems += _unknown(values, known)
    if problems:
        raise ConfigError(f"config.json of a {raw.get('model_type', '(unnamed)')} model: " + "; ".join(problems))
    return cls(**arguments)


def _present(item: dataclasses.Field[Any], values: Mapping[str, Any], problems: list[str]) -> str:
    """The name that `item` has in `values`: its key, or the older one."""
    name, also = item.metadata.get(_KEY, item.name), item.metadata.get(_ALSO)
    if also is None or values.get(also) is None:
        return str(name)
    if values.get(name) not in (None, values[also]):
        problems.append(f"{name!r} = {_short(values[name])} and {also!r} = {_short(values[also])} disagree")
    return str(also)


def _unknown(values: Mapping[str, Any], known: set[str | None]) -> list[str]:
    problems = []
    for name, value in values.items():
        if name in known or name in HARMLESS or value is None or value is False:
            continue
        near = difflib.get_close_matches(name, sorted(filter(None, known)), n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        problems.append(f"key {name!r} = {_short(value)} could change the numbers and is not understood{hint}")
    return problems


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _accepts_none(hint: Any) -> bool:
    return isinstance(hint, types.UnionType) and type(None) in typing.get_args(hint)


def _convert(value: Any, hint: Any, name: str) -> Any:
    """`value` as the annotation `hint` has it; JSON knows one kind of number and no tuples, and bool is not an int."""
    if isinstance(hint, types.UnionType):
        if value is None:
            return None
        options = [option for option in typing.get_args(hint) if option is not type(None)]
        for option in options[:-1]:
            try:
                return _convert(value, option, name)
            except ConfigError:
                continue
        return _convert(value, options[-1], name)
    if hint in (RopeScaling, Quantized):
        return hint.from_dict(value)
    if typing.get_origin(hint) is tuple:
        if isinstance(value, Sequence) and not isinstance(value, str):
            return tuple(_convert(item, typing.get_args(hint)[0], f"{name}[{i}]") for i, item in enumerate(value))
    elif hint is int and not isinstance(value, bool) and isinstance(value, int | float) and value == _floor(value):
        if abs(value) > MAX_DIMENSION:
            raise ConfigError(f"key {name!r} = {_short(value)} is larger than any model has ({MAX_DIMENSION})")
        return int(value)
    elif hint is float and not isinstance(value, bool) and isinstance(value, int | float):
        if abs(value) <= 1e30 and math.isfinite(value):
            return float(value)
    elif (hint is bool and isinstance(value, bool)) or (hint is str and isinstance(value, str)):
        return value
    expected = hint.__name__ if isinstance(hint, type) else str(hint)
    raise ConfigError(f"key {name!r} must be {expected}, not {_short(value)}")


def _floor(value: float) -> float:
    return math.floor(value) if math.isfinite(value) else math.nan
