"""The activations of feed-forward layers: what the names in `config.json` stand for."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from runner.errors import ConfigError

ACTIVATIONS: Mapping[str, str] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
}
"""`hidden_act`'s names, as `transformers.activations.ACT2FN` has them, and the function that each stands for."""


def check_activation(name: str, known: Collection[str] = frozenset(ACTIVATIONS)) -> None:
    """Raises `ConfigError` for an activation that is not in `known`."""
    if name not in known:
        raise ConfigError(f"config.json: hidden_act {name!r} is not known; known are {', '.join(sorted(known))}")
