"""The keys of `config.json` that describe RoPE, in the two spellings of transformers (v4 and v5), brought into one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from runner.config.layer_types import FULL, SLIDING
from runner.config.problems import MOST_UNKNOWN, misspelt, short
from runner.config.rope import RopeScaling, keys_of, kind_of
from runner.errors import ConfigError
from runner.local_files import quoted

BESIDE = ("rope_theta", "partial_rotary_factor")
"""Settings that v4 keeps beside `rope_scaling`, and v5 within `rope_parameters`."""

OF_SLIDING = f"rope_parameters of {SLIDING}"
"""The key that RoPE of the windowed layers has after `normalise`, in families where it can be of any type."""


def normalise(raw: Mapping[str, Any], by_type: bool = False) -> dict[str, Any]:
    """Bring the RoPE settings of transformers v5 into the spelling of v4; other keys stay as they are.

    `rope_parameters` becomes `rope_theta`, `rope_scaling` and `partial_rotary_factor`. If it holds one object per layer
    type, that of the sliding-window layers becomes `OF_SLIDING`, or without `by_type` its base becomes
    `rope_local_base_freq`. A null `rope_scaling` is removed, so that the field's default applies; a `rope_scaling` of
    type "default" becomes None. Keys that the type of scaling does not read are removed (`unread` lists them).

    Args:
        raw: the object in `config.json`.
        by_type: whether the family's windowed layers can have RoPE of any type.

    Raises:
        ConfigError: `rope_parameters` is malformed, or both spellings are present and disagree.
    """
    result = dict(raw)
    # Removed before `rope_parameters` is read, which then has nothing to disagree with.
    if result.get("rope_scaling", ...) is None:
        del result["rope_scaling"]
    if isinstance(result.get("rope_scaling"), Mapping):
        older = _stripped(result["rope_scaling"])
        _take_beside(result, older, "rope_scaling")  # v5 reads these two in the older object, too
        result["rope_scaling"] = older
    parameters = result.pop("rope_parameters", None)
    if parameters is not None:
        _take_rope_parameters(result, parameters, by_type)
    # "default" and no type at all both mean unscaled RoPE; None is the one way to say that from here on.
    scaling = result.get("rope_scaling")
    if isinstance(scaling, Mapping) and all(scaling.get(name) in (None, "default") for name in ("rope_type", "type")):
        result["rope_scaling"] = None
    return result


def _take_rope_parameters(result: dict[str, Any], parameters: object, by_type: bool) -> None:
    """Move the settings in `rope_parameters` into the older keys of `result`, in place."""
    if not isinstance(parameters, Mapping):
        raise ConfigError(f"config.json: rope_parameters must be an object, not {short(parameters)}")
    scaling = dict(parameters)
    # One object per type of layer (Gemma 3): the full-attention one takes the usual keys. The other has a place in some
    # families; in most only its base has one, so anything else in it is refused.
    if set(scaling) & {FULL, SLIDING}:
        if set(scaling) - {FULL, SLIDING}:
            raise ConfigError(
                "config.json: rope_parameters must be one object for all layers or one for each type of layer, "
                f"not {short(scaling)}"
            )
        if not all(isinstance(value, Mapping) for value in scaling.values()):
            raise ConfigError(
                f"config.json: rope_parameters needs an object for each type of layer, not {short(scaling)}"
            )
        local = _stripped(scaling.get(SLIDING, {}))
        given = SLIDING in scaling
        scaling = dict(scaling.get(FULL, {}))
        if by_type:
            if given:
                result[OF_SLIDING] = local
        elif set(local) - {"rope_theta", "rope_type", "type"} or kind_of(local) != "default":
            raise ConfigError(
                f"config.json: rope_parameters of {SLIDING} can only have a rope_theta, not {short(local)}"
            )
        elif "rope_theta" in local:
            result.setdefault("rope_local_base_freq", local["rope_theta"])
    scaling = _stripped(scaling)
    _take_beside(result, scaling, "rope_parameters")
    # What is left describes the scaling. Parsed objects are compared, because `type` and `rope_type` are synonyms.
    legacy = result.get("rope_scaling")
    if legacy is not None and RopeScaling.from_dict(legacy) != RopeScaling.from_dict(scaling):
        raise ConfigError(
            f"config.json: rope_scaling {short(legacy)} and rope_parameters {short(dict(parameters))} disagree"
        )
    result["rope_scaling"] = scaling


def _take_beside(result: dict[str, Any], scaling: dict[str, Any], where: str) -> None:
    """Move `rope_theta` and `partial_rotary_factor` from the object `scaling`, whose key is `where`, to `result`.

    A file written for both versions has them twice: they must agree, and a null in the older key yields.
    """
    for name in BESIDE:
        # Proportional RoPE reads the share itself: all of the head counts as turned there.
        if name in scaling and name not in keys_of(kind_of(scaling) or "default"):
            value = scaling.pop(name)
            if result.setdefault(name, value) not in (value, None):
                raise ConfigError(f"config.json says {name} twice: {result[name]!r}, and {value!r} in {where}")
            result[name] = value


def _stripped(scaling: Mapping[str, Any]) -> dict[str, Any]:
    """`scaling` without the keys that RoPE of its type does not read; one of an unknown type comes back whole."""
    allowed = _read(scaling)
    return {name: value for name, value in scaling.items() if allowed is None or name in allowed}


def _read(scaling: Mapping[str, Any]) -> frozenset[str] | None:
    """The keys that RoPE of the type in `scaling` reads; None if the type is unknown, which is reported elsewhere."""
    kind = kind_of(scaling)
    return None if kind is None else keys_of(kind) | {"rope_type", "type", *BESIDE}


def unread(raw: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Keys of the RoPE objects that nothing reads: sentences about misspelt ones, and the others for a note.

    As transformers does, a key that the type of scaling does not read is ignored. One that is a letter away from a key
    that the object lacks is a mistake that would change numbers.
    """
    problems, notes = [], []
    for where, scaling in _objects(raw):
        allowed = _read(scaling) or frozenset(scaling)
        left = sorted(set(map(str, scaling)) - allowed)
        if len(left) > MOST_UNKNOWN:
            problems.append(f"{where} has {len(left)} keys that are not understood: the first is {quoted(left[0])}")
            continue
        for name in left:
            near = misspelt(name, allowed - scaling.keys())
            if near is not None:
                problems.append(f"{where} has {quoted(name)}: did you mean {near!r}?")
            elif scaling[name] is not None:
                notes.append(f"{quoted(name)} in {where}")
    return problems, notes


