"""Layers of one model that look back differently: which of them see a window, from the ways configs say it."""

from __future__ import annotations

from collections.abc import Sequence

from runner.config.base import FULL, SLIDING
from runner.errors import ConfigError


def checked(layer_types: Sequence[str] | None, layers: int, default: Sequence[str]) -> tuple[str, ...]:
    """`layer_types`, or `default` where the config has none.

    Raises:
        ConfigError: another number of them than layers, or an unknown type.
    """
    result = tuple(default if layer_types is None else layer_types)
    if len(result) != layers:
        raise ConfigError(f"config.json: {len(result)} layer_types for {layers} layers")
    unknown = sorted(set(result) - {FULL, SLIDING})
    if unknown:
        raise ConfigError(f"config.json: layer type {unknown[0]!r} is not known; known are {FULL}, {SLIDING}")
    return result


def every(period: int, layers: int) -> list[str]:
    """Every `period`-th layer sees everything, the others a window."""
    return [FULL if (index + 1) % period == 0 else SLIDING for index in range(layers)]
