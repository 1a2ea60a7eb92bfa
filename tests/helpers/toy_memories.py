"""Layers that remember, without a model: each kind of memory, a pass over it, and what it shows.

The twin of a sequence's caches is the list of its tokens: what the caches show must be a function of that list alone.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from runner.cache.caches import Caches
from runner.cache.recurrent import StateCache
from runner.config.memory import Memory, Rows, Shared, State

WINDOW, CHUNK = 5, 7
KINDS: dict[str, list[tuple[Memory, ...]]] = {
    "rows": [(Rows(2, 4, 4),), (Rows(2, 4, 4),)],
    "window": [(Rows(2, 4, 4, window=WINDOW),), (Rows(2, 4, 4),)],
    "window of one head": [(Rows(1, 4, 4, window=WINDOW),)],
    "chunk": [(Rows(2, 4, 4, chunk=CHUNK),), (Rows(2, 4, 4),)],
    "latent": [(Rows(1, 8, 2),)],
    "joined": [(Rows(1, 8, 2, joined=True),), (Rows(2, 4, 4, window=WINDOW),)],
    "shared": [(Rows(2, 4, 4),), (Rows(2, 4, 4, window=WINDOW),), (Shared(1),), (Shared(0),)],
    "state": [(State({"sum": (3,), "last": (2, 3)}, {"sum": "float32"}),)],
    "hybrid": [(State({"sum": (3,), "last": (2, 3)}, {"sum": "float32"}),), (), (Rows(2, 4, 4),)],
    "both in a layer": [(Rows(2, 4, 4), State({"sum": (3,), "last": (2, 3)}, {}))],
}


def row(tokens: list[int], heads: int, size: int) -> mx.array:
    """`[1, heads, L, size]`, a row of which tells its token."""
    values = mx.array(tokens, dtype=mx.float32)[None, None, :, None]
    return values + mx.arange(size) * 0.01 + mx.arange(heads)[:, None, None] * 0.1


def feed(caches: Caches, kinds: list[tuple[Memory, ...]], tokens: list[int]) -> None:
    """One pass: every layer does with its memory what a layer does."""
    for layer, memories in zip(caches.layers, kinds, strict=True):
        for cache, memory in zip(layer if isinstance(layer, tuple) else (layer,), memories, strict=True):
            if isinstance(memory, Rows):
                cache.append(row(tokens, memory.heads, memory.key_size), -row(tokens, memory.heads, memory.value_size))
            elif isinstance(memory, State):
                run(cache, tokens)


def run(cache: StateCache, tokens: list[int]) -> None:
    """A recurrence, token by token: a running sum that halves, and the last two tokens. Odd ones alone go in place."""
    states = cache.read(mx.zeros((1, 1)))
    total, last = states["sum"], states["last"]
    trail = []
    for token in tokens:
        total = total / 2 + token
        last = mx.concatenate([last[:, 1:], mx.full((1, 1, 3), token, dtype=last.dtype)], axis=1)
        trail.append({"sum": total, "last": last})
    if len(tokens) == 1 and tokens[0] % 2 and not cache.reserved:
        slots = cache.slots(mx.zeros((1, 1)))
        for name, buffer in slots.items():
            buffer[1 - cache.offset % 2] = trail[0][name]
        cache.step(**slots)
    elif cache.reserved:
        cache.write(len(tokens), **{name: mx.stack([states[name] for states in trail]) for name in trail[0]})
    else:
        cache.write(len(tokens), **trail[-1])


def shown(caches: Caches, kinds: list[tuple[Memory, ...]]) -> list[Any]:
    """What the next token would see, memory by memory."""
    ahead: list[Any] = [caches.offset]
    for layer, memories in zip(caches.layers, kinds, strict=True):
        for cache, memory in zip(layer if isinstance(layer, tuple) else (layer,), memories, strict=True):
            if isinstance(memory, State):
                ahead.append({name: array.tolist() for name, array in cache.read(mx.zeros((1, 1))).items()})
            else:
                history = cache.history
                seen = history.length if history.window is None else min(history.length, history.window)
                seen = seen if history.chunk is None else (cache.offset - 1) % history.chunk + 1
                ahead.append((history.keys[..., -seen:, :].tolist(), history.values[..., -seen:, :].tolist()))
    return ahead


def fresh(kinds: list[tuple[Memory, ...]], tokens: list[int]) -> list[Any]:
    caches = Caches.of(kinds)
    feed(caches, kinds, tokens)
    return shown(caches, kinds)