def _objects(raw: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The objects that describe RoPE, each with the name of its key."""
    for where in ("rope_scaling", "rope_parameters"):
        found = raw.get(where)
        if isinstance(found, Mapping):
            nested = {name: found[name] for name in (FULL, SLIDING) if isinstance(found.get(name), Mapping)}
            yield from ((f"{where} of {name}", value) for name, value in nested.items())
            if not nested:
                yield where, found


def plain_positions(rope: Any) -> Any:
    """Text alone has one position where images have three (M-RoPE): its sections are those of plain RoPE then."""
    if not isinstance(rope, Mapping) or "mrope_section" not in rope:
        return rope
    kept = {name: value for name, value in rope.items() if name not in ("mrope_section", "mrope_interleaved")}
    for name in ("type", "rope_type"):
        if kept.get(name) == "mrope":
            kept[name] = "default"
    return kept if kept.get("type") or kept.get("rope_type") else {**kept, "rope_type": "default"}


def with_original_length(values: dict[str, Any]) -> dict[str, Any]:
    """Move a top-level `original_max_position_embeddings` into `rope_scaling`, where it takes effect.

    transformers does it for the three types that start from the original length; elsewhere the key says nothing.

    Raises:
        ConfigError: `rope_scaling` has another one.
    """
    result = dict(values)
    original = result.pop("original_max_position_embeddings", None)
    scaling = result.get("rope_scaling")
    if original is None or not isinstance(scaling, Mapping) or kind_of(scaling) not in ("llama3", "yarn", "longrope"):
        return result
    inner = scaling.get("original_max_position_embeddings")
    if inner not in (None, original):
        raise ConfigError(
            f"config.json says original_max_position_embeddings twice: {original!r}, and {inner!r} in rope_scaling"
        )
    result["rope_scaling"] = {**scaling, "original_max_position_embeddings": original}
    return result
