"""The activations of feed-forward layers, by the names that `config.json` has for them."""

from __future__ import annotations

from collections.abc import Callable, Collection

import mlx.core as mx

from runner.errors import ConfigError


def _silu(x: mx.array) -> mx.array:
    return x * mx.sigmoid(x)


def _gelu(x: mx.array) -> mx.array:
    return x * (1 + mx.erf(x / 2**0.5)) / 2


def _gelu_tanh(x: mx.array) -> mx.array:
    return 0.5 * x * (1 + mx.tanh((2 / mx.pi) ** 0.5 * (x + 0.044715 * x**3)))


ACTIVATIONS: dict[str, Callable[[mx.array], mx.array]] = {
    "silu": _silu,
    "swish": _silu,
    "gelu": _gelu,
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "gelu_fast": _gelu_tanh,
    "relu": lambda x: mx.maximum(x, 0),
    "relu2": lambda x: mx.square(mx.maximum(x, 0)),
}
"""`hidden_act`'s names, as `transformers.activations.ACT2FN` has them."""


def check_activation(name: str, known: Collection[str] = frozenset(ACTIVATIONS)) -> None:
    """Raises `ConfigError` for an activation that is not in `known`."""
    if name not in known:
        raise ConfigError(f"config.json: hidden_act {name!r} is not known; known are {', '.join(sorted(known))}")
