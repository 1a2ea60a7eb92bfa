"""Attention of the newest tokens of several sequences, and the writing of their keys and values, as one kernel.

MLX's operations take each sequence by itself: writing, reading and putting together are five kernels for each of them,
in each layer, whose starts take longer than what they do.

A kernel that writes into a buffer which MLX takes for an input is sound here. Nothing else holds a cache's buffers, and
whatever looks at the new rows depends on what this kernel puts out, as later layers and passes do, or is begun when the
pass has been: a decoded token is kept once its pass has landed. A prompt's last rows may be kept before, so they are
left to MLX, also where it is a single one.
"""

from __future__ import annotations

import functools
import itertools
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import mlx.core as mx

from runner.cache.kv import KVCache, RotatingKVCache
from runner.cache.several import New
from runner.cache.storage import PLAIN, capacity
from runner.ops.cuda.driver import code_of
from runner.ops.cuda.shape import text

FEWEST = 3
"""Sequences from which on they are taken together: a block reads the keys of a head, and a few would not fill a GPU."""

SEQUENCES = (8, 32, 64)
"""How many a kernel is made for: the next number that is enough is taken."""

REGISTERS = 64
"""Numbers of queries, and of sums, that a thread can have."""

THREADS = 256
TYPES = {mx.float32: 0, mx.float16: 1, mx.bfloat16: 2}

Attention = Callable[..., mx.array]


def attention_step(
    rows: Attention,
    query: mx.array,
    new: New,
    counts: Sequence[int],
    steps: Sequence[bool],
    *,
    scale: float,
    sinks: mx.array | None = None,
    softcap: float | None = None,
) -> mx.array | None:
    """Write the `new` keys and values, and attend from queries `[1, H, T, D]`, of which sequence i has `counts[i]`.

    Those that are `steps`, with one decoded token, and stand side by side are taken together, the others by `rows`, the
    op `attention_rows`.
    Returns `[1, H, T, Dv]`; None, with nothing written, where no kernel fits.
    """
    how: Any = {"scale": scale, "sinks": sinks, "softcap": softcap}
    runs = [(single, list(group)) for single, group in itertools.groupby(range(len(counts)), steps.__getitem__)]
    together = [group for single, group in runs if single and len(group) >= FEWEST]
    kernel = _kernel(query, new, len(max(together, key=len)), **how) if together and _fits(query, new) else None
    if kernel is None or (code := _code(kernel)) is None:
        return None
    found: list[mx.array] = []
    start = 0
    for _, group in runs:
        own = tuple(counts[group[0] : group[-1] + 1])
        part, q = new.caches[group[0] : group[-1] + 1], query
        k, v, end = new.keys, new.values, start + sum(own)
        if end - start < query.shape[2]:
            q, k, v = (array[:, :, start:end] for array in (q, k, v))
        if group in together:
            for first in range(0, len(group), kernel.most):
                last = min(first + kernel.most, len(group))
                q_k_v = [array if last - first == len(group) else array[:, :, first:last] for array in (q, k, v)]
                found.append(_together(kernel, code, part[first:last], *q_k_v, sinks=sinks))
        else:
            found.append(rows(q, New(part, k, v).written(own), own, **how))
        start = end
    return found[0] if len(found) == 1 else mx.concatenate(found, axis=2)


def _fits(query: mx.array, new: New) -> bool:
    """Whether there is a kernel for queries, keys and values like these."""
    heads, size, width = new.keys.shape[1], new.keys.shape[3], new.values.shape[3]
    group, rest = divmod(query.shape[1], heads)
    known = query.dtype in TYPES and query.dtype == new.keys.dtype == new.values.dtype
    caches = all(type(one) in (KVCache, RotatingKVCache) and one.storage.empty is PLAIN.empty for one in new.caches)
    room = group * max(-(-size // 32), -(-width // 32)) <= REGISTERS
    return known and caches and room and not rest and query.shape[0] == 1


def _kernel(
    query: mx.array, new: New, longest: int, *, scale: float, sinks: mx.array | None, softcap: float | None
) -> Kernel:
    """The kernel for up to `longest` sequences."""
    most = next((each for each in SEQUENCES if each >= longest), SEQUENCES[-1])
    group = query.shape[1] // new.keys.shape[1]
    sizes = (new.keys.shape[3], new.values.shape[3])
    return Kernel(TYPES[query.dtype], *sizes, group, most, sinks is not None, float(scale), float(softcap or 0))


def _together(
    kernel: Kernel,
    code: bytes,
    caches: Sequence[KVCache],
    query: mx.array,
    keys: mx.array,
    values: mx.array,
    *,
    sinks: mx.array | None,
) -> mx.array:
    """Attention of sequences with one token each, `query` `[1, H, R, D]`, by the kernel."""
    buffers: list[mx.array] = []
    places: list[tuple[int, int, int]] = []
    for cache in caches:
        pair, place = cache.place(keys, values, 1)
        cache.placed(pair, 1)
        buffers += pair
        places.append((place, capacity(pair[0]), max(0, place + 1 - (cache.window or place + 1))))
    count = len(caches)
    # Sequence by sequence, as products and rotations leave them: nothing is copied.
    q, k, v = (mx.contiguous(array.swapaxes(0, 2)) for array in (query, keys, values))
    given = q if sinks is None else sinks.astype(query.dtype)
    (out,) = mx.fast.precompiled_cuda_kernel(
        name=kernel.name,
        compiled_source=code,
        inputs=[q, k, v, mx.array(places, mx.int32), given, *buffers, *buffers[:2] * (kernel.most - count)],
        output_shapes=[(count, query.shape[1], 1, kernel.width)],
        output_dtypes=[query.dtype],
        scalars=[count],
        grid=(count * THREADS, keys.shape[1], 1),
        threadgroup=(THREADS, 1, 1),
    )
    return out.swapaxes(0, 2)


class Kernel(NamedTuple):
    """What a kernel is made for: type, numbers of a key and a value, queries for each, sequences, and scores."""

    kind: int
    size: int
    width: int
    group: int
    most: int
    sinks: bool
    scale: float
    softcap: float

    @property
    def name(self) -> str:
        numbers = "_".join(str(int(value)) for value in self[:6])
        return f"several_{numbers}_{zlib.crc32(repr(self[6:]).encode()):x}"

    @property
    def source(self) -> str:
        """The whole text."""
        constants = {"D": self.size, "DV": self.width, "G": self.group, "N": self.most}
        places = range(self.most)
        return "\n".join(
            [
                *(f"constexpr int {key} = {value};" for key, value in constants.items()),
                f"#define XT {self.kind}",
                f"#define SINKS {int(self.sinks)}",
                f"#define SCALE {self.scale!r}f",
                f"#define CAP {float(self.softcap)!r}f",
                "#define BUFFERS " + ", ".join(f"Number* k{i}, Number* v{i}" for i in places),
                "#define CHOOSE " + " ".join(f"case {i}: K = k{i}; V = v{i}; break;" for i in places),
                f"#define ATTEND {self.name}",
                text("forms.cu"),
                text("several.cu"),
            ]
        )


@functools.cache
def _code(kernel: Kernel) -> bytes | None:
    """The kernel, compiled unless it was kept; None: there is none for this machine's GPU."""
    return code_of(kernel.source)
