"""Base class of all configs, and `read`, the function that builds a config from the object in `config.json`.

A config is a frozen, keyword-only dataclass whose fields are the keys of `config.json`. Three markers say where a field
gets its value when its plain name and default do not:

- `eps: float = key("rms_norm_eps", default=1e-6)` reads the key `rms_norm_eps` into the field `eps`;
- `rope_theta: float = key(also="rotary_emb_base", default=10000.0)` reads `rope_theta`, or the older name of that key;
- `mlp_bias: bool = fixed(True)` reads no key: in this family the inherited field always has that value.

The two spellings of RoPE settings in transformers (v4 and v5) give equal configs. A key that no field reads is refused
if it could change numbers, and ignored with a note otherwise (`runner.config.unknown_keys` has the principle).
"""

from __future__ import annotations

import copy
import dataclasses
import math
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field
from typing import Any, ClassVar, NewType, Protocol, Self, TypeVar

from runner import reprs
from runner.config import rope_keys
from runner.config.layer_types import FULL, SLIDING
from runner.config.memory import Memory
from runner.config.problems import listed, short
from runner.config.ranges import check_range
from runner.config.rope import RopeScaling
from runner.config.unknown_keys import judge
from runner.errors import ConfigError

_KEY = "runner.key"
_ALSO = "runner.also"
_MINIMUM = "runner.minimum"
C = TypeVar("C", bound="Config")

Limit = NewType("Limit", float)
"""A number that may be infinite: `Infinity` in the file, or {"__float__": "Infinity"} as transformers 5 writes it."""

MAX_DIMENSION = 1 << 24
"""Largest integer accepted in `config.json`. No published model comes near it; a larger one means a damaged or hostile
file, which is refused before anything is allocated."""


def key(name: str | None = None, *, also: str | None = None, default: Any = MISSING, minimum: int = 1) -> Any:
    """Declare a config field that reads the key `name` of `config.json`.

    Args:
        name: the key; None: the name of the field.
        also: an older name of the key; if a file has both names, their values must agree.
        default: the value if the file lacks the key; without a default the key is required.
        minimum: the smallest value that an integer may have.
    """
    metadata = {_MINIMUM: minimum, _ALSO: also, **({} if name is None else {_KEY: name})}
    return field(default=default, metadata=metadata)


def fixed(value: Any, minimum: int = 1) -> Any:
    """Declare a field, perhaps one of the parent class, that always has `value`; no key of `config.json` is read.

    What stands for a number that is worked out later is held to `minimum` then.
    """
    return field(init=False, default=value, metadata={_MINIMUM: minimum})


class Shaped(Protocol):
    """What is known of a tensor before it is read."""

    @property
    def shape(self) -> tuple[int, ...]: ...


@dataclass(frozen=True)
class Quantized:
    """The `quantization` object of an MLX checkpoint: how its layers are quantized.

    A format is `(bits, group_size, mode)`.
    """

    default: tuple[int, int, str]
    """Format of every layer that `layers` does not name."""
    layers: Mapping[str, tuple[int, int, str] | None]
    """Formats of single layers, by name; None for a layer that is not quantized."""

    @classmethod
    def from_dict(cls, raw: object) -> Quantized:
        """Read a `quantization` object as mlx-lm writes it.

        Raises:
            ConfigError: `raw` is not such an object, names a mode that MLX does not have, or is the
                `quantization_config` of a method that this package does not read.
        """
        if not isinstance(raw, Mapping):
            raise ConfigError(f"quantization must be an object, not {short(raw)}")
        if "quant_method" in raw:
            raise ConfigError(
                f"quant_method {raw['quant_method']!r} is not supported for this model; use a checkpoint that is "
                "quantized with gptq, awq, fp8, compressed-tensors or MLX, or one that is not quantized"
            )
        # Beside the default's own keys, mlx-lm writes one entry per layer that differs: an object, or false.
        layers: dict[str, tuple[int, int, str] | None] = {}
        for name, value in raw.items():
            if isinstance(value, Mapping):
                layers[name] = _form(value)
            elif value is False:
                layers[name] = None
        return cls(_form(raw), layers)


