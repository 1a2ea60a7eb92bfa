"""The short depthwise convolution of recurrent layers: each channel mixes its own last few tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx

from runner.config.base import Config
from runner.nn.fast import provided_ops
from runner.ops.table import Ops, Taps
from runner.weights.tags import Choice, Chooses, Header, tensor
from runner.weights.transforms import Transform
from runner.weights.tree import Size, Tree, leaves


class Convolved(NamedTuple):
    """What a short convolution returns.

    Attributes:
        output: `[B, L, C]`, in the dtype of its input.
        rows: the last `kernel - 1` inputs, `[B, kernel - 1, C]`, which the next pass is given; `[L, B, kernel - 1, C]`
            where those behind each token were asked for.
    """

    output: mx.array
    rows: mx.array


class ShortConv(Chooses):
    """A causal convolution of `kernel` taps over each channel alone, `$0` channels and `$1` taps.

    The weight is stored as PyTorch keeps it `[C, 1, kernel]`, as MLX does `[C, kernel, 1]`, or without the axis of one
    `[C, kernel]`: its header tells.
    """

    def __call__(self, x: mx.array, rows: mx.array, *, activation: str | None, each: bool = False) -> Convolved:
        """Convolve `x` `[B, L, C]`, which follows `rows` `[B, kernel - 1, C]` (zeros before the first token).

        Each output is a sum over the taps in the order of the tokens, so it does not depend on where a prompt is cut.

        Args:
            activation: what the outputs pass, by `hidden_act`'s names; None: nothing.
            each: return the rows behind each token.
        """
        raise NotImplementedError

    def taps(self, activation: str | None) -> Taps:
        """The convolution as `Ops.delta_step` and the like take it."""
        raise NotImplementedError

    @classmethod
    def choose(cls, tree: Tree, shape: tuple[Size, ...], headers: Mapping[str, Header], config: Config) -> Choice:
        header = headers.get(f"{next(leaves(tree)).name}.weight")
        stored = (0, 1, 0) if header is None else header.shape
        flat, turned = len(stored) == 2, len(stored) == 3 and stored[2] == 1
        form = FLAT if flat else TAPS_BESIDE_CHANNELS if turned else TAPS_LAST
        return Choice(StoredShortConv, {"transform": form})


@dataclass
class StoredShortConv(ShortConv):
    """The convolution with its weight `[kernel, C]`, the tap of the oldest token first."""

    weight: mx.array = tensor("weight", "$1", "$0")
    bias: mx.array | None = tensor("bias", "$0", when="bias")
    ops: Ops = provided_ops()

    def __call__(self, x: mx.array, rows: mx.array, *, activation: str | None, each: bool = False) -> Convolved:
        kept = self.weight.shape[0] - 1
        output = self.ops.short_conv(x, rows, self.weight, self.bias, activation)
        if each:
            both = mx.concatenate([rows, x], axis=1)
            return Convolved(output, mx.stack([both[:, i + 1 : i + 1 + kept] for i in range(x.shape[1])]))
        # Of a long prompt the last inputs only: a view of all of them would keep them in memory.
        newest = mx.concatenate([rows, x[:, max(0, x.shape[1] - kept) :]], axis=1)
        return Convolved(output, newest[:, newest.shape[1] - kept :])

    def taps(self, activation: str | None) -> Taps:
        return Taps(self.weight, self.bias, activation)


def _taps(array: mx.array, axis: int | None) -> mx.array:
    """Weights `[C, kernel]`, or with an axis of one, as `[kernel, C]`; a bias stays."""
    if array.ndim == 1:
        return array
    return mx.contiguous((array if axis is None else array.squeeze(axis)).T)


def _stored(array: mx.array, axis: int | None) -> mx.array:
    if array.ndim == 1:
        return array
    return mx.contiguous(array.T if axis is None else mx.expand_dims(array.T, axis))


def _form(name: str, axis: int | None) -> Transform:
    def shape(field: tuple[int, ...]) -> tuple[int, ...]:
        if len(field) == 1:
            return field
        taps, channels = field
        return (channels, taps) if axis is None else (channels, 1, taps) if axis == 1 else (channels, taps, 1)

    return Transform(name, lambda array: _taps(array, axis), lambda array: _stored(array, axis), shape)


TAPS_LAST = _form("taps last", 1)
TAPS_BESIDE_CHANNELS = _form("taps beside channels", 2)
FLAT = _form("flat taps", None)
