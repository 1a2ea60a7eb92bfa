"""Reads off a loaded model what one kernel for whole decode steps needs to know, or why there can be none.

The model's own tree is read: it alone names the arrays that a product reads, and what is computed between them is what
the classes' methods say. A class counts as known if its *methods* are those read here, whatever the class is called; a
family that computes anything in a way of its own is not known, and is computed with operations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from runner.cache.caches import Caches
from runner.cache.kv import KVCache, RotatingKVCache
from runner.cache.storage import PLAIN
from runner.config import rope as frequencies
from runner.config.activations import ACTIVATIONS
from runner.config.rope import RopeScaling
from runner.models import gemma, granite, llama
from runner.nn.attention import Attend
from runner.nn.blocks import BaseDecoder, PreNorm
from runner.nn.fast import RMSNorm, RoPE
from runner.nn.linear import PlainEmbedding, PlainLinear, QuantizedEmbedding, QuantizedFields, QuantizedLinear
from runner.nn.mlp import GLU, Activation, GatedMLP, PlainMLP
from runner.nn.moe import BareExperts, MoE, PlainExperts, QuantizedExperts
from runner.nn.stages import NoHead
from runner.nn.tensor import Gathered, Summed
from runner.ops.cuda.decoder import LayerTensors, Matrix, Rows, StepTensors
from runner.ops.cuda.shape import Form, StepShape, Unfit
from runner.ops.quantized import QuantizedWeight

_MOST_KINDS = 4
"""Kinds of RoPE among a model's layers at most."""


class ReadModel(NamedTuple):
    """A model as the kernel sees it."""

    shape: StepShape
    tensors: StepTensors


def read(model: object, dtype: mx.Dtype, ranks: int = 1) -> ReadModel:
    """Read a model whose activations, and thus its caches, have `dtype`.

    Args:
        ranks: processes that it is shared out over by tensors, of which this one has a part.

    Raises:
        Unfit: the model computes something that the kernel does not.
    """
    return _Reader(model, _named(dtype), ranks).read()


def rows_of(caches: Caches) -> list[Rows]:
    """Where the layers' keys and values lie, for `StepDecoder.bind`.

    Raises:
        Unfit: a layer remembers something else, or several sequences.
    """
    found = []
    for cache in caches:
        if (
            not isinstance(cache, KVCache)
            or type(cache) not in (KVCache, RotatingKVCache)
            or cache.storage.empty is not PLAIN.empty
        ):
            raise Unfit("caches of another kind")
        keys, values = cache.arrays
        if keys.shape[0] != 1:
            raise Unfit("several sequences")
        found.append(Rows(keys, values, cache.window, cache.start))
    return found


