"""Latent attention: the absorbed form against the expanded one, which makes every key and value."""

from __future__ import annotations

import dataclasses
from typing import Any

import mlx.core as mx
import pytest
from operations import forget, operations

from runner.adapters.layers import AdaptedLinear, Delta
from runner.adapters.used import Used
from runner.cache.caches import Caches
from runner.cache.kv import History, JoinedKVCache, KVCache
from runner.cache.storage import PLAIN, Storage
from runner.nn.attention import Attend
from runner.nn.batch import Batch
from runner.nn.fast import RMSNorm, RoPE
from runner.nn.linear import Linear, PlainLinear, QuantizedLinear
from runner.nn.mla import JoinedKeysAndValues, LatentAttention, LatentConfig, PlainQueries, SplitKeysAndValues
from runner.nn.moe import ExpertLinear, PlainExperts, QuantizedExperts
from runner.ops.device import CPU_WITHOUT_KERNELS, current
from runner.ops.table import PORTABLE, Ops

HEADS, NOPE, ROTATED, VALUES, RANK, HIDDEN = 4, 16, 8, 24, 64, 32
TABLES = list({ops.name: ops for ops in (PORTABLE, CPU_WITHOUT_KERNELS, current().ops)}.values())
by_table = pytest.mark.parametrize("ops", TABLES, ids=lambda ops: ops.name)


def rand(*shape: int, seed: int) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed)) / shape[-1] ** 0.5


def attention(ops: Ops, bits: int | None = None) -> LatentAttention:
    matrix = rand(HEADS * (NOPE + VALUES), RANK, seed=1)
    linear: Linear = PlainLinear(matrix, ops=ops)
    if bits is not None:
        packed = mx.quantize(matrix, group_size=32, bits=bits)
        linear = QuantizedLinear(*packed, bits=bits, group_size=32, mode="affine", ops=ops)
    return LatentAttention(
        RoPE(dims=ROTATED, traditional=True, ops=ops),
        Attend(scale=0.3, ops=ops),
        PlainQueries(PlainLinear(rand(HEADS * (NOPE + ROTATED), HIDDEN, seed=2), ops=ops)),
        PlainLinear(rand(RANK + ROTATED, HIDDEN, seed=3), ops=ops),
        RMSNorm(1 + rand(RANK, seed=4), ops=ops),
        JoinedKeysAndValues(linear),
        PlainLinear(rand(HIDDEN, HEADS * VALUES, seed=5), ops=ops),
        kv_lora_rank=RANK,
        qk_nope_head_dim=NOPE,
        qk_rope_head_dim=ROTATED,
        v_head_dim=VALUES,
    )


def inputs(queries: int, keys: int) -> tuple[mx.array, mx.array, History]:
    """Queries, their rotated part, and a cache whose buffers have room for five more rows."""
    q, rotary = rand(2, HEADS, queries, NOPE, seed=6), rand(2, HEADS, queries, ROTATED, seed=7)
    return q, rotary, History(rand(2, 1, keys + 5, RANK, seed=8), rand(2, 1, keys + 5, ROTATED, seed=9), keys)


@by_table
@pytest.mark.parametrize("bits", [None, 4, 8])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 40), (3, 40), (9, 9)])
@pytest.mark.parametrize("masked", [False, True])
def test_the_absorbed_form_is_the_expanded_one(
    ops: Ops, bits: int | None, queries: int, keys: int, masked: bool
) -> None:
    layer = attention(ops, bits)
    mask = mx.arange(keys) >= 1 if masked and keys > queries else None  # the first key is padding
    batch = Batch(mx.zeros((2, queries), dtype=mx.int32), keys - queries, mask=mask)
    wanted = layer.expanded(*inputs(queries, keys), batch)
    found = layer.absorbed(*inputs(queries, keys), batch)
    assert found.shape == wanted.shape == (2, HEADS, queries, VALUES)
    # The kernels multiply packed weights with rows of 16 bits; the absorbed form has them as numbers.
    assert float(mx.max(mx.abs(found - wanted))) < (1e-5 if bits is None else 1e-3) * float(mx.max(mx.abs(wanted)))