def _form(raw: Mapping[str, Any]) -> tuple[int, int, str]:
    bits, group_size, mode = raw.get("bits"), raw.get("group_size"), raw.get("mode", "affine")
    bits_fit = isinstance(bits, int) and not isinstance(bits, bool) and 1 <= bits <= 64
    group_fits = isinstance(group_size, int) and not isinstance(group_size, bool) and 1 <= group_size <= MAX_DIMENSION
    if mode not in ("affine", "mxfp4", "mxfp8", "nvfp4") or not bits_fit or not group_fits:
        raise ConfigError(
            f"quantization needs positive integers bits and group_size and a mode of MLX (affine, mxfp4, mxfp8, "
            f"nvfp4), not {short(dict(raw))}"
        )
    assert isinstance(bits, int) and isinstance(group_size, int)
    return bits, group_size, mode


class JsonObject:
    """A value that a config reads from an object in `config.json`."""

    @classmethod
    def from_dict(cls, raw: object) -> Self:
        """Read the object; raises `ConfigError` if it is none, or has a key or value that makes no sense."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Config:
    """Base class of all configs: the settings that every model family has.

    Dimensions are in elements, `max_position_embeddings` is in tokens.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    quantization: Quantized | None = None
    notes: tuple[str, ...] = field(init=False, default=(), repr=False, compare=False)
    """Sentences for people about what was ignored: keys of `config.json` that nothing reads."""
    layer_index: int | None = field(init=False, default=None, metadata={_MINIMUM: 0})
    """Index of the layer that this copy of the config describes; None in the config of the whole model."""
    whole: Self | None = field(init=False, default=None, repr=False, compare=False)
    """The config that this one is a rank's share of; None: it is whole."""
    division: tuple[frozenset[str], int] = field(init=False, default=(frozenset(), 1), repr=False, compare=False)
    """Which fields are divided, and by how much."""
    INERT: ClassVar[frozenset[str]] = frozenset()
    """Keys in this family's files that do not affect the result; each class that lists some gives the reason."""
    ONLY: ClassVar[Mapping[str, object]] = {}
    """Keys that have the given value in every published file of this family; any other value is refused."""
    NULL: ClassVar[Mapping[str, object]] = {}
    """Keys for which null means the given value instead of the field's default."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        # `dataclass` writes a repr with all fields into each class that has none of its own.
        cls.__repr__ = reprs.changed  # type: ignore[method-assign]

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            _check_minimum(item, getattr(self, item.name))
            check_range(item.name, getattr(self, item.name), next(_names(item)))

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Self:
        """Build the config from the object in `config.json`.

        Raises:
            ConfigError: a key is missing, has a wrong value, or is set but unknown; the message lists all problems.
        """
        return read(cls, raw)

    def for_layer(self, index: int) -> Self:
        """Return a copy to build layer `index` from: its `layer_index` is set, so that properties can depend on it.

        Raises:
            ConfigError: the layer's own settings do not fit together.
        """
        if self.whole is not None:
            # A layer's own settings are made of whole numbers, and divided then.
            return self.whole.for_layer(index).divided(*self.division)
        layer = copy.copy(self)
        # The class is frozen; nobody else holds the copy yet.
        object.__setattr__(layer, "layer_index", index)
        for name, value in self.layer_settings(index).items():
            object.__setattr__(layer, name, value)
        return layer

    def divided(self, names: Iterable[str], size: int) -> Self:
        """A rank's share of this config, where the numbers of the fields `names` are shared out over `size` ranks.

        Of a number that is smaller than `size`, each has one, and several have the same.

        Raises:
            ConfigError: a number can't be shared out evenly.
        """
        share = copy.copy(self)
        object.__setattr__(share, "whole", self)
        object.__setattr__(share, "division", (frozenset(names), size))
        for name in names:
            number = getattr(self, name)
            if not isinstance(number, int) or number < 1 or (number % size and size % number):
                raise ConfigError(f"{name} = {number} cannot be shared out evenly over {size} ranks")
            object.__setattr__(share, name, max(number // size, 1))
        return share

    def layer_settings(self, index: int) -> Mapping[str, Any]:
        """The fields that have another value in layer `index` than in the model's config."""
        return {}

    @classmethod
    def key_of(cls, field_name: str) -> str:
        """The key of `config.json` that the field `field_name` is read from."""
        (item,) = (item for item in dataclasses.fields(cls) if item.name == field_name)
        return next(_names(item))

    @classmethod
    def reads_packed(cls, method: Mapping[str, Any]) -> bool:
        """Whether the family's own tensor tags read weights quantized as this `quantization_config` says (gpt-oss)."""
        return False

    def quantization_of(self, name: str) -> tuple[int, int, str] | None:
        """The format `(bits, group_size, mode)` that `quantization` gives the layer `name`; None: not quantized."""
        if self.quantization is None:
            return None
        return self.quantization.layers.get(name, self.quantization.default)

    @property
    def context_length(self) -> int:
        """How many tokens prompt and answer can have together in the model as its authors made it."""
        return self.max_position_embeddings

    @property
    def stream_width(self) -> int:
        """Numbers of a token's hidden state between two layers."""
        return self.hidden_size

    @property
    def position_table(self) -> int | None:
        """Number of positions with a learned embedding, which no setting can exceed; None: no such table."""
        return None

    @property
    def rope_border(self) -> int | None:
        """The longest sequence whose keys have the first of two sets of RoPE frequencies (LongRoPE); None: one set."""
        return None

    @property
    def rope_depends_on_length(self) -> bool:
        """Whether RoPE rotates the keys of earlier tokens differently in a longer sequence.

        If so, a KV cache filled for a short sequence cannot be extended to a longer one.
        """
        return False

    def ignores(self, name: str) -> bool:
        """Whether the tensor `name` of a checkpoint may stay unread: it is of a part that decoding does not use."""
        return False

    def stored_as(self, headers: Mapping[str, Shaped]) -> Self:
        """The config to read tensors with these headers by: this one, unless they are of a form that changes it.

        Raises:
            ConfigError: they are of a form that can't be read with this config.
        """
        return self

    def memory(self, index: int) -> tuple[Memory, ...]:
        """What layer `index` remembers between tokens; () for a layer that remembers nothing."""
        raise NotImplementedError

    def cache_window(self, index: int) -> int | None:
        """Number of keys that a query of layer `index` attends to, its own token's included; None: all earlier keys."""
        return None


