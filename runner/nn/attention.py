"""Attention over a KV cache: plain, soft-capped or with sinks; splitting, normalizing and merging heads."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx

from runner.cache.kv import History
from runner.errors import UsageError
from runner.nn.batch import Batch
from runner.nn.fast import NO_MASK, Mask, provided_ops, scaled_dot_product_attention, soft_capped
from runner.ops.table import PORTABLE, Ops, chunk_mask, window_mask
from runner.weights.module import Module
from runner.weights.tags import setting, tensor


@dataclass
class HeadNorms(Module):
    """A LayerNorm without bias for each head, weights `[heads, head_dim]`, for x `[B, heads, L, head_dim]`."""

    weight: mx.array
    ops: Ops = provided_ops()

    def __call__(self, x: mx.array, eps: float) -> mx.array:
        return self.ops.layer_norm(x, None, None, eps) * self.weight[:, None].astype(x.dtype)


@dataclass
class JoinedHeadNorms(HeadNorms):
    """Head norms stored as one tensor per head, stacked when read."""

    weight: mx.array = tensor("weight", "$0")


@dataclass
class StoredHeadNorms(HeadNorms):
    """Head norms stored as one tensor `[heads, head_dim]`."""

    weight: mx.array = tensor("weight", "$0", "$1")


@dataclass
class Attend(Module):
    """Scaled dot product attention over the keys and values in a cache, soft-capped if the config says so."""

    scale: float = setting("attention_scale")
    softcap: float | None = setting("attn_logit_softcapping", default=None)
    ops: Ops = provided_ops()

    def __call__(self, query: mx.array, history: History, batch: Batch) -> mx.array:
        """`query` `[B, H, L, D]` -> `[B, H, L, Dv]`; see `scaled_dot_product_attention`."""
        if self.softcap is None:
            return self.uncapped(query, history, batch, None)
        mask = own_mask(query, history, batch)
        if mask is None and query.shape[2] > 1:
            mask = shared_mask(window_mask, query, history, batch)
        return capped_attention(query, history, mask, scale=self.scale, softcap=self.softcap, ops=self.ops)

    def uncapped(self, query: mx.array, history: History, batch: Batch, sinks: mx.array | None) -> mx.array:
        """Attention without soft-capping, by the device's op, over what `history` has stored."""
        mask, window, make = own_mask(query, history, batch), history.window, self.ops.window_mask
        # One query needs no mask: it sees the last keys. Several need one that layers of the same window can share.
        if make is not None and mask is None and window is not None and query.shape[2] > 1 and window < history.length:
            mask, window = shared_mask(make, query, history, batch), None
        return scaled_dot_product_attention(
            query,
            history.stored_keys,
            history.stored_values,
            mask,
            scale=self.scale,
            window=window,
            length=history.length,
            sinks=sinks,
            ops=self.ops,
        )


@dataclass
class SinkAttend(Attend):
    """Attention with a learned sink per head: one more logit in the softmax, without a value (arXiv:2309.17453)."""

    sinks: mx.array = tensor("sinks", "num_attention_heads")

    def __call__(self, query: mx.array, history: History, batch: Batch) -> mx.array:
        return self.uncapped(query, history, batch, self.sinks.astype(query.dtype))


def own_mask(query: mx.array, history: History, batch: Batch) -> mx.array | None:
    """The batch's mask, or that of several queries of which some see a chunk that has ended; None: causal."""
    chunk = history.chunk
    if batch.mask is not None or chunk is None or query.shape[2] == 1 or history.length <= chunk:
        return batch.mask
    sizes = (query.shape[2], history.length, chunk)
    return batch.once((chunk_mask, sizes), functools.partial(chunk_mask, *sizes))


def shared_mask(make: Callable[[int, int, int], mx.array], query: mx.array, history: History, batch: Batch) -> mx.array:
    """The causal mask of `history`'s window, made by `make` once for all layers of the pass that it fits."""
    sizes = (query.shape[2], history.length, history.window or history.length)
    return batch.once((make, sizes), functools.partial(make, *sizes))


def capped_attention(
    query: mx.array,
    history: History,
    mask: Mask = None,
    *,
    scale: float,
    softcap: float,
    ops: Ops = PORTABLE,
) -> mx.array:
    """Attention whose scores pass `softcap * tanh(score / softcap)` (Gemma 2, arXiv:2408.00118) before the mask.

    `query` `[B, H, L, D]` -> `[B, H, L, Dv]`; masks as in `scaled_dot_product_attention`. No fused op soft-caps, so the
    scores are computed in full, `[B, H, L, S]`. An array takes the place of the cache's window: whoever makes it has
    applied the window.

    Raises:
        UsageError: the mask is none that attention knows, or it is NO_MASK and the cache has a window.
    """
    if not (mask is None or isinstance(mask, mx.array) or mask == NO_MASK):
        raise UsageError(f"attention: mask must be an array, NO_MASK or None (causal), not {mask!r}")
    if mask is not None and not isinstance(mask, mx.array) and history.window is not None:
        raise UsageError("attention: NO_MASK and a window exclude each other")
    if mask is None:
        # Causal, within the cache's window if it has one: a single query sees all of that.
        queries, window = query.shape[2], history.window or history.length
        history = history.latest(window) if queries == 1 else history
        mask = NO_MASK if queries == 1 else window_mask(queries, history.length, window)
    keys, values = history.keys, history.values
    grouped = query.reshape(query.shape[0], keys.shape[1], -1, *query.shape[2:])  # [B, KV, H / KV, L, D]
    # Scaled before the product where that has 16 bits, which large scores would leave; capped in float32 always.
    small = query.dtype != mx.float32
    products = (grouped * scale if small else grouped) @ keys[:, :, None].swapaxes(-1, -2)
    scores = ops.fused(capped_scores, products, 1.0 if small else scale, softcap)
    # A boolean mask hides, any other is added; NO_MASK leaves the scores as they are.
    if isinstance(mask, mx.array):
        whole = mx.broadcast_to(mask, (*query.shape[:3], history.length)).reshape(scores.shape)
        scores = mx.where(whole, scores, -mx.inf) if whole.dtype == mx.bool_ else scores + whole
    probabilities = mx.softmax(scores, axis=-1).astype(values.dtype)
    return (probabilities @ values[:, :, None]).reshape(*query.shape[:3], -1)


def capped_scores(products: mx.array, scale: float, cap: float) -> mx.array:
    """Soft-capped scores in float32, from the products of queries and keys."""
    return soft_capped(products.astype(mx.float32) * scale, cap)


def split_heads(x: mx.array, head_dim: int) -> mx.array:
    """`[B, L, N * head_dim] -> [B, N, L, head_dim]`, a view."""
    if x.shape[1] == 1:  # with one position, both axis orders have the same memory layout: no copy
        return x.reshape(x.shape[0], -1, 1, head_dim)
    return x.reshape(*x.shape[:2], -1, head_dim).swapaxes(1, 2)


def merge_heads(x: mx.array) -> mx.array:
    """The inverse of `split_heads`."""
    if x.shape[2] == 1:
        return x.reshape(x.shape[0], 1, -1)
    return x.swapaxes(1, 2).flatten(2)