@by_table
def test_the_absorbed_form_follows_an_adapter_whose_weight_changes(ops: Ops) -> None:
    layer, used = attention(ops), Used({"a": 1.0})
    out = HEADS * (NOPE + VALUES)
    delta = Delta("a", rand(2, RANK, seed=10), rand(out, 2, seed=11), 2.0)
    base = PlainLinear(rand(out, RANK, seed=1), ops=ops)
    adapted = JoinedKeysAndValues(AdaptedLinear(base, [delta], [], [], used, ops))
    layer = dataclasses.replace(layer, kv_b_proj=adapted)
    batch = Batch(mx.zeros((2, 1), dtype=mx.int32), 39)
    found = []
    for weight in (1.0, 0.5, 0.0):
        used.set([(0, {"a": weight})])
        found.append(layer.absorbed(*inputs(1, 40), batch))
        wanted = layer.expanded(*inputs(1, 40), batch)
        assert float(mx.max(mx.abs(found[-1] - wanted))) < 1e-5 * float(mx.max(mx.abs(wanted)))
    assert not mx.allclose(found[0], found[2], rtol=1e-2)


@by_table
def test_decoding_after_a_prompt_is_one_pass(ops: Ops, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, used = attention(ops), []
    for name in ("expanded", "absorbed"):
        form = vars(LatentAttention)[name]

        def traced(self: LatentAttention, *given: Any, form: Any = form, name: str = name) -> mx.array:
            used.append(name)
            result: mx.array = form(self, *given)
            return result

        monkeypatch.setattr(LatentAttention, name, traced)
    x = rand(1, 30, HIDDEN, seed=10)
    ids = mx.zeros((1, 30), dtype=mx.int32)
    whole = layer(x, Batch(ids), KVCache())
    cache = KVCache()
    parts = [layer(x[:, :20], Batch(ids[:, :20]), cache)]
    parts += [layer(x[:, i : i + 1], Batch(ids[:, i : i + 1], i), cache) for i in range(20, 30)]
    assert mx.allclose(mx.concatenate(parts, axis=1), whole, atol=1e-5)
    assert used == (["absorbed"] * 12 if ops.one_form else ["expanded"] * 2 + ["absorbed"] * 10)


@by_table
def test_latents_and_keys_in_one_buffer_are_those_in_two(ops: Ops) -> None:
    """A prompt, a short continuation and single tokens, across a reallocation of the buffer."""
    layer = attention(ops)
    x = rand(2, 300, HIDDEN, seed=12)
    ids = mx.zeros((2, 300), dtype=mx.int32)
    one, two = JoinedKVCache(), KVCache()
    for start, end in [(0, 20), (20, 22), *((i, i + 1) for i in range(22, 28)), (28, 299), (299, 300)]:
        batch = Batch(ids[:, start:end], start)
        joined, apart = (layer(x[:, start:end], batch, cache) for cache in (one, two))
        assert mx.allclose(joined, apart, atol=1e-6)
    assert one.nbytes == two.nbytes and len(one.arrays) == len(two.arrays)


def test_a_token_copies_no_history() -> None:
    """The rows that a token attends to are a view of the buffer; the only row written is its own."""
    layer = attention(PORTABLE)
    x = rand(1, 41, HIDDEN, seed=12)
    cache = Caches.of([config().memory(0)]).layers[0]
    assert isinstance(cache, JoinedKVCache)
    layer(x[:, :40], Batch(mx.zeros((1, 40), dtype=mx.int32)), cache)
    forget([cache])
    mx.eval(x)
    graph = operations(layer(x[:, 40:], Batch(mx.zeros((1, 1), dtype=mx.int32), 40), cache))
    plain = operations(layer(x[:, 40:], Batch(mx.zeros((1, 1), dtype=mx.int32), 40), filled(KVCache())))
    # Joined on the way is only the query with its rotated part (RoPE, on a CPU, joins some more), not the new row.
    assert graph["SliceUpdate"] == 2 == plain["SliceUpdate"]
    assert graph["Concatenate"] == plain["Concatenate"] - 1
    assert "Broadcast" not in graph


def filled(cache: KVCache) -> KVCache:
    cache.append(rand(1, 1, 40, RANK, seed=1), rand(1, 1, 40, ROTATED, seed=2))
    forget([cache])
    return cache


def config() -> LatentConfig:
    sizes = {"hidden_size": HIDDEN, "num_attention_heads": HEADS, "kv_lora_rank": RANK, "qk_rope_head_dim": ROTATED}
    rest = {"model_type": "t", "num_hidden_layers": 1, "vocab_size": 8, "intermediate_size": 8}
    return LatentConfig.from_dict({**sizes, **rest})


@pytest.mark.parametrize("storage", [PLAIN, current().storage, current().ops.storage], ids=["plain", "device", "exact"])
def test_rows_with_a_scale_are_not_joined(storage: Storage) -> None:
    """One scale for a latent and a rotated key would be the larger one's, and coarse for the other."""
    (cache,) = Caches.of([config().memory(0)], storage)
    assert PLAIN.joins and type(cache) is (JoinedKVCache if storage.joins else KVCache)
    latent, key = rand(1, 1, 5, RANK, seed=1), 1000 * rand(1, 1, 5, ROTATED, seed=2)
    history = cache.append(latent, key)
    assert mx.allclose(history.keys, latent, atol=1e-4) and mx.allclose(history.values, key, rtol=1e-3, atol=1e-1)
    assert mx.allclose(history.rows, mx.concatenate([history.keys, history.values], axis=-1))


def test_the_form_with_fewer_products_is_taken() -> None:
    """With DeepSeek's sizes, single tokens and short continuations of a long history are absorbed, prompts are not."""
    layer = attention(PORTABLE)
    layer.kv_lora_rank, layer.qk_nope_head_dim, layer.qk_rope_head_dim, layer.v_head_dim = 512, 128, 64, 128
    assert layer.absorbs(1, 2) and layer.absorbs(1, 4096) and layer.absorbs(100, 4096)
    assert not layer.absorbs(512, 512) and not layer.absorbs(512, 4096) and not layer.absorbs(20, 20)


def test_packed_matrices_are_unpacked_once() -> None:
    layer = attention(PORTABLE, 4)
    assert layer.kept is not None
    assert [matrix.shape for matrix in layer.kept] == [(HEADS, NOPE, RANK), (HEADS, VALUES, RANK)]


@pytest.mark.parametrize("bits", [None, 8])
def test_heads_apart_are_the_joined_ones(bits: int | None) -> None:
    """mlx-lm's form of DeepSeek V3: keys are stored `[heads, latent, key]`, values `[heads, value, latent]`."""
    layer = attention(PORTABLE)
    keys, values = layer.matrices()
    joined = JoinedKeysAndValues(PlainLinear(mx.concatenate([keys, values], axis=1).flatten(0, 1)))

    stored: ExpertLinear = PlainExperts(values)
    if bits is not None:
        packed = mx.quantize(values, group_size=32, bits=bits)
        stored = QuantizedExperts(*packed, bits=bits, group_size=32, mode="affine")
    apart = SplitKeysAndValues(PlainExperts(mx.contiguous(keys.swapaxes(-1, -2))), stored)
    x = rand(2, 5, RANK, seed=11)
    assert apart.matrix().shape == joined.matrix().shape
    assert mx.allclose(apart.matrix(), joined.matrix(), atol=1e-6 if bits is None else 3e-3)
    assert mx.allclose(apart(x), joined(x), atol=1e-5 if bits is None else 3e-3)
