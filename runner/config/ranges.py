"""The numbers that settings of `config.json` can have: outside, a forward pass divides by zero or gives NaN."""

from __future__ import annotations

from collections.abc import Mapping

from runner.errors import ConfigError

BASE = (1.0, 1e15)
POSITIVE = (0.0, 1e30)

ABOVE: Mapping[str, tuple[float, float]] = {
    "rope_theta": BASE,
    "rope_local_base_freq": BASE,
    "swa_rope_theta": BASE,
    "attn_logit_softcapping": POSITIVE,
    "final_logit_softcapping": POSITIVE,
    "query_pre_attn_scalar": POSITIVE,
    "logits_scaling": POSITIVE,
    "logits_multiplier": POSITIVE,
    "lm_head_multiplier": POSITIVE,
    "clip_qkv": POSITIVE,
    "swiglu_limit": POSITIVE,
}
"""By field: a number that the value must be greater than, and the greatest value. A RoPE base of 1 turns all planes
alike, and a smaller one turns them the wrong way round."""

FROM: Mapping[str, tuple[float, float]] = {
    "rms_norm_eps": (0.0, 1.0),
    "layer_norm_eps": (0.0, 1.0),
    "mixer_rms_eps": (0.0, 1.0),
    "post_norm_eps": (0.0, 1.0),
    "partial_rotary_factor": (0.0, 1.0),
}
"""By field: the least and the greatest value."""


def check_range(field: str, value: object, key: str) -> None:
    """Check the value of a config's field, which is read from `key`; any other kind than a number passes.

    Raises:
        ConfigError: the value is out of range.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    # Written so that NaN, which is neither below nor above, does not pass.
    if field in ABOVE and not ABOVE[field][0] < value <= ABOVE[field][1]:
        low, high = ABOVE[field]
        raise ConfigError(f"config.json: {key} must be above {low:g} and at most {high:g}, not {value!r}")
    if field in FROM and not FROM[field][0] <= value <= FROM[field][1]:
        low, high = FROM[field]
        raise ConfigError(f"config.json: {key} must be from {low:g} to {high:g}, not {value!r}")
