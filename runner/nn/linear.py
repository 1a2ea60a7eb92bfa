"""Linear layers and embeddings, plain or quantized: the checkpoint's headers decide which."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx

from runner.config.base import Config
from runner.errors import WeightsError
from runner.nn.fast import provided_ops
from runner.ops.quantized import QuantizedWeight
from runner.ops.table import Ops
from runner.weights.module import Module
from runner.weights.tags import FLOAT, PACKED, SCALES, Choice, Chooses, Header, setting, tensor
from runner.weights.tree import Join, Leaf, Size, Tree, leaf_shapes, leaves

HIDDEN, INTERMEDIATE, VOCAB = "hidden_size", "intermediate_size", "vocab_size"
Q, KV = "num_attention_heads*head_dim", "num_key_value_heads*head_dim"
"""Dimensions as most families' tags spell them: names in the config, or products of two."""


@dataclass(frozen=True)
class Quantization:
    """How a matrix is quantized. In mode `affine`, `group_size` inputs of a row share a scale and a bias."""

    bits: int
    group_size: int
    mode: str

    def scope(self, width: int) -> dict[str, Any]:
        """Names that the tags of a quantized matrix with `width` inputs read, with their values."""
        return {
            "bits": self.bits,
            "group_size": self.group_size,
            "mode": self.mode,
            "affine": self.mode == "affine",
            "packed": width * self.bits // 32,
            "groups": width // self.group_size,
        }


class Update(NamedTuple):
    """A matrix W `[out, in]` becomes `gain * (W + up @ (scale * down))`.

    Attributes:
        down: `[R, in]`.
        up: `[out, R]`.
        scale: a number, or `[R]` float32.
        gain: `[out]` float32; None: 1.
    """

    down: mx.array
    up: mx.array
    scale: mx.array | float
    gain: mx.array | None


class Linear(Chooses):
    """`y = x W^T + b`, `[..., in] -> [..., out]`; loading replaces it with one of the three classes below."""

    DIVIDES = True

    def __call__(self, x: mx.array) -> mx.array:
        raise NotImplementedError

    def matrix(self) -> mx.array:
        """W `[out, in]` as floating-point numbers, dequantized if necessary, and without what `updates` add to it."""
        raise NotImplementedError

    def updates(self) -> list[Update]:
        """What adapters do to `matrix()` now, one after the other; at the next call it may be something else.

        Raises:
            Apart: it differs between the tokens of the pass; ask what `of` returns.
        """
        return []

    @property
    def runs(self) -> list[int]:
        """Of how many neighbouring tokens of the pass the layer is the same, where adapters differ; else empty."""
        return []

    def of(self, token: int) -> Linear:
        """The layer as it is for the pass' token at this place: for all that is computed with it, of its request."""
        return self

    @classmethod
    def choose(cls, tree: Tree, shape: tuple[Size, ...], headers: Mapping[str, Header], config: Config) -> Choice:
        """Choose plain, quantized, or, for parts that are quantized differently, joined after the product."""
        forms = {stored_quantization(leaf, size[-1], headers, config) for leaf, size in leaf_shapes(tree, shape)}
        if len(forms) > 1:
            # Stacked parts are multiplied by one op, which takes one quantization.
            if not isinstance(tree, Join) or tree.stacked:
                raise WeightsError(
                    f"{next(leaves(tree)).name}: its stacked parts are quantized differently, which is not supported"
                )
            return Choice(JoinedLinear, {})
        return _choice(forms.pop(), shape, PlainLinear, QuantizedLinear)


