"""`SamplingParams`: how the next token is picked; `runner.engine.sampler` does it.

The order is: logit bias, penalties (repetition, then presence and frequency), temperature, top-k, top-p, min-p, draw.
This is the order of transformers' logits processors, with OpenAI's penalties and bias before them.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypedDict

from runner import reprs, resources
from runner.errors import UsageError

_LIMITS: dict[str, tuple[float, float]] = {
    "temperature": (0.0, 100.0),
    "top_k": (0, 1 << 24),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (0.01, 100.0),
    "presence_penalty": (-100.0, 100.0),
    "frequency_penalty": (-100.0, 100.0),
    "penalty_window": (0, 1 << 24),
    "seed": (0, (1 << 63) - 1),
    "logprobs": (0, 1 << 10),
}
_WHOLE = ("top_k", "penalty_window", "seed", "logprobs")
_OTHER_DEFAULTS: dict[str, tuple[object, ...]] = {
    "no_repeat_ngram_size": (None, 0),
    "bad_words_ids": (None, []),
    "suppress_tokens": (None, []),
    "begin_suppress_tokens": (None, []),
    "sequence_bias": (None, {}),
    "typical_p": (None, 1.0, 1),
    "epsilon_cutoff": (None, 0.0, 0),
    "eta_cutoff": (None, 0.0, 0),
    "num_beams": (None, 1),
    "penalty_alpha": (None, 0.0, 0),
    "guidance_scale": (None, 1.0, 1),
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
    "max_time": (None,),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "exponential_decay_length_penalty": (None,),
    "encoder_repetition_penalty": (None, 1.0, 1),
    "encoder_no_repeat_ngram_size": (None, 0),
    "watermarking_config": (None,),
    "top_h": (None,),
}
"""Keys of generation_config.json that no field of `SamplingParams` honours, with the values that have no effect."""


SAMPLING_KEYS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
"""Keys of generation_config.json that are fields of `SamplingParams`."""

TOP_K = 50
"""transformers' `top_k` where a generation_config.json samples and does not set it."""

LARGEST = float(2**128 - 2**104)
"""The largest float32."""

SMALLEST = 2.0**-126
"""The smallest normal float32. A temperature below it cannot be divided by on every device, and counts as 0."""


class SamplingOptions(TypedDict, total=False):
    """The fields of `SamplingParams` as keywords; None: the model's own default."""

    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    penalty_window: int | None
    penalize_prompt: bool | None
    logit_bias: Mapping[int, float] | None
    seed: int | None
    logprobs: int | None


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Options for picking the next token.

    Attributes:
        temperature: divides the logits; 0 takes the most likely token (of equally likely ones, the lowest id).
        top_k: keep the `top_k` most likely tokens; 0 keeps all.
        top_p: keep the fewest most likely tokens whose probabilities add up to `top_p`, at least one; 1 keeps all.
        min_p: keep tokens at least `min_p` times as likely as the most likely one; 0 keeps all.
        repetition_penalty: divides positive logits of seen tokens, multiplies negative ones (arXiv:1909.05858).
        presence_penalty: subtracted from the logit of each seen token.
        frequency_penalty: subtracted from a token's logit once for each time the token was seen.
        penalty_window: how many of the last tokens count as seen; 0: all.
        penalize_prompt: whether the prompt's tokens count as seen.
        logit_bias: numbers to add to logits, by token id.
        seed: the same seed after the same tokens gives the same answer, whatever else is computed beside it; None takes
            a seed from the system. MLX's global random state is neither read nor changed.
        logprobs: None: no log-probabilities; 0: that of each picked token, from the model's own distribution (before
            bias, penalties, temperature and filters); n: also those of the n most likely tokens.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    penalty_window: int = 0
    penalize_prompt: bool = True
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    logprobs: int | None = None

    __repr__ = reprs.changed

    def __post_init__(self) -> None:
        for name, (low, high) in _LIMITS.items():
            value = vars(self)[name]
            if value is None and name in ("seed", "logprobs"):
                continue
            kind = int if name in _WHOLE else (int, float)
            if isinstance(value, bool) or not isinstance(value, kind) or not low <= value <= high:
                word = "an integer" if name in _WHOLE else "a number"
                raise UsageError(f"{name} must be {word} from {low} to {high}, not {value!r}")
        if not isinstance(self.penalize_prompt, bool):
            raise UsageError(f"penalize_prompt must be true or false, not {self.penalize_prompt!r}")
        object.__setattr__(self, "logit_bias", _checked_bias(self.logit_bias))  # the class is frozen

    @classmethod
    def from_generation_config(cls, raw: Mapping[str, Any]) -> tuple[SamplingParams, tuple[str, ...]]:
        """Read a model's defaults; returns them and, for display, those that are ignored here (`"name = value"`).

        As in transformers, a model without `do_sample` is decoded greedily, and one with it from the 50 most likely
        tokens if it does not say from how many.

        Raises:
            UsageError: a value is out of range.
        """
        values = {name: raw[name] for name in SAMPLING_KEYS if raw.get(name) is not None}
        if not isinstance(raw.get("do_sample"), bool | None):
            raise UsageError(f"do_sample must be true or false, not {raw['do_sample']!r}")
        if raw.get("do_sample"):
            values.setdefault("top_k", TOP_K)
        params = cls(**values)  # a temperature is checked also where it is not used
        ignored = [f"{n} = {raw[n]!r}" for n, neutral in _OTHER_DEFAULTS.items() if n in raw and raw[n] not in neutral]
        return (params if raw.get("do_sample") else params.replace(temperature=0.0)), tuple(ignored)

    @classmethod
    def preset(cls, name: str) -> SamplingParams:
        """Read `configs/sampling/NAME.json`; an unknown name raises `UsageError`, which lists the presets."""
        return cls(**resources.read("sampling", name))

    def replace(self, **overrides: Any) -> SamplingParams:
        """Return a copy with some values changed; None keeps the current value.

        Raises:
            UsageError: a name is unknown, or a value is out of range.
        """
        names = [item.name for item in dataclasses.fields(self)]
        for name in overrides:
            if name not in names:
                near = difflib.get_close_matches(name, names, n=1)
                raise UsageError(f"unknown sampling option {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
        return dataclasses.replace(self, **{name: value for name, value in overrides.items() if value is not None})

    def to_dict(self) -> dict[str, Any]:
        """The options as a dictionary, for display."""
        return dataclasses.asdict(self)


def _checked_bias(biases: object) -> dict[int, float]:
    """`biases` by token id; JSON has ids as texts, so those are read, too. Raises `UsageError`."""
    if not isinstance(biases, Mapping):
        raise UsageError(f"logit_bias maps token ids to numbers, as in {{5: -2.0}}; got {biases!r}")
    result: dict[int, float] = {}
    for name, bias in biases.items():
        token = int(name) if isinstance(name, str) and name.isascii() and name.isdigit() and len(name) < 10 else name
        # Compared before anything is converted: `float` raises for an integer of hundreds of digits, and NaN is not <=.
        numbers = isinstance(bias, int | float) and not isinstance(bias, bool) and abs(bias) <= LARGEST
        if isinstance(token, bool) or not isinstance(token, int) or not numbers:
            raise UsageError(f"logit_bias maps token ids to numbers in float32's range; got {name!r}: {bias!r}")
        if token in result:
            raise UsageError(f"logit_bias has token {token} twice")
        result[token] = float(bias)
    return result
