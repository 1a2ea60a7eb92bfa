"""The indexer of DeepSeek's sparse attention: cheap scores choose the tokens that attention looks at.

Source: DeepSeek V3.2, arXiv:2512.02556 section 2.1. The authors' code also turns queries and keys by a Hadamard matrix,
before it rounds them to 8 bits; it changes no product of theirs, and here nothing is rounded.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx

from runner.cache.kv import History, KVCache
from runner.nn.attention import split_heads
from runner.nn.batch import Batch
from runner.nn.fast import LayerNorm, RoPE, provided_ops
from runner.nn.linear import HIDDEN, Linear
from runner.ops.attention import window_mask
from runner.ops.table import Ops
from runner.weights.module import Module
from runner.weights.tags import setting, weight

KEY_EPS = 1e-6  # epsilon of the LayerNorm on keys, whatever the config says
AT_ONCE = 8
"""Heads whose scores are computed at a time: all 64 of them at once would take gigabytes for a long prompt."""


Chosen = tuple[mx.array | None, ...]
"""For each part of a batch the indices `[B, L, k]` of the rows that its queries look at; None: all that are earlier."""


@dataclass
class IndexerRoPE(RoPE):
    """RoPE on the first numbers of the indexer's heads; models differ in whether it turns neighbours or halves."""

    traditional: bool = setting("indexer_rope_interleave", default=False)


@dataclass
class Indexer(Module):
    """Chooses, for each query, the `index_topk` earlier tokens with the largest scores.

    A score is the sum over heads of `relu(q k)` times a weight of the query's own. Each token has one key for all
    heads; a cache of its own keeps it, the rotated part as key and the rest as value.
    """

    rope: IndexerRoPE
    wq_b: Linear = weight("wq_b", "index_n_heads*index_head_dim", "q_lora_rank")
    wk: Linear = weight("wk", "index_head_dim", HIDDEN)
    k_norm: LayerNorm = weight("k_norm", "index_head_dim")
    weights_proj: Linear = weight("weights_proj", "index_n_heads", HIDDEN)
    index_head_dim: int = setting()
    index_topk: int = setting()
    qk_rope_head_dim: int = setting()
    ops: Ops = provided_ops()

    def __call__(self, x: mx.array, latent: mx.array, batch: Batch, cache: KVCache) -> Chosen:
        """What each part of the batch looks at. `x` is `[B, L, hidden_size]`, `latent` `[B, L, q_lora_rank]`."""
        key = self.rope(self.k_norm(self.wk(x), KEY_EPS)[:, None], batch.offset, batch.length, once=batch.once)
        stored = cache.append(*mx.split(key, [self.qk_rope_head_dim], axis=-1))
        if all(history.length <= self.index_topk for history in stored.each):
            return (None,) * len(stored.each)
        queries = split_heads(self.wq_b(latent), self.index_head_dim)  # [B, heads, L, index_head_dim]
        queries = self.rope(queries, batch.offset, batch.length, once=batch.once).astype(mx.float32)
        weights = self.weights_proj(x).astype(mx.float32).swapaxes(1, 2)[..., None]  # [B, heads, L, 1]
        parts = zip(batch.parts, stored.each, batch.split(queries, 2), batch.split(weights, 2), strict=True)
        return tuple(self.choose(*part) for part in parts)

    def choose(self, batch: Batch, stored: History, queries: mx.array, weights: mx.array) -> mx.array | None:
        """Indices `[B, L, index_topk]` of the chosen rows, those of later tokens among them where there are too few.

        None: there are not more tokens than are chosen. `queries` are `[B, heads, L, index_head_dim]`, `weights`
        `[B, heads, L, 1]`.
        """
        if stored.length <= self.index_topk:
            return None
        batches, _, length, _ = queries.shape
        keys = stored.rows.astype(mx.float32)
        scores = mx.zeros((batches, length, stored.length))
        for first in range(0, queries.shape[1], AT_ONCE):
            heads = slice(first, first + AT_ONCE)
            scores = scores + mx.sum(
                mx.maximum(products(queries[:, heads], keys, self.ops), 0) * weights[:, heads], axis=1
            )
        scores = mx.where(causal(batch, length, stored.length), scores, -mx.inf)
        return mx.argpartition(scores, kth=-self.index_topk, axis=-1)[..., -self.index_topk :]


def products(queries: mx.array, keys: mx.array, ops: Ops) -> mx.array:
    """Products of queries `[B, heads, L, D]` with keys `[B, 1, S, D]` of all heads: `[B, heads, L, S]`."""
    if not ops.one_form:
        return queries @ keys.swapaxes(-1, -2)
    return ops.linear_each(queries.flatten(1, 2), keys[:, 0]).reshape(*queries.shape[:3], -1)


def causal(batch: Batch, queries: int, keys: int) -> mx.array:
    """The boolean mask that `batch` has or implies, `[queries, keys]` or `[B, queries, keys]`."""
    if batch.mask is None:
        return window_mask(queries, keys, keys)
    mask = batch.mask if batch.mask.dtype == mx.bool_ else batch.mask > -mx.inf
    return mask[:, 0] if mask.ndim == 4 else mask


def narrowing(choices: Chosen, ops: Ops) -> Callable[[int, History, Batch], tuple[History, Batch]]:
    """What leaves the rows out that a part did not choose: one query reads k rows, several have a mask.

    Devices of `one_form` always have a mask.
    """

    def narrow(index: int, stored: History, batch: Batch) -> tuple[History, Batch]:
        chosen = choices[index]
        if chosen is None:
            return stored, batch
        if chosen.shape[1] == 1 and batch.mask is None and not ops.one_form:
            rows = chosen[:, :, :, None]
            keys, values = (mx.take_along_axis(part, rows, axis=2) for part in (stored.keys, stored.values))
            return History(keys, values, chosen.shape[2]), batch
        seen = mx.zeros((*chosen.shape[:2], stored.length), dtype=mx.bool_)
        seen = mx.put_along_axis(seen, chosen, mx.array(True), axis=-1)
        mask = seen & causal(batch, chosen.shape[1], stored.length)
        if batch.mask is not None and batch.mask.dtype != mx.bool_:
            return stored, dataclasses.replace(batch, mask=mx.where(mask[:, None], batch.mask, -mx.inf))
        return stored, dataclasses.replace(batch, mask=mask[:, None])

    return narrow
