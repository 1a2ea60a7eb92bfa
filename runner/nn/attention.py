"""Attention over a KV cache: plain, soft-capped or with sinks; splitting, normalizing and merging heads."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from runner.cache.kv import History
from runner.cache.several import Histories
from runner.nn.batch import Batch, together
from runner.nn.fast import provided_ops, scaled_dot_product_attention
from runner.ops.attention import chunk_mask
from runner.ops.table import Ops
from runner.weights.module import Module
from runner.weights.tags import setting, tensor


@dataclass
class HeadNorms(Module):
    """A LayerNorm without bias for each head, weights `[heads, head_dim]`, for x `[B, heads, L, head_dim]`."""

    DIVIDES = True  # by heads: each has a norm of its own
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

    def __call__(self, query: mx.array, history: History | Histories, batch: Batch) -> mx.array:
        """`query` `[B, H, L, D]` -> `[B, H, L, Dv]`; see `scaled_dot_product_attention`."""
        return self.attended(query, history, batch, None)

    def attended(self, query: mx.array, history: History | Histories, batch: Batch, sinks: mx.array | None) -> mx.array:
        """Attention by the device's op, over what `history` has stored."""
        if isinstance(history, Histories):
            if not batch.masked:
                how: Any = {"scale": self.scale, "sinks": sinks, "softcap": self.softcap}
                if history.new is not None:
                    found = self.ops.attention_step(query, history.new, history.counts, batch.steps, **how)
                    if found is not None:
                        history.written()
                        return found
                return self.ops.attention_rows(query, history.each, history.counts, **how)
            pieces = zip(batch.split(query, 2), history.each, batch.parts, strict=True)
            return together([self.attended(*piece, sinks) for piece in pieces], 2)
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
            softcap=self.softcap,
            start=history.start,
            ops=self.ops,
        )


@dataclass
class SinkAttend(Attend):
    """Attention with a learned sink per head: one more logit in the softmax, without a value (arXiv:2309.17453)."""

    DIVIDES = True  # a sink belongs to one head
    sinks: mx.array = tensor("sinks", "num_attention_heads")

    def __call__(self, query: mx.array, history: History | Histories, batch: Batch) -> mx.array:
        return self.attended(query, history, batch, self.sinks)


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