def _check_minimum(item: dataclasses.Field[Any], value: object) -> None:
    minimum = item.metadata.get(_MINIMUM, 1)
    if isinstance(value, int) and not isinstance(value, bool) and value < minimum:
        name = item.metadata.get(_KEY, item.name)
        raise ConfigError(f"config.json: {name} must be at least {minimum}, not {value}")


def read(cls: type[C], raw: Mapping[str, Any]) -> C:
    """Build a config of class `cls` from the object in `config.json`; see `Config.from_dict` for the errors.

    Each field is read from its key (`key`), from an older name of the key (`also`), or not at all (`fixed`). Problems
    are collected, so that one message lists them all.
    """
    # From here on RoPE settings have one spelling; `raw` is needed only for what that spelling no longer shows.
    by_type = rope_keys.OF_SLIDING in readable_keys(cls)
    values = rope_keys.normalise(raw, by_type)
    if all(item.name != "original_max_position_embeddings" for item in dataclasses.fields(cls)):
        values = rope_keys.with_original_length(values)

    # `quantization_config` is harmless where the checkpoint reader or the family's tags understand its method. The
    # checkpoint reader removes the methods that it handles, so one that is still here and not the family's is refused.
    method = raw.get("quantization_config")
    if isinstance(method, Mapping) and "quant_method" in method and not cls.reads_packed(method):
        Quantized.from_dict(method)
    # The annotations are strings (`from __future__ import annotations`) until they are resolved.
    hints = typing.get_type_hints(cls)
    problems: list[str] = []

    # A family with two RoPE bases cannot tell from a single object which layers it is for.
    parameters = raw.get("rope_parameters")
    two = by_type or "rope_local_base_freq" in hints
    if two and isinstance(parameters, Mapping) and set(parameters) - {FULL, SLIDING}:
        problems.append(f"rope_parameters needs an object for each type of layer, not {short(dict(parameters))}")

    arguments: dict[str, Any] = {}
    for item in dataclasses.fields(cls):
        # A `fixed` field has no key here; if the file sets that key all the same, it is reported as unknown below.
        if not item.init:
            continue
        name = _present(item, values, problems)
        required = item.default is MISSING and item.default_factory is MISSING

        # A null means, in this order: what the family says, false for a bool, None where the type allows it, and
        # otherwise the same as a key that is left out.
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

        # The minimum is checked here and again in `__post_init__`, because a subclass's own `__post_init__` may divide
        # by the value before it calls the inherited one.
        try:
            arguments[item.name] = _convert(values[name], hints[item.name], name)
            check_range(item.name, arguments[item.name], name)
            _check_minimum(item, arguments[item.name])
        except ConfigError as error:
            problems.append(str(error).removeprefix("config.json: "))

    # Keys that no field reads: those with one published value, then those that nobody knows.
    for name, only in cls.ONLY.items():
        if values.get(name) not in (None, only):
            problems.append(f"key {name!r} = {short(values[name])} is not supported, only {only!r} is")
    refused, ignored = judge(values, readable_keys(cls), {*cls.INERT, *cls.ONLY}, raw.get("model_type"))
    misspelt, unread = rope_keys.unread(raw) if "rope_scaling" in readable_keys(cls) else ([], [])
    problems += refused + misspelt
    notes = [f"config.json: nothing reads {listed(ignored + unread)}: ignored"] if ignored or unread else []
    if problems:
        said = [note.removeprefix("config.json: ") for note in notes]
        name = f"config.json of a {raw.get('model_type', '(unnamed)')} model"
        raise ConfigError(f"{name}: " + "; ".join([listed(problems, "; "), *said]))
    config = cls(**arguments)
    object.__setattr__(config, "notes", tuple(notes))  # the class is frozen; nobody else holds the config yet
    return config