class _Reader:
    """One reading of one model."""

    def __init__(self, model: object, dtype: str, ranks: int) -> None:
        self._model: Any = model
        self._ranks = ranks
        self._dtype = dtype
        self._kinds: list[tuple[object, tuple[np.ndarray, float]]] = []

    def read(self) -> ReadModel:
        model = self._model
        _same(model, BaseDecoder, "__call__", "run")
        if not model.layers:
            raise Unfit("no layers")
        layers = [self._layer(layer) for layer in model.layers]
        # What all layers must have in common is what the first one has.
        first = layers[0]
        for each in layers[1:]:
            if each[0] != first[0]:
                raise Unfit("layers that differ in more than windows and positions")
        common = dict(first[0])
        embedding = self._embedding(model.embed_tokens)
        # The head may be of all ranks, or another's: then the table stands for it, which it is for most models.
        linear = model.lm_head.inner if type(model.lm_head) is Gathered else model.lm_head
        headless = type(linear) is NoHead
        head = embedding if headless else self._matrix(linear)
        embedding_scale, logit_scale = self._multipliers()
        self._norm(model.norm)
        plain = {_named(m.weight.dtype) for m in [*first[1].products, head] if m.scales is None}
        matrices = [*first[1].products, head, embedding]
        scales = {_named(m.scales.dtype) for m in matrices if m.scales is not None and m.biases is not None}
        if len(plain) > 1 or len(scales) > 1:
            raise Unfit("matrices of several types")
        small = self._small_type(model, [tensors for _, tensors in layers], head)
        eps = (common.pop("eps"), float(model.norm_eps), common.pop("head_eps"))
        shape = StepShape(
            layers=len(layers),
            vocab=head.weight.shape[0] * (self._ranks if linear is not model.lm_head else 1),
            forms=(*common.pop("forms"), _form(model.embed_tokens if headless else linear)),
            embedding=_form(model.embed_tokens),
            weights=plain.pop() if plain else "bfloat16",
            scales=scales.pop() if scales else "bfloat16",
            small=small,
            cache=self._dtype,
            table=_named(embedding.weight.dtype) if embedding.scales is None else "bfloat16",
            biased=(*common.pop("biased"), head.bias is not None),
            norm_eps=eps,
            ropes=max(1, len(self._kinds)),
            rope_dims=self._rope_dims(),
            embedding_scale=embedding_scale,
            logit_scale=logit_scale,
            logit_cap=float(model.final_logit_softcapping or 0.0),
            ranks=self._ranks,
            gathered=linear is not model.lm_head,
            headless=headless,
            **common,
        )
        tensors = StepTensors(
            [self._small_arrays(tensors, small) for _, tensors in layers],
            _flat(model.norm.weight, small),
            head._replace(bias=None if head.bias is None else _flat(head.bias, small)),
            embedding,
            [turning for _, turning in self._kinds],
        )
        return ReadModel(shape, tensors)

    def _multipliers(self) -> tuple[float, float]:
        """Factors on embeddings and on logits."""
        model, embedding, logits = self._model, 1.0, 1.0
        embed = type(model).embed
        if embed is granite.Decoder.embed:
            embedding = float(model.embedding_multiplier)
        elif embed is gemma.Decoder.embed:
            root = mx.array(model.hidden_size**0.5, dtype=getattr(mx, self._dtype))
            embedding = float(np.array(root.astype(mx.float32)))
        else:
            _same(model, BaseDecoder, "embed")
        if type(model).logits is granite.Decoder.logits:
            logits = 1 / float(model.logits_scaling)
        else:
            _same(model, BaseDecoder, "logits")
        return embedding, logits

    def _layer(self, layer: Any) -> tuple[dict[str, Any], LayerTensors]:
        """What the layer has in common with others, and its arrays."""
        residual = 1.0
        if type(layer).__call__ is granite.ScaledPreNorm.__call__:
            residual = float(layer.residual_multiplier)
        else:
            _same(layer, PreNorm, "__call__")
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            self._norm(norm)
        attention: Any = layer.self_attn
        norms: tuple[Any, Any] = (None, None)
        _same(attention, llama.Attention, "__call__")
        head_eps = 1.0
        if type(attention).heads is llama.NormedAttention.heads:
            if attention.q_norm is not None and attention.k_norm is not None:
                _same(attention, llama.NormedAttention, "normed")
                norms, head_eps = (attention.q_norm, attention.k_norm), float(attention.norm_eps)
                for norm in norms:
                    self._norm(norm)
                    if norm.weight.shape != (attention.head_dim,):
                        raise Unfit("norms of heads that differ from head to head")
        else:
            _same(attention, llama.Attention, "heads")
        if type(attention.attend) is not Attend:
            raise Unfit(f"attention of its own ({type(attention.attend).__name__})")
        kind = self._rope(attention.rope)
        mixture, router = self._mixture(layer.mlp)
        mlp, gated, activation = self._mlp(layer.mlp)
        parts = (attention.qkv_proj, attention.o_proj, *mlp)
        linears = [linear.inner if type(linear) is Summed else linear for linear in parts]
        products = tuple(map(self._summand, parts))
        common = {
            **mixture,
            "biased": tuple(linear.bias is not None for linear in parts),
            "summed": (
                type(attention.o_proj) is Summed,
                type(mlp[1]) is Summed or (isinstance(layer.mlp, MoE) and layer.mlp.exchange is not None),
            ),
            "hidden": products[1].weight.shape[0],
            "heads": attention.num_attention_heads,
            "kv_heads": attention.num_key_value_heads,
            "head_dim": attention.head_dim,
            "intermediate": products[2].weight.shape[-2] // (2 if gated else 1),
            "forms": tuple(_form(linear) for linear in linears),
            "gated": gated,
            "activation": activation,
            "head_norms": norms[0] is not None,
            "traditional": attention.rope.traditional,
            "attention_scale": float(attention.attend.scale),
            "attention_cap": float(attention.attend.softcap or 0.0),
            "residual_scale": residual,
            "eps": float(layer.rms_norm_eps),
            "head_eps": head_eps,
        }
        tensors = LayerTensors(
            products,  # type: ignore[arg-type]
            layer.input_layernorm.weight,
            layer.post_attention_layernorm.weight,
            None if norms[0] is None else norms[0].weight,
            None if norms[1] is None else norms[1].weight,
            kind,
            router,
        )
        return common, tensors

    def _mixture(self, mlp: Any) -> tuple[dict[str, Any], mx.array | None]:
        """What a mixture's layers have in common, and the router's matrix; nothing of other layers."""
        if not isinstance(mlp, MoE):
            return {}, None
        _same(mlp, MoE, "__call__", "route", "routing", "logits", "mixed", "complete", "outputs", "feed", "sorted")
        router: Any = mlp.router
        if mlp.scoring_func != "softmax" or mlp.correction is not None or mlp.n_group != mlp.topk_group:
            raise Unfit("experts that are chosen in another way")
        if router.bias is not None or type(router) not in (PlainLinear, QuantizedLinear):
            raise Unfit("a router of another kind")
        matrix = mx.contiguous(router.weight if type(router) is PlainLinear else _unpacked(router.quantized))
        mx.eval(matrix)  # what a thread has built and not computed, no other thread can
        common = {
            "experts": matrix.shape[0],
            "chosen": mlp.num_experts_per_tok,
            "chosen_norm": mlp.norm_topk_prob,
            "chosen_scale": float(mlp.routed_scaling_factor),
            "router": _named(matrix.dtype),
        }
        return common, matrix

    def _mlp(self, mlp: Any) -> tuple[tuple[Any, Any], bool, str]:
        for known in (llama.MLP, GatedMLP):
            if type(mlp).__call__ is known.__call__:
                if type(mlp.glu) is not GLU:
                    raise Unfit(f"an activation of its own ({type(mlp.glu).__name__})")
                return (mlp.gate_up_proj, mlp.down_proj), True, ACTIVATIONS[mlp.glu.activation]
        if isinstance(mlp, MoE) and type(mlp.glu) is GLU:
            return (mlp.gate_up_proj, mlp.down_proj), True, ACTIVATIONS[mlp.glu.activation]
        if type(mlp).__call__ is PlainMLP.__call__ and type(mlp.act) is Activation:
            return (mlp.up_proj, mlp.down_proj), False, ACTIVATIONS[mlp.act.name]
        raise Unfit(f"feed-forward layers of another kind ({type(mlp).__name__})")

    def _rope(self, rope: Any) -> int | None:
        """Which of the model's kinds of RoPE it is; None where it rotates nothing."""
        if type(rope) is not RoPE:
            raise Unfit(f"positions of its own ({type(rope).__name__})")
        if rope.dims == 0:
            return None
        scaling = rope.scaling or RopeScaling()
        if frequencies.depends_on_length(scaling):
            raise Unfit("frequencies that depend on the length")
        settings = (scaling, rope.dims, rope.base, rope.scale, rope.max_position_embeddings)
        for index, (known, _) in enumerate(self._kinds):
            if known == settings:
                return index
        if len(self._kinds) == _MOST_KINDS:
            raise Unfit(f"more than {_MOST_KINDS} kinds of positions")
        limit = rope.max_position_embeddings
        turns = frequencies.inverse_frequencies(
            scaling, dims=rope.dims, base=rope.base, max_position_embeddings=limit, length=0
        )
        self._kinds.append((settings, (np.array(turns) * rope.scale, float(rope.factor))))
        return len(self._kinds) - 1

    def _rope_dims(self) -> int:
        dims = {2 * len(turns) for _, (turns, _) in self._kinds}
        if len(dims) > 1:
            raise Unfit("heads that are rotated in parts of several sizes")
        return dims.pop() if dims else 0

    def _norm(self, norm: Any) -> None:
        if type(norm) is not RMSNorm:
            raise Unfit(f"norms of another kind ({type(norm).__name__})")

    def _matrix(self, linear: Any) -> Matrix:
        if type(linear) in (PlainLinear, PlainExperts, BareExperts):
            return Matrix(mx.contiguous(linear.weight), bias=linear.bias)
        if type(linear) in (QuantizedLinear, QuantizedExperts):
            return _packed(linear, linear.bias)
        raise Unfit(f"linear layers of another kind ({type(linear).__name__})")

    def _summand(self, linear: Any) -> Matrix:
        """What this rank gives to a layer: with its bias, or the bias of a sum over ranks if it is to add that."""
        if type(linear) is not Summed:
            return self._matrix(linear)
        matrix = self._matrix(linear.inner)
        return matrix if linear.exchange.rank else matrix._replace(bias=linear.bias)

    def _embedding(self, table: Any) -> Matrix:
        if type(table) is PlainEmbedding:
            return Matrix(mx.contiguous(table.weight))
        if type(table) is QuantizedEmbedding:
            return _packed(table, None)
        raise Unfit(f"embeddings of another kind ({type(table).__name__})")

    def _small_type(self, model: Any, layers: Sequence[LayerTensors], head: Matrix) -> str:
        """The type of norms and biases: the one that all have, if it has 16 bits, else float32."""
        arrays = [model.norm.weight, *([] if head.bias is None else [head.bias])]
        for layer in layers:
            arrays += [layer.input_norm, layer.inner_norm, *(m.bias for m in layer.products if m.bias is not None)]
            arrays += [norm for norm in (layer.query_norm, layer.key_norm) if norm is not None]
        found = {_named(array.dtype) for array in arrays}
        return found.pop() if len(found) == 1 else "float32"

    def _small_arrays(self, layer: LayerTensors, small: str) -> LayerTensors:
        """The layer with its norms and biases in the type of all."""
        return layer._replace(
            products=tuple(  # type: ignore[arg-type]
                m if m.bias is None else m._replace(bias=_flat(m.bias, small)) for m in layer.products
            ),
            input_norm=_flat(layer.input_norm, small),
            inner_norm=_flat(layer.inner_norm, small),
            query_norm=None if layer.query_norm is None else _flat(layer.query_norm, small),
            key_norm=None if layer.key_norm is None else _flat(layer.key_norm, small),
        )


