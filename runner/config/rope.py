"""RoPE frequencies and the published ways to scale them for a longer context, as pure functions of numbers.

Sources: RoPE arXiv:2104.09864; linear arXiv:2306.15595; dynamic NTK and YaRN arXiv:2309.00071; llama3, Meta's
Llama 3.1 reference code; longrope arXiv:2402.13753. Tests compare each with `transformers.modeling_rope_utils`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from runner.errors import ConfigError

_REQUIRED: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
    "proportional": (),
}
_OPTIONAL: dict[str, tuple[str, ...]] = {
    "dynamic": ("original_max_position_embeddings",),
    "yarn": (
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    ),
    "longrope": ("factor", "attention_factor", "original_max_position_embeddings"),
    "proportional": ("factor", "partial_rotary_factor"),
}
LONGEST = 1 << 24
"""The longest context in tokens that any file is believed to mean."""
_ALIASES = {"su": "longrope"}


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """The `rope_scaling` object of `config.json`; a field is None if the object does not set it.

    `kind` is the `rope_type` (or `type`) key; other fields are named as their keys. Lengths are in tokens, factors are
    ratios.
    """

    kind: str = "default"
    factor: float | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: int | None = None
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool | None = None
    short_factor: tuple[float, ...] | None = None
    long_factor: tuple[float, ...] | None = None
    partial_rotary_factor: float | None = None
    short_mscale: float | None = None
    """Of a longrope with both scales (Phi 3.5 MoE): its attention factor up to the original context, and beyond."""
    long_mscale: float | None = None

    @classmethod
    def from_dict(cls, raw: object) -> RopeScaling:
        """Read a `rope_scaling` object.

        Raises:
            ConfigError: `raw` is not an object, its type is unknown, a key that the type needs is missing, a key does
                not belong to the type, or a value is out of range.
        """
        if not isinstance(raw, Mapping):
            raise ConfigError(f"rope_scaling must be an object, not {raw!r}")
        kinds = _kinds(raw)
        if len(kinds) > 1:
            raise ConfigError(f"rope_scaling names two types: {sorted(kinds)}")
        kind = kinds.pop()
        if kind not in _REQUIRED:
            raise ConfigError(f"rope type {kind!r} is not known; known are {', '.join(sorted(_REQUIRED))}")
        # A null counts as a key left out. "default" scales nothing, so keys left over from another type are harmless.
        values = {name: value for name, value in raw.items() if name not in ("rope_type", "type") and value is not None}
        allowed = _REQUIRED[kind] + _OPTIONAL.get(kind, ())
        missing = [name for name in _REQUIRED[kind] if name not in values]
        unknown = [name for name in values if name not in allowed]
        if missing or (unknown and kind != "default"):
            raise ConfigError(f"rope type {kind!r}: missing {missing}, not understood {unknown}")
        result = cls(kind=kind, **{name: _number(name, values[name]) for name in values if name in allowed})
        if kind == "llama3" and (result.low_freq_factor or 0) > (result.high_freq_factor or 0):
            raise ConfigError(
                f"rope_scaling: low_freq_factor = {result.low_freq_factor} must not be above "
                f"high_freq_factor = {result.high_freq_factor}"
            )
        return result


def kind_of(raw: Mapping[str, Any]) -> str | None:
    """The type that a `rope_scaling` object names, "default" for none; None if it names two or an unknown one."""
    kinds = _kinds(raw)
    return next(iter(kinds)) if len(kinds) == 1 and kinds <= _REQUIRED.keys() else None


def keys_of(kind: str) -> frozenset[str]:
    """The keys that RoPE scaling of the type `kind` reads, besides those that name the type."""
    return frozenset(_REQUIRED[kind] + _OPTIONAL.get(kind, ()))


def _kinds(raw: Mapping[str, Any]) -> set[str]:
    # transformers renamed `type` to `rope_type`; files may have both, which must then agree.
    kinds = {raw[name] for name in ("rope_type", "type") if isinstance(raw.get(name), str)}
    return {_ALIASES.get(kind, kind) for kind in kinds} or {"default"}


def _number(name: str, value: Any) -> Any:
    if name == "truncate" and isinstance(value, bool):
        return value
    if name in ("short_factor", "long_factor") and isinstance(value, list) and 0 < len(value) <= 4096:
        return tuple(_number(f"{name} item", item) for item in value)
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1e12:
        if name == "partial_rotary_factor" and value > 1:
            raise ConfigError(f"rope_scaling: {name} = {value!r} is not at most 1")
        if name != "original_max_position_embeddings":
            return float(value)
        # LongRoPE divides by its logarithm, so that a length of 1 is none.
        if value > 1 and value == int(value):
            return int(value)
        raise ConfigError(f"rope_scaling: {name} = {value!r} is not an integer of at least 2")
    raise ConfigError(f"rope_scaling: {name} = {value!r} is not a positive number")


def inverse_frequencies(
    scaling: RopeScaling, *, dims: int, base: float, max_position_embeddings: int, length: int = 0
) -> list[float]:
    """Angles in radians by which one position rotates each of the `dims / 2` planes.

    Args:
        scaling: the scaling to apply; its own original context length wins over `max_position_embeddings`.
        dims: number of rotated elements of a head, two per plane.
        base: `rope_theta`.
        max_position_embeddings: context length in tokens.
        length: tokens of the whole sequence; only `dynamic` and `longrope` use it.
    """
    original = scaling.original_max_position_embeddings or max_position_embeddings
    # `dynamic` changes the base that all frequencies come from; the other types change the frequencies themselves.
    if scaling.kind == "dynamic":
        if dims <= 2:
            raise ConfigError(f"rope type 'dynamic' needs heads in which more than 2 numbers rotate, not {dims}")
        base = _dynamic_base(base, dims, scaling.factor or 1.0, original, length)
    plain = [base ** (-2 * i / dims) for i in range(dims // 2)]
    if scaling.kind == "linear":
        return [f / (scaling.factor or 1.0) for f in plain]
    if scaling.kind == "llama3":
        return [_llama3(f, scaling, original) for f in plain]
    if scaling.kind == "yarn":
        return _yarn(plain, scaling, dims, base, original)
    if scaling.kind == "proportional":
        # The exponents are those of the whole head; planes past the share that turns stand still.
        turning = int((scaling.partial_rotary_factor or 1.0) * dims // 2)
        return [f / (scaling.factor or 1.0) if i < turning else 0.0 for i, f in enumerate(plain)]
    if scaling.kind == "longrope":
        factors = (scaling.long_factor if length > original else scaling.short_factor) or ()
        if len(factors) != dims // 2:
            raise ConfigError(
                f"longrope has {len(factors)} factors, but RoPE rotates {dims // 2} planes: one factor each"
            )
        return [f / factor for f, factor in zip(plain, factors, strict=True)]
    return plain


def attention_factor(scaling: RopeScaling, *, max_position_embeddings: int, length: int = 0) -> float:
    """Factor that the rotated queries and keys are multiplied by: the temperature of YaRN and LongRoPE, otherwise 1.

    `length` is that of the whole sequence in tokens; only a `longrope` with two scales uses it.
    """
    original = scaling.original_max_position_embeddings or max_position_embeddings
    if scaling.short_mscale is not None and scaling.long_mscale is not None:
        return scaling.long_mscale if length > original else scaling.short_mscale
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.kind == "yarn":
        factor = scaling.factor or 1.0
        # DeepSeek's two settings divide; where they are equal they cancel out.
        if scaling.mscale and scaling.mscale_all_dim:
            return yarn_mscale(factor, scaling.mscale) / yarn_mscale(factor, scaling.mscale_all_dim)
        return yarn_mscale(factor, 1.0)
    if scaling.kind == "longrope":
        factor = scaling.factor or max_position_embeddings / original
        return 1.0 if factor <= 1.0 else math.sqrt(1 + math.log(factor) / math.log(original))
    return 1.0


def stretched_length(scaling: RopeScaling, max_position_embeddings: int) -> int:
    """Context length in tokens that `scaling` makes of the original one.

    The types linear, dynamic and yarn stretch the original length by `factor`, and files differ in whether they count
    that in `max_position_embeddings`. Files with llama3 and longrope always do: for them the result is that number.
    """
    if scaling.kind not in ("linear", "dynamic", "yarn"):
        return max_position_embeddings
    original = scaling.original_max_position_embeddings or max_position_embeddings
    return int(min(original * (scaling.factor or 1.0), LONGEST))


def depends_on_length(scaling: RopeScaling) -> bool:
    """Whether the frequencies change once a sequence grows past the original context."""
    return scaling.kind in ("dynamic", "longrope")


def _dynamic_base(base: float, dims: int, factor: float, original: int, length: int) -> float:
    length = max(length, original)
    return base * math.pow((factor * length / original) - (factor - 1), dims / (dims - 2))


def yarn_mscale(factor: float, mscale: float) -> float:
    """YaRN's temperature for a context that is `factor` times as long (arXiv:2309.00071, equation 22)."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _llama3(frequency: float, scaling: RopeScaling, original: int) -> float:
    """Scale one frequency as Llama 3.1 does.

    Long wavelengths are stretched by `factor`, short ones are kept, and between the two limits the results are blended
    linearly in original/wavelength. In Llama 4 the two limits are one, and nothing is blended.
    """
    low, high, factor = scaling.low_freq_factor or 1.0, scaling.high_freq_factor or 4.0, scaling.factor or 1.0
    wavelength = 2 * math.pi / frequency
    if wavelength > original / low:
        return frequency / factor
    if wavelength < original / high or low == high:
        return frequency
    smooth = (original / wavelength - low) / (high - low)
    return (1 - smooth) * frequency / factor + smooth * frequency


def _yarn(plain: list[float], scaling: RopeScaling, dims: int, base: float, original: int) -> list[float]:
    """Scale all frequencies as YaRN does.

    Planes that turn more than `beta_fast` times over the original context are kept, those that turn less than
    `beta_slow` times are stretched by `factor`, and those between are blended linearly in their index.
    """

    def plane(turns: float) -> float:
        """Index, as a real number, of the plane that turns so many times over the original context."""
        return dims * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = plane(scaling.beta_fast or 32.0), plane(scaling.beta_slow or 1.0)
    # transformers rounds the limits outwards unless told not to, and keeps them inside the head.
    if scaling.truncate is not False:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dims - 1)
    width = (high - low) or 0.001  # as transformers: equal limits make a step, not a division by zero
    result = []
    for i, frequency in enumerate(plain):
        stretched = min(max((i - low) / width, 0.0), 1.0)
        result.append(frequency / (scaling.factor or 1.0) * stretched + frequency * (1 - stretched))
    return result
