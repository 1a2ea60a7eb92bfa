"""What a model's `generation_config.json` asks of every answer: sampling, where it ends, and what is not honoured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from runner import reprs
from runner.engine.sampling import SAMPLING_KEYS, SamplingParams
from runner.errors import ConfigError, UsageError

FILE = "generation_config.json"


@dataclass(frozen=True)
class GenerationDefaults:
    """A model's own settings; an argument or option of the user overrides each.

    Attributes:
        ignored: the settings that are not honoured, as `"name = value"`.
        stop: texts before which an answer ends (`stop_strings`).
        max_new_tokens: the most tokens of an answer; None: no limit but the context.
        max_length: the most tokens of prompt and answer together; not read where `max_new_tokens` is set.
        says_sampling: whether the file says anything of sampling; where it does not, `sampling` is greedy.
    """

    sampling: SamplingParams
    ignored: tuple[str, ...] = ()
    stop: tuple[str, ...] = ()
    max_new_tokens: int | None = None
    max_length: int | None = None
    says_sampling: bool = False

    __repr__ = reprs.changed

    @classmethod
    def read(cls, raw: Mapping[str, Any]) -> GenerationDefaults:
        """Read the contents of `generation_config.json`.

        Raises:
            ConfigError: a value is out of range; the message names the file and the key.
        """
        try:
            sampling, ignored = SamplingParams.from_generation_config(raw)
        except UsageError as error:
            raise ConfigError(f"{FILE}: {error}") from error
        tokens = _count(raw, "max_new_tokens")
        # As in transformers: where both are set, the length of the answer wins.
        length = None if tokens is not None else _count(raw, "max_length")
        says = any(raw.get(name) is not None for name in ("do_sample", *SAMPLING_KEYS))
        return cls(sampling, ignored, _stops(raw), tokens, length, says)

    def budget(self, prompt_tokens: int) -> int | None:
        """The most tokens that an answer may have after a prompt of `prompt_tokens`; None: as many as there is room.

        Raises:
            UsageError: the prompt is as long as `max_length` allows prompt and answer to be.
        """
        if self.max_length is None or self.max_new_tokens is not None:
            return self.max_new_tokens
        if prompt_tokens >= self.max_length:
            raise UsageError(
                f"the prompt has {prompt_tokens} tokens, and the model's {FILE} ends an answer where both have "
                f"{self.max_length} (max_length): shorten the prompt, or set max_tokens (--max-tokens)"
            )
        return self.max_length - prompt_tokens


def _count(raw: Mapping[str, Any], name: str) -> int | None:
    value = raw.get(name)
    if value is not None and (type(value) is not int or value < 1):
        raise ConfigError(f"{FILE}: {name} must be an integer of at least 1, not {value!r}")
    return value


def _stops(raw: Mapping[str, Any]) -> tuple[str, ...]:
    value = raw.get("stop_strings")
    stops = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) and stop for stop in stops):
        raise ConfigError(f"{FILE}: stop_strings must be a text or a list of texts, none of them empty, not {value!r}")
    return tuple(stops)