def _unpacked(matrix: QuantizedWeight) -> mx.array:
    """A small packed matrix in float32, as exact as its product with float32 is."""
    if matrix.biases is not None:
        scales, biases = (array.astype(mx.float32) for array in (matrix.scales, matrix.biases))
        matrix = matrix._replace(scales=scales, biases=biases)
    return matrix.dequantize().astype(mx.float32)


def _packed(fields: QuantizedFields, bias: mx.array | None) -> Matrix:
    if (form := Form(fields.bits, fields.group_size, fields.mode)).bits and not form.known:
        raise Unfit(f"weights of {form}")
    weight, scales = mx.contiguous(fields.weight), mx.contiguous(fields.scales)
    return Matrix(weight, scales, None if fields.biases is None else mx.contiguous(fields.biases), bias)


def _form(layer: Any) -> Form:
    return Form(layer.bits, layer.group_size, layer.mode) if isinstance(layer, QuantizedFields) else Form()


def _flat(array: mx.array, dtype: str) -> mx.array:
    return mx.contiguous(array.astype(getattr(mx, dtype)))


def _named(dtype: mx.Dtype) -> str:
    return str(dtype).rpartition(".")[2]


def _same(module: object, known: type, *methods: str) -> None:
    """Check that a module's methods are those of the class that was read."""
    for name in methods:
        mine: Callable[..., Any] | None = getattr(type(module), name, None)
        if mine is not getattr(known, name):
            raise Unfit(f"{type(module).__module__.rpartition('.')[2]}'s own {type(module).__name__}.{name}")
