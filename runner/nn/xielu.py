"""xIELU (arXiv:2411.13010): an activation with trained parameters.

Source: `transformers.activations.XIELUActivation`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import mlx.core as mx

from runner.config.base import Config
from runner.nn.fast import provided_ops
from runner.ops.table import Ops
from runner.weights.tags import Choice, Chooses, Header, weight
from runner.weights.tree import Size, Tree, leaves


class XIELU(Chooses):
    """`p x^2 + b x` for x > 0, else `n (e^x - 1 - x) + b x`; p = softplus(alpha_p), n = b + softplus(alpha_n)."""

    def __call__(self, x: mx.array) -> mx.array:
        raise NotImplementedError

    @classmethod
    def choose(cls, tree: Tree, shape: tuple[Size, ...], headers: Mapping[str, Header], config: Config) -> Choice:
        # The shape of alpha_p tells which of the two forms is stored.
        alpha = headers.get(f"{next(leaves(tree)).name}.alpha_p")
        return Choice(ScalarXIELU if alpha is not None and not alpha.shape else PlainXIELU, {})


@dataclass
class PlainXIELU(XIELU):
    """xIELU as published: `alpha_p` and `alpha_n` are stored as vectors of one element."""

    alpha_p: mx.array = weight("alpha_p", 1)
    alpha_n: mx.array = weight("alpha_n", 1)
    beta: mx.array = weight("beta")
    eps: mx.array = weight("eps")
    ops: Ops = provided_ops()

    def __call__(self, x: mx.array) -> mx.array:
        return self.ops.fused(xielu, x, self.alpha_p, self.alpha_n, self.beta, self.eps)


def xielu(x: mx.array, alpha_p: mx.array, alpha_n: mx.array, beta: mx.array, eps: mx.array) -> mx.array:
    """The formula of `XIELU`, in the dtype of x."""
    # logaddexp(a, 0) is softplus(a); `eps`, just below 0, keeps e^x from overflowing where `where` discards it.
    p, n = mx.logaddexp(alpha_p, 0.0), beta + mx.logaddexp(alpha_n, 0.0)
    below = (mx.expm1(mx.minimum(x, eps)) - x) * n
    return (mx.where(x > 0, p * x * x, below) + beta * x).astype(x.dtype)


@dataclass
class ScalarXIELU(PlainXIELU):
    """xIELU as mlx-lm stores it: `alpha_p` and `alpha_n` are scalars."""

    alpha_p: mx.array = weight("alpha_p")
    alpha_n: mx.array = weight("alpha_n")
