"""Activations of feed-forward layers, by the names that `config.json` gives them."""

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
"""Maps each name that `hidden_act` can have (a key of `transformers.activations.ACT2FN`) to the name of the function
that this package computes for it."""


def check_activation(name: str, known: Collection[str] = frozenset(ACTIVATIONS), key: str = "hidden_act") -> None:
    """Raise `ConfigError` if the activation `name`, the value of `key` in `config.json`, is not in `known`."""
    if name not in known:
        raise ConfigError(f"config.json: {key} {name!r} is not known; known are {', '.join(sorted(known))}")