@dataclass
class QuantizedFields(Module):
    """The tensors of a quantized matrix, or of a stack of them, and its quantization as the shapes imply it."""

    weight: mx.array = tensor("weight", "$0", "packed", dtypes=PACKED)
    scales: mx.array = tensor("scales", "$0", "groups", dtypes=SCALES)
    biases: mx.array | None = tensor("biases", "$0", "groups", when="affine")
    bits: int = setting()
    group_size: int = setting()
    mode: str = setting()

    def __post_init__(self) -> None:
        # Kernels take scales and biases of one dtype; where files store two, float32 holds the numbers of both.
        if self.biases is not None and self.biases.dtype != self.scales.dtype:
            self.scales, self.biases = self.scales.astype(mx.float32), self.biases.astype(mx.float32)
            mx.eval(self.scales, self.biases)

    def tensors_repr(self) -> str:
        shape = [*self.weight.shape[:-1], self.weight.shape[-1] * 32 // self.bits]
        form = f"{self.bits} bits" if self.mode == "affine" else self.mode
        bias = vars(self).get("bias")
        return f"{shape} in {form}, groups of {self.group_size}" + ("" if bias is None else ", with a bias")

    @property
    def quantized(self) -> QuantizedWeight:
        """Weight, scales, biases and quantization as one value."""
        return QuantizedWeight(self.weight, self.scales, self.biases, self.group_size, self.bits, self.mode)


@dataclass
class PlainLinear(Linear):
    """A linear layer with floating-point weights."""

    weight: mx.array = tensor("weight", "$0", "$1")
    bias: mx.array | None = tensor("bias", "$0", when="bias")
    ops: Ops = provided_ops()

    def __call__(self, x: mx.array) -> mx.array:
        return self.ops.linear(x, self.weight, self.bias)

    def matrix(self) -> mx.array:
        return self.weight


@dataclass
class QuantizedLinear(QuantizedFields, Linear):
    """A linear layer of packed weights `[out, in * bits / 32]`, a scale (affine: also a bias) per group of inputs."""

    bias: mx.array | None = tensor("bias", "$0", when="bias")
    ops: Ops = provided_ops()

    def __call__(self, x: mx.array) -> mx.array:
        return self.ops.quantized_linear(x, self.quantized, self.bias)

    def matrix(self) -> mx.array:
        return self.quantized.dequantize()


@dataclass
class JoinedLinear(Linear):
    """A fused layer with parts stored in different precisions: each part is multiplied, then outputs are joined."""

    parts: list[Linear] = tensor("", "$0", "$1")  # no name of their own: the parts of the joined name above

    def __call__(self, x: mx.array) -> mx.array:
        return mx.concatenate([part(x) for part in self.parts], axis=-1)

    def matrix(self) -> mx.array:
        return mx.concatenate([part.matrix() for part in self.parts])


class Embedding(Chooses):
    """An embedding table: ids `[...]` -> `[..., hidden_size]`."""

    WHOLE = True

    def __call__(self, ids: mx.array) -> mx.array:
        raise NotImplementedError

    @classmethod
    def choose(cls, tree: Tree, shape: tuple[Size, ...], headers: Mapping[str, Header], config: Config) -> Choice:
        (leaf,) = leaves(tree)  # a table is never joined of several
        width = shape[-1]
        assert isinstance(width, int)
        return _choice(stored_quantization(leaf, width, headers, config), shape, PlainEmbedding, QuantizedEmbedding)


@dataclass
class PlainEmbedding(Embedding):
    """An embedding table of floating-point numbers; rows are cast to `activations` if that is set."""

    weight: mx.array = tensor("weight", "$0", "$1")
    activations: mx.Dtype | None = setting(default=None)
    ops: Ops = provided_ops()

    def __call__(self, ids: mx.array) -> mx.array:
        return self.ops.embed(ids, self.weight, self.activations)


@dataclass
class QuantizedEmbedding(QuantizedFields, Embedding):
    """A quantized table; looked-up rows are dequantized, to `activations` or the dtype of the scales."""

    activations: mx.Dtype | None = setting(default=None)
    ops: Ops = provided_ops()

    def __call__(self, ids: mx.array) -> mx.array:
        return self.ops.quantized_embed(ids, self.quantized, self.activations)


def _choice(form: Quantization | None, shape: tuple[Size, ...], plain: type, quantized: type) -> Choice:
    if form is None:
        return Choice(plain, {})
    width = shape[-1]
    assert isinstance(width, int)
    return Choice(quantized, form.scope(width))


def stored_quantization(leaf: Leaf, width: int, headers: Mapping[str, Header], config: Config) -> Quantization | None:
    """The quantization that the shapes of the layer `leaf` imply, None if it is not quantized.

    The shapes cannot be wrong, so they decide; what config.json says must agree with them.

    Raises:
        WeightsError: no bits and group size fit the shapes, or the config contradicts them.
    """
    # Without scales, or in another form than MLX's, the layer is taken for plain; the planner then judges its dtype.
    packed, scales = headers.get(f"{leaf.name}.weight"), headers.get(f"{leaf.name}.scales")
    declared = config.quantization_of(leaf.name)
    if declared is not None and _lacks_a_part(leaf.name, Quantization(*declared), headers):
        return Quantization(*declared)
    if packed is None or scales is None or packed.dtype != "U32" or not packed.shape or not scales.shape:
        return None
    # A row of `width` numbers takes width * bits / 32 words and width / group_size scales; both must come out even.
    bits, bits_rest = divmod(packed.shape[-1] * 32, width)
    group_size, group_rest = divmod(width, scales.shape[-1]) if scales.shape[-1] else (0, 1)
    # Biases mean the affine mode; the other modes are told apart by their sizes.
    affine = f"{leaf.name}.biases" in headers
    mode = "affine" if affine else _MODES.get((bits, group_size, scales.dtype))
    fits = mode is not None and not bits_rest and not group_rest
    if affine:
        fits = fits and bits in _BITS and group_size in _GROUPS and scales.dtype in FLOAT
    if affine and not fits and not bits_rest and not group_rest:
        known = f"{', '.join(map(str, _BITS))} bits in groups of {', '.join(map(str, _GROUPS))}"
        raise WeightsError(
            f"{leaf.name}: {bits} bits in groups of {group_size} with {scales.dtype} scales: MLX has kernels for "
            f"{known} with float scales; quantize the model again"
        )
    if mode is None or not fits:
        raise WeightsError(
            f"{leaf.name}: weight {list(packed.shape)} and scales {list(scales.shape)} {scales.dtype} fit "
            f"none of MLX's quantizations of a matrix with {width} inputs"
        )
    form = Quantization(bits, group_size, mode)
    if declared is not None and declared != (bits, group_size, mode):
        found = (bits, group_size, mode)
        raise WeightsError(f"{leaf.name}: config.json says {declared} (bits, group size, mode), its shapes say {found}")
    return form


def _lacks_a_part(name: str, form: Quantization, headers: Mapping[str, Header]) -> bool:
    """Whether the layer `name` is stored in MLX's form `form`, but for one part that is missing or is no integer.

    Taken for plain, such a layer would have its other parts reported as not of this model, and not what it lacks.
    """
    weight, scales = headers.get(f"{name}.weight"), headers.get(f"{name}.scales")
    if weight is None or scales is None:
        return scales is not None or (weight is not None and weight.dtype == "U32")
    if weight.dtype != "U32":
        return weight.dtype not in FLOAT
    return form.mode == "affine" and f"{name}.biases" not in headers


_BITS = (2, 3, 4, 5, 6, 8)
_GROUPS = (32, 64, 128)
_MODES = {(4, 32, "U8"): "mxfp4", (4, 16, "U8"): "nvfp4", (8, 32, "U8"): "mxfp8"}
