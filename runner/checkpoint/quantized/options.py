"""Strict reading of `quantization_config`: a key that is not read, or a value that is not supported, is an error."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from runner.config.problems import listed
from runner.errors import ConfigError
from runner.local_files import quoted


class Options:
    """A JSON object of options, read key by key.

    Each method notes the keys it is asked for; `finish` refuses the keys that are left.

    Args:
        raw: the parsed JSON value.
        where: its name in messages, such as "quantization_config".

    Raises:
        ConfigError: `raw` is not an object.
    """

    def __init__(self, raw: object, where: str) -> None:
        if not isinstance(raw, Mapping):
            raise ConfigError(f"config.json: {where} must be an object, not {short(raw)}")
        self.raw: Mapping[str, Any] = raw
        self.where = where
        self.known: set[str] = set()

    def harmless(self, *names: str) -> None:
        """Accept keys whatever their values, since they do not affect the numbers or are read elsewhere."""
        self.known.update(names)

    def integer(self, name: str, default: int | None = None) -> int:
        """The integer under a key; `default` where the key is missing or null."""
        value = self._get(name, default)
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.error(name, value, "an integer")
        return value

    def flag(self, name: str, default: bool) -> bool:
        """The boolean under a key; `default` where the key is missing or null."""
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise self.error(name, value, "true or false")
        return value

    def words(self, name: str) -> None:
        """Check that a key holds a list of module names. The names do not matter: tensors show what is quantized."""
        value = self._get(name, [])
        if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
            raise self.error(name, value, "a list of module names")

    def one_of(self, name: str, *values: object) -> Any:
        """The value under a key, which must be one of `values`; the first is the default for a missing key or null."""
        value = self._get(name, values[0])
        value = value.lower() if isinstance(value, str) else value
        if not any(value == item and type(value) is type(item) for item in values):
            raise self.error(name, value, " or ".join(repr(item) for item in values))
        return value

    def size(self, name: str) -> tuple[int, int] | None:
        """The rows and columns of a block, or None where the key is missing or null."""
        value = self._get(name, None)
        if value is None:
            return None
        if isinstance(value, list | tuple) and len(value) == 2:
            rows, columns = value
            if type(rows) is int and type(columns) is int and rows > 0 and columns > 0:
                return rows, columns
        raise self.error(name, value, "two positive integers")

    def finish(self) -> None:
        """Check that every key that is set has been read.

        Raises:
            ConfigError: naming the keys that have not.
        """
        left = [
            f"{quoted(name)} = {short(value)}"
            for name, value in self.raw.items()
            if name not in self.known and value not in (None, False, [], {})
        ]
        if left:
            raise ConfigError(
                f"config.json: {self.where} has {listed(left)}: not supported, and could change the numbers"
            )

    def error(self, name: str, value: object, expected: str) -> ConfigError:
        """An error that says that the value of a key is not supported, for the caller to raise."""
        return ConfigError(f"config.json: {self.where}.{name} = {short(value)} is not supported, expected {expected}")

    def _get(self, name: str, default: Any) -> Any:
        self.known.add(name)
        value = self.raw.get(name)
        return default if value is None else value


def short(value: object) -> str:
    """Shorten the repr of a value for a message, to 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
