"""`quantization_config`, read key by key: a key or value that nobody reads is refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from runner.errors import ConfigError


class Options:
    """The object `raw`; `where` names it in messages. Each method marks the keys it is asked for as read."""

    def __init__(self, raw: object, where: str) -> None:
        if not isinstance(raw, Mapping):
            raise ConfigError(f"config.json: {where} must be an object, not {short(raw)}")
        self.raw: Mapping[str, Any] = raw
        self.where = where
        self.known: set[str] = set()

    def harmless(self, *names: str) -> None:
        """Keys that say nothing about the numbers."""
        self.known.update(names)

    def integer(self, name: str, default: int | None = None) -> int:
        """A key that holds an integer."""
        value = self._get(name, default)
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.error(name, value, "an integer")
        return value

    def flag(self, name: str, default: bool) -> bool:
        """A key that holds true or false."""
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise self.error(name, value, "true or false")
        return value

    def words(self, name: str) -> None:
        """A list of module names; which modules are packed is read from the tensors, so only its form is checked."""
        value = self._get(name, [])
        if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
            raise self.error(name, value, "a list of module names")

    def one_of(self, name: str, *values: object) -> Any:
        """A key with one of these values; the first stands in where it is missing or null."""
        value = self._get(name, values[0])
        value = value.lower() if isinstance(value, str) else value
        if not any(value == item and type(value) is type(item) for item in values):
            raise self.error(name, value, " or ".join(repr(item) for item in values))
        return value

    def size(self, name: str) -> tuple[int, int] | None:
        """Rows and columns of a block, or null."""
        value = self._get(name, None)
        if value is None:
            return None
        if isinstance(value, list | tuple) and len(value) == 2:
            rows, columns = value
            if type(rows) is int and type(columns) is int and rows > 0 and columns > 0:
                return rows, columns
        raise self.error(name, value, "two positive integers")

    def finish(self) -> None:
        """Refuse the keys that are set and were not read.

        Raises:
            ConfigError: naming them.
        """
        left = [
            f"{name!r} = {short(value)}"
            for name, value in self.raw.items()
            if name not in self.known and value not in (None, False, [], {})
        ]
        if left:
            raise ConfigError(f"config.json: {self.where} has {', '.join(left)}: not supported, may change the numbers")

    def error(self, name: str, value: object, expected: str) -> ConfigError:
        """To be raised: the key's value is not one that is supported."""
        return ConfigError(f"config.json: {self.where}.{name} = {short(value)} is not supported, only {expected}")

    def _get(self, name: str, default: Any) -> Any:
        self.known.add(name)
        value = self.raw.get(name)
        return default if value is None else value


def short(value: object) -> str:
    """A value as a message shows it."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
