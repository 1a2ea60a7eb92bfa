"""Which layers of a model attend to a sliding window, which to all earlier tokens, and which carry a state instead."""

from __future__ import annotations

from collections.abc import Sequence

from runner.errors import ConfigError

FULL, SLIDING = "full_attention", "sliding_attention"
"""The two values that an item of `layer_types` has in families of attention, spelled as in transformers."""

LINEAR = "linear_attention"
"""The value for a layer with a recurrence in place of attention."""

CONV = "conv"
"""The value for a layer with a short convolution in place of attention."""

OLDER = {"attention": FULL, "mamba": LINEAR}
"""Values as repositories of the hub spell them, and what transformers 5 makes of these."""


def checked(
    layer_types: Sequence[str] | None, layers: int, default: Sequence[str], known: Sequence[str] = (FULL, SLIDING)
) -> tuple[str, ...]:
    """Return the validated `layer_types` of a config, spelled as above, or `default` if the config has none.

    Args:
        known: the values that the family has layers for.

    Raises:
        ConfigError: the number of types is not `layers`, or a type is unknown.
    """
    result = tuple(OLDER.get(kind, kind) for kind in (default if layer_types is None else layer_types))
    if len(result) != layers:
        raise ConfigError(f"config.json: layer_types has {len(result)} entries, but there are {layers} layers")
    unknown = sorted(set(result) - set(known))
    if unknown:
        raise ConfigError(f"config.json: layer type {unknown[0]!r} is not known; known are {', '.join(known)}")
    return result


def every(period: int, layers: int, other: str = SLIDING) -> list[str]:
    """Layer types in which every `period`-th of `layers` layers has full attention and the others have `other`."""
    return [FULL if (index + 1) % period == 0 else other for index in range(layers)]
