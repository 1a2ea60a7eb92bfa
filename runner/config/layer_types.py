"""Which layers of a model attend to a sliding window and which to all earlier tokens."""

from __future__ import annotations

from collections.abc import Sequence

from runner.errors import ConfigError

FULL, SLIDING = "full_attention", "sliding_attention"
"""The two values that an item of `layer_types` can have, spelled as in transformers."""


def checked(layer_types: Sequence[str] | None, layers: int, default: Sequence[str]) -> tuple[str, ...]:
    """Return the validated `layer_types` of a config, or `default` if the config has none.

    Raises:
        ConfigError: the number of types is not `layers`, or a type is unknown.
    """
    result = tuple(default if layer_types is None else layer_types)
    if len(result) != layers:
        raise ConfigError(f"config.json: layer_types has {len(result)} entries, but there are {layers} layers")
    unknown = sorted(set(result) - {FULL, SLIDING})
    if unknown:
        raise ConfigError(f"config.json: layer type {unknown[0]!r} is not known; known are {FULL}, {SLIDING}")
    return result


def every(period: int, layers: int) -> list[str]:
    """Layer types in which every `period`-th of `layers` layers has full attention and the others a sliding window."""
    return [FULL if (index + 1) % period == 0 else SLIDING for index in range(layers)]
