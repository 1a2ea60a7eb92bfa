"""Multi-head latent attention (MLA): all heads' keys and values come from one narrow row per token, the latent.

Source: DeepSeek V2, arXiv:2405.04434 section 2.1; the absorbed form is in its appendix C.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import mlx.core as mx

from runner.cache.kv import History, KVCache
from runner.cache.several import Histories
from runner.config.base import Config, key
from runner.config.decoder import DecoderConfig
from runner.config.memory import Memory, Rows
from runner.config.rope import yarn_mscale
from runner.errors import ConfigError
from runner.nn.attention import Attend, merge_heads, split_heads
from runner.nn.batch import Batch, together
from runner.nn.fast import RMSNorm, RoPE
from runner.nn.linear import Linear, Update
from runner.nn.moe import ExpertLinear
from runner.ops.table import PORTABLE, Ops
from runner.weights.module import Module
from runner.weights.tags import Choice, Chooses, Header, setting, weight
from runner.weights.tree import Size, Tree, leaves

HIDDEN, LATENT, QUERY_LATENT = "hidden_size", "kv_lora_rank", "q_lora_rank"
QUERIES = "num_attention_heads*qk_head_dim"
KEYS_AND_VALUES = "num_attention_heads*key_and_value_dim"
KEYS, VALUES = "num_attention_heads*qk_nope_head_dim", "num_attention_heads*v_head_dim"
NORM_EPS = 1e-6  # epsilon of the norms inside attention, whatever rms_norm_eps says


@dataclass(frozen=True, kw_only=True)
class LatentConfig(DecoderConfig):
    """The keys of `config.json` that latent attention reads."""

    q_lora_rank: int | None = 1536
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    qk_head_dim: int = key(default=0, minimum=0)
    v_head_dim: int = 128

    def __post_init__(self) -> None:
        if self.head_dim not in (0, self.qk_rope_head_dim):
            raise ConfigError(f"config.json: head_dim = {self.head_dim} and qk_rope_head_dim = {self.qk_rope_head_dim}")
        super().__post_init__()
        object.__setattr__(self, "qk_head_dim", self.qk_nope_head_dim + self.qk_rope_head_dim)

    def memory(self, index: int) -> tuple[Memory, ...]:
        return (Rows(1, self.kv_lora_rank, self.qk_rope_head_dim, joined=True),)

    @property
    def key_and_value_dim(self) -> int:
        """Rows of a head in the matrix that makes keys, but for what RoPE turns, and values."""
        return self.qk_nope_head_dim + self.v_head_dim

    @property
    def rotary_dim(self) -> int:
        return self.qk_rope_head_dim

    @property
    def traditional(self) -> bool:
        """RoPE rotates pairs (2i, 2i+1)."""
        return True

    @property
    def attention_scale(self) -> float:
        # YaRN with `mscale_all_dim` raises the scores by the square of its factor (once for q, once for k).
        scaling = self.rope_scaling
        stretched = scaling is not None and scaling.kind == "yarn" and scaling.mscale_all_dim
        factor = yarn_mscale(scaling.factor or 1.0, scaling.mscale_all_dim or 1.0) if scaling and stretched else 1.0
        return float(self.qk_head_dim**-0.5) * factor * factor


class Queries(Chooses):
    """`[B, L, hidden_size] -> [B, L, heads * qk_head_dim]`, through a query latent if the config has `q_lora_rank`."""

    def __call__(self, x: mx.array) -> mx.array:
        raise NotImplementedError

    @classmethod
    def choose(cls, tree: Tree, shape: tuple[Size, ...], headers: Mapping[str, Header], config: Config) -> Choice:
        assert isinstance(config, LatentConfig)
        return Choice(PlainQueries if config.q_lora_rank is None else LatentQueries, {})


@dataclass
class PlainQueries(Queries):
    """Queries projected by one matrix."""

    q_proj: Linear = weight("q_proj", QUERIES, HIDDEN)

    def __call__(self, x: mx.array) -> mx.array:
        return self.q_proj(x)


@dataclass
class LatentQueries(Queries):
    """Queries projected down to the query latent, normalized, and projected up."""

    q_a_proj: Linear = weight("q_a_proj", QUERY_LATENT, HIDDEN, bias="attention_bias")
    q_a_layernorm: RMSNorm = weight("q_a_layernorm", QUERY_LATENT)
    q_b_proj: Linear = weight("q_b_proj", QUERIES, QUERY_LATENT)

    def __call__(self, x: mx.array) -> mx.array:
        return self.q_b_proj(self.latent(x))

    def latent(self, x: mx.array) -> mx.array:
        """The normalized query latent, `[B, L, q_lora_rank]`."""
        return self.q_a_layernorm(self.q_a_proj(x), NORM_EPS)


class KeysAndValues(Chooses):
    """The up-projection of latents `[..., kv_lora_rank]` to the keys and values of all heads, `[..., rows]`."""

    def __call__(self, x: mx.array) -> mx.array:
        return x @ self.matrix().T

    def matrix(self) -> mx.array:
        """The projection `[rows, kv_lora_rank]`; rows: keys of head 0, values of head 0, keys of head 1, ..."""
        raise NotImplementedError

    @property
    def changeable(self) -> bool:
        """Whether `matrix()` itself may differ at the next call; see `ExpertLinear.changeable`."""
        return False

    def updates(self) -> list[Update]:
        """As `Linear.updates`."""
        return []

    @property
    def runs(self) -> list[int]:
        """As `Linear.runs`."""
        return []

    def of(self, token: int) -> KeysAndValues:
        """As `Linear.of`."""
        return self

    @classmethod
    def choose(cls, tree: Tree, shape: tuple[Size, ...], headers: Mapping[str, Header], config: Config) -> Choice:
        apart = f"{next(leaves(tree)).name}.embed_q.weight" in headers
        return Choice(SplitKeysAndValues if apart else JoinedKeysAndValues, {})


@dataclass
class JoinedKeysAndValues(KeysAndValues):
    """The projection stored as DeepSeek does: one matrix, `kv_b_proj`."""

    kv_b_proj: Linear = weight("kv_b_proj", KEYS_AND_VALUES, LATENT)

    def __call__(self, x: mx.array) -> mx.array:
        return self.kv_b_proj(x)

    def matrix(self) -> mx.array:
        return self.kv_b_proj.matrix()

    def updates(self) -> list[Update]:
        return self.kv_b_proj.updates()

    @property
    def runs(self) -> list[int]:
        return self.kv_b_proj.runs

    def of(self, token: int) -> JoinedKeysAndValues:
        return replace(self, kv_b_proj=self.kv_b_proj.of(token))


@dataclass
class SplitKeysAndValues(KeysAndValues):
    """The projection stored as mlx-lm does for DeepSeek V3: keys (transposed) and values apart, stacked over heads."""

    embed_q: ExpertLinear = weight("embed_q[num_attention_heads]", LATENT, "qk_nope_head_dim")
    unembed_out: ExpertLinear = weight("unembed_out[num_attention_heads]", "v_head_dim", LATENT)

    def matrix(self) -> mx.array:
        # Both as [heads, rows, latent]: a head's keys are followed by its values, as in `kv_b_proj`.
        heads = [self.embed_q.matrices().swapaxes(-1, -2), self.unembed_out.matrices()]
        return mx.concatenate(heads, axis=1).flatten(0, 1)

    @property
    def changeable(self) -> bool:
        return self.embed_q.changeable or self.unembed_out.changeable


Narrow = Callable[[int, History, Batch], tuple[History, Batch]]
"""Leaves rows out of what the attention of a part of the batch sees: either fewer rows, or a mask in the batch."""


@dataclass
class LatentAttention(Module):
    """Attention that caches, per token for all heads, a latent (`kv_lora_rank`) and a rotated key (`qk_rope_head_dim`).

    The expanded form makes each head's keys and values from the latents with `kv_b_proj`, then attends as usual. With
    few queries it is cheaper to absorb `kv_b_proj`: queries are projected into the latent space, all heads attend to
    the latents themselves, and the result is projected to values. Devices of `one_form` have that form only.
    """

    rope: RoPE
    attend: Attend
    queries: Queries = weight("")
    kv_a_proj: Linear = weight(
        "kv_a_proj_with_mqa", ("kv_lora_rank", "qk_rope_head_dim"), HIDDEN, bias="attention_bias"
    )
    kv_a_layernorm: RMSNorm = weight("kv_a_layernorm", LATENT)
    kv_b_proj: KeysAndValues = weight("")
    o_proj: Linear = weight("o_proj", HIDDEN, VALUES, bias="attention_bias")
    kv_lora_rank: int = setting()
    qk_nope_head_dim: int = setting()
    qk_rope_head_dim: int = setting()
    v_head_dim: int = setting()
    activations: mx.Dtype | None = setting(default=None)
    kept: tuple[mx.array, mx.array] | None = field(init=False, default=None, repr=False)

    def __post_init__(self) -> None:
        # Unpacked once, here: layers are shared by threads, so that nothing in them may change while they compute.
        if not self.kv_b_proj.changeable:
            to_keys, to_values = self.matrices()
            if self.attend.ops.one_form:  # lying in memory as `linear_each` reads it, not to be copied for each token
                to_keys = mx.contiguous(to_keys.swapaxes(-1, -2)).swapaxes(-1, -2)
            self.kept = to_keys, to_values

    def __call__(self, x: mx.array, batch: Batch, cache: KVCache) -> mx.array:
        return self.attended(self.project(x, batch), x, batch, cache)

    def attended(
        self, queries: mx.array, x: mx.array, batch: Batch, cache: KVCache, narrow: Narrow | None = None
    ) -> mx.array:
        """Attention of `queries` `[B, L, heads * qk_head_dim]`; `narrow` may leave some of the cache's rows out."""
        # Each query head has a part without position and a rotated part.
        q, rotary = mx.split(
            split_heads(queries, self.qk_nope_head_dim + self.qk_rope_head_dim), [self.qk_nope_head_dim], -1
        )
        rotary = self.rope(rotary, batch.offset, batch.length, once=batch.once)
        # One latent and one rotated key per token; the cache stores them as its keys and values.
        latent, key = mx.split(self.kv_a_proj(x)[:, None], [self.kv_lora_rank], axis=-1)  # [B, 1, L, ...]
        key = self.rope(key, batch.offset, batch.length, once=batch.once)
        stored = cache.append(self.kv_a_layernorm(latent, NORM_EPS), key)
        if self.attend.ops.one_form and narrow is None and not batch.masked:
            return self.o_proj(merge_heads(self.absorbed(q, rotary, stored, batch)))
        # The form is chosen, and rows are left out, for each request by itself.
        heads: list[mx.array] = []
        start = 0
        pieces = zip(batch.parts, stored.each, batch.split(q, 2), batch.split(rotary, 2), strict=True)
        for index, (part, history, own_q, own_rotary) in enumerate(pieces):
            if narrow is not None:
                history, part = narrow(index, history, part)
            own = self.of(start)
            form = own.absorbed if self.absorbs(own_q.shape[2], history.length) else own.expanded
            heads.append(form(own_q, own_rotary, history, part))
            start += own_q.shape[2]
        return self.o_proj(merge_heads(together(heads, 2)))

    def of(self, token: int) -> LatentAttention:
        """The layer as it is for the request of the pass' token at this place: itself, where adapters do not differ."""
        if not self.kv_b_proj.runs:
            return self
        own = copy.copy(self)
        own.kv_b_proj = self.kv_b_proj.of(token)
        return own

    def project(self, x: mx.array, batch: Batch) -> mx.array:
        """Queries of all heads before RoPE, `[B, L, heads * qk_head_dim]`."""
        return self.queries(x)

    def absorbs(self, queries: int, keys: int) -> bool:
        """Whether the absorbed form needs fewer multiplications, per head, than the expanded one."""
        if self.attend.ops.one_form:
            return True
        # Per form: projections by kv_b_proj, then scores and weighted sums.
        both = self.qk_nope_head_dim + self.v_head_dim
        expanded = keys * self.kv_lora_rank * both + queries * keys * (both + self.qk_rope_head_dim)
        absorbed = queries * self.kv_lora_rank * both + queries * keys * (2 * self.kv_lora_rank + self.qk_rope_head_dim)
        return absorbed < expanded

    def expanded(self, q: mx.array, rotary: mx.array, stored: History, batch: Batch) -> mx.array:
        """Expanded form: every key and value is made; `q` and its `rotary` part give heads `[B, H, L, v_head_dim]`."""
        rows = split_heads(self.kv_b_proj(stored.keys[:, 0]), self.qk_nope_head_dim + self.v_head_dim)
        k, v = mx.split(rows, [self.qk_nope_head_dim], axis=-1)
        # All heads share the rotated key, which the cache stores as its values.
        shared = mx.broadcast_to(stored.values, (*k.shape[:3], stored.values.shape[-1]))
        history = History(mx.concatenate([k, shared], axis=-1), v, stored.length)
        return self.attend(mx.concatenate([q, rotary], axis=-1), history, batch)

    def absorbed(self, q: mx.array, rotary: mx.array, stored: History | Histories, batch: Batch) -> mx.array:
        """Absorbed form of `expanded`: a token's row in the cache serves as key and value of all heads."""
        to_keys, to_values = self.matrices() if self.kept is None else self.kept
        latents = [self.latents(history) for history in stored.each]
        history = Histories(tuple(latents), stored.counts) if isinstance(stored, Histories) else latents[0]
        queries = mx.concatenate([self.inward(q, to_keys), rotary], axis=-1)
        return self.outward(self.attend(queries, history, batch), to_values.swapaxes(-1, -2))

    def inward(self, q: mx.array, to_keys: mx.array) -> mx.array:
        """Queries without position `[B, H, L, qk_nope_head_dim]`, brought to the latents."""
        ops, pieces = self.attend.ops, []
        for piece, updates in self.by_run(q):
            added = []
            for update in reversed(updates):  # the matrix is used from its other side
                if update.gain is not None:
                    gain, _ = self.of_heads(update.gain[:, None])
                    piece = (piece * gain.swapaxes(-1, -2)).astype(piece.dtype)
                lows = by_head(piece, self.of_heads(update.up)[0], ops) * update.scale
                added.append(ops.linear(lows.astype(piece.dtype), update.down.T, None))
            found = by_head(piece, to_keys, ops)
            for more in added:
                found = found + more.astype(found.dtype)
            pieces.append(found)
        return together(pieces, 2)

    def outward(self, latents: mx.array, to_values: mx.array) -> mx.array:
        """What heads gathered of latents `[B, H, L, kv_lora_rank]`, as values."""
        ops, pieces = self.attend.ops, []
        for piece, updates in self.by_run(latents):
            found = by_head(piece, to_values, ops)
            for update in updates:
                lows = ops.linear(piece, update.down, None) * update.scale
                more = by_head(lows.astype(piece.dtype), self.of_heads(update.up)[1].swapaxes(-1, -2), ops)
                found = found + more.astype(found.dtype)
                if update.gain is not None:
                    _, gain = self.of_heads(update.gain[:, None])
                    found = (found * gain.swapaxes(-1, -2)).astype(found.dtype)
            pieces.append(found)
        return together(pieces, 2)

    def by_run(self, x: mx.array) -> list[tuple[mx.array, list[Update]]]:
        """`x` `[B, H, L, D]`, cut along its tokens where adapters differ, and what these do to `kv_b_proj`."""
        if not (counts := self.kv_b_proj.runs):
            return [(x, self.kv_b_proj.updates())]
        starts = list(itertools.accumulate(counts[:-1], initial=0))
        pieces = mx.split(x, starts[1:], 2)
        return [(piece, self.kv_b_proj.of(start).updates()) for piece, start in zip(pieces, starts, strict=True)]

    def latents(self, stored: History) -> History:
        """Keys that are whole rows, a latent and a rotated key, and values that are only the latents."""
        rows = stored.rows
        return History(rows, rows[..., : self.kv_lora_rank], stored.length)

    def matrices(self) -> tuple[mx.array, mx.array]:
        """The parts of `kv_b_proj` that make keys and values, `[H, qk_nope_head_dim, kv_lora_rank]` and
        `[H, v_head_dim, kv_lora_rank]`, dequantized, in the dtype of activations.
        """
        matrix = self.kv_b_proj.matrix()
        return self.of_heads(matrix if self.activations is None else matrix.astype(self.activations))

    def of_heads(self, rows: mx.array) -> tuple[mx.array, mx.array]:
        """Of an array with the rows of `kv_b_proj`, `[rows, D]`, those of keys and those of values, `[H, ..., D]`."""
        apart = rows.reshape(-1, self.qk_nope_head_dim + self.v_head_dim, rows.shape[-1])
        return apart[:, : self.qk_nope_head_dim], apart[:, self.qk_nope_head_dim :]


def by_head(x: mx.array, matrices: mx.array, ops: Ops = PORTABLE) -> mx.array:
    """Each head's `x` `[B, H, L, D]` times its matrix of `[H, D, E]`: `[B, H, L, E]`."""
    if ops.one_form:
        batch, heads, length, size = x.shape
        rows = x.swapaxes(0, 1).reshape(heads, batch * length, size)
        found = ops.linear_each(rows, matrices.swapaxes(-1, -2))
        return found.reshape(heads, batch, length, -1).swapaxes(0, 1)
    if x.shape[0] > 1:
        return x @ matrices
    # With as many dimensions as the matrices have: MLX copies what it broadcasts, all heads' matrices for each token.
    return mx.expand_dims(mx.squeeze(x, 0) @ matrices, 0)