def readable_keys(cls: type[Config]) -> frozenset[str]:
    """The keys of `config.json` that the fields of `cls` are read from, older names included."""
    names = {name for item in dataclasses.fields(cls) if item.init for name in _names(item)}
    # Two keys are read on the way to the one spelling of RoPE settings.
    if "rope_scaling" in names:
        names |= {"rope_parameters", "original_max_position_embeddings"}
    return frozenset(names)


def _names(item: dataclasses.Field[Any]) -> Iterator[str]:
    """The key of a field, and the older name of the key, if there is one."""
    yield item.metadata.get(_KEY, item.name)
    if item.metadata.get(_ALSO) is not None:
        yield item.metadata[_ALSO]


def _present(item: dataclasses.Field[Any], values: Mapping[str, Any], problems: list[str]) -> str:
    """The name under which `values` has the field `item`: its key, or the older name (`also`) of that key.

    If both names are set and disagree, a line is added to `problems`.
    """
    name, also = item.metadata.get(_KEY, item.name), item.metadata.get(_ALSO)
    if also is None or values.get(also) is None:
        return str(name)
    if values.get(name) not in (None, values[also]):
        problems.append(f"{name!r} = {short(values[name])} and {also!r} = {short(values[also])} disagree")
    return str(also)


def _accepts_none(hint: Any) -> bool:
    return isinstance(hint, types.UnionType) and type(None) in typing.get_args(hint)


def _convert(value: Any, hint: Any, name: str) -> Any:
    """Convert the JSON value of the key `name` to the type in the annotation `hint`.

    JSON does not tell integers from floats and has lists for tuples, so those are converted; a boolean is not a number.
    """
    # A union is tried from left to right; the error is that of its last type.
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
    if hint is Limit:
        endless = value == {"__float__": "Infinity"} or value == math.inf
        return math.inf if endless else _convert(value, float, name)
    if hint in (RopeScaling, Quantized) or (isinstance(hint, type) and issubclass(hint, JsonObject)):
        return hint.from_dict(value)
    if typing.get_origin(hint) is tuple:
        if isinstance(value, Sequence) and not isinstance(value, str):
            return tuple(_convert(item, typing.get_args(hint)[0], f"{name}[{i}]") for i, item in enumerate(value))
    elif hint is int and _whole(value):
        if abs(value) > MAX_DIMENSION:
            raise ConfigError(f"key {name!r} = {short(value)} is larger than any model has ({MAX_DIMENSION})")
        return int(value)
    # The bound is compared first: `math.isfinite` and `float` raise OverflowError for an integer of hundreds of digits.
    elif hint is float and not isinstance(value, bool) and isinstance(value, int | float):
        if abs(value) <= 1e30 and math.isfinite(value):
            return float(value)
    elif (hint is bool and isinstance(value, bool)) or (hint is str and isinstance(value, str)):
        return value
    # A branch above that did not return had a value of the right kind but out of range.
    expected = hint.__name__ if isinstance(hint, type) else str(hint)
    raise ConfigError(f"key {name!r} must be {expected}, not {short(value)}")


def _whole(value: object) -> bool:
    """Whether a JSON number is an integer, as `3.0` is."""
    return type(value) is int or (isinstance(value, float) and value.is_integer())
