"""Reads single values of an adapter's config: each reader returns the value, or says what it must be."""

from __future__ import annotations

from runner.errors import ConfigError

MAX_RANK = 1 << 14
"""The largest rank that a config may ask for."""


def short_value(value: object) -> str:
    """Show a value in a message, cut to 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def positive(value: object) -> int:
    """Read an integer from 1 to `MAX_RANK`; raises `ConfigError` for anything else."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= MAX_RANK:
        raise ConfigError(f"must be an integer from 1 to {MAX_RANK}")
    return value


def number(value: object) -> float:
    """Read a finite number; raises `ConfigError` for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e30:
        raise ConfigError("must be a finite number")
    return float(value)
