"""Perplexity of a model on a text, and divergence of its predictions from another model's: measures what a lossy choice
such as quantization costs.

The method is that of llama-perplexity (llama.cpp, tools/perplexity/perplexity.cpp), so that numbers can be compared.
The text is cut into independent chunks, and only the second half of each chunk is scored, where every token has at
least half a chunk of context. Where the tokenizer adds BOS, BOS replaces the first token of each chunk. A chunk of n
tokens has n - 1 - n // 2 scored tokens; a remainder shorter than a chunk is left out.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from runner.engine.loaded import Loaded
from runner.errors import UsageError
from runner.nn.batch import Batch
from runner.text.tokenizer import Tokenizer

CHUNK = 512
"""Default tokens per chunk, as in llama-perplexity."""

ROWS = 64
"""Positions whose logits are in memory at once: with a large vocabulary, a whole chunk's take hundreds of MB."""


@dataclass(frozen=True)
class Estimate:
    """A mean and its standard error."""

    value: float
    error: float


@dataclass(frozen=True)
class Perplexity:
    """`exp` of the mean negative log-likelihood of `tokens` tokens in `chunks` chunks; the error is to first order."""

    perplexity: Estimate
    tokens: int
    chunks: int


@dataclass(frozen=True)
class Comparison:
    """Comparison of a model with a base model on the same tokens.

    Attributes:
        base: the base's perplexity.
        kl_divergence: mean of `sum_v p(v) log(p(v) / q(v))` in nats, p the base's and q the model's probabilities.
        kl_999: the divergence that 99.9 % of positions do not exceed.
        kl_max: the largest divergence at any position.
        same_top: share of positions where both models rank the same token first, with a binomial standard error.
    """

    base: Perplexity
    kl_divergence: Estimate
    kl_999: float
    kl_max: float
    same_top: Estimate


Running = Callable[[int, int, float], None]
"""Called after each chunk with the chunks done, the chunks in all, and the perplexity so far."""


def read_ids(tokenizer: Tokenizer, text: str) -> tuple[list[int], int | None]:
    """Encode a text; returns the ids, with BOS in front if the tokenizer adds it, and the id of BOS or None."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    bos = tokenizer.bos_token_id
    # The tokenizer adds BOS if an ordinary text begins with BOS only when special tokens are added.
    adds = bos is not None and tokenizer.encode("a")[:1] == [bos] and tokenizer.encode("a", False)[:1] != [bos]
    return ([bos, *ids], bos) if adds and bos is not None else (ids, None)


def perplexity(
    engine: Loaded,
    ids: Sequence[int],
    *,
    bos: int | None = None,
    chunk: int = CHUNK,
    chunks: int | None = None,
    running: Running | None = None,
) -> Perplexity:
    """Measure a model's perplexity on `ids`.

    Args:
        bos: id that replaces the first token of each chunk; see `read_ids`.
        chunk: tokens per chunk.
        chunks: the most chunks to score; None: all.
        running: see `Running`.

    Raises:
        UsageError: `chunk` is below 4 or longer than the model's context, `chunks` is below 1, or `ids` are fewer than
            one chunk.
    """
    losses = _Losses()
    pieces = _cut(engine, ids, bos, chunk, chunks)

    def score(piece: list[int]) -> None:
        for logits, targets in _judged(engine, piece):
            losses.add(_negative_log_likelihood(_log_probabilities(logits), targets))

    for index, piece in enumerate(pieces):
        engine.run(functools.partial(score, piece))
        if running is not None:
            running(index + 1, len(pieces), losses.perplexity(index + 1).perplexity.value)
    return losses.perplexity(len(pieces))


def compare(
    engine: Loaded,
    base: Loaded,
    ids: Sequence[int],
    *,
    bos: int | None = None,
    chunk: int = CHUNK,
    chunks: int | None = None,
    running: Running | None = None,
) -> tuple[Perplexity, Comparison]:
    """Measure a model's perplexity and compare its predictions with `base`; arguments and errors as for `perplexity`.

    Raises:
        UsageError: the two models have vocabularies of different sizes.
    """
    sizes = engine.config.vocab_size, base.config.vocab_size
    if sizes[0] != sizes[1]:
        raise UsageError(
            f"the models' vocabularies differ: {sizes[0]} and {sizes[1]} tokens; compare a model with the one it "
            "was made from"
        )
    mine, its = _Losses(), _Losses()
    divergences: list[np.ndarray[tuple[int], np.dtype[np.float64]]] = []
    same = 0
    pieces = _cut(engine, ids, bos, chunk, chunks)
    _cut(base, ids, bos, chunk, chunks)  # for its checks: chunks must fit the base's context too

    def score(piece: list[int]) -> int:
        same = 0
        for (logits, targets), (base_logits, _) in zip(_judged(engine, piece), _judged(base, piece), strict=True):
            q, p = _log_probabilities(logits), _log_probabilities(base_logits)
            mine.add(_negative_log_likelihood(q, targets))
            its.add(_negative_log_likelihood(p, targets))
            # Where p underflows to 0 its term is 0, not 0 * inf.
            share = mx.exp(p)
            divergence = mx.sum(mx.where(share > 0, share * (p - q), 0.0), axis=-1)
            divergences.append(np.array(divergence, dtype=np.float64))
            same += int(mx.sum(mx.argmax(logits, axis=-1) == mx.argmax(base_logits, axis=-1)))
        return same

    for index, piece in enumerate(pieces):
        same += engine.run(functools.partial(score, piece))
        if running is not None:
            running(index + 1, len(pieces), mine.perplexity(index + 1).perplexity.value)
    every = np.concatenate(divergences)
    share_same = same / len(every)
    comparison = Comparison(
        base=its.perplexity(len(pieces)),
        kl_divergence=_estimate(every),
        kl_999=float(np.quantile(every, 0.999)),
        kl_max=float(every.max()),
        same_top=Estimate(share_same, math.sqrt(share_same * (1 - share_same) / max(len(every) - 1, 1))),
    )
    return mine.perplexity(len(pieces)), comparison


def _cut(engine: Loaded, ids: Sequence[int], bos: int | None, chunk: int, chunks: int | None) -> list[list[int]]:
    """Cut `ids` into at most `chunks` chunks of `chunk` tokens, the first of each replaced by BOS (if not None)."""
    context = engine.config.context_length
    if not 4 <= chunk <= context:
        raise UsageError(
            f"a chunk must have at least 4 tokens and at most {context} (the model's context), not {chunk}"
        )
    if chunks is not None and chunks < 1:
        raise UsageError(f"chunks must be at least 1, not {chunks}")
    count = len(ids) // chunk
    if count == 0:
        raise UsageError(
            f"the text has {len(ids)} tokens, fewer than one chunk of {chunk}: take a longer text or a smaller chunk"
        )
    pieces = [list(ids[i * chunk : (i + 1) * chunk]) for i in range(count if chunks is None else min(chunks, count))]
    engine.checked([token for piece in pieces for token in piece])
    return pieces if bos is None else [[bos, *piece[1:]] for piece in pieces]


def _judged(engine: Loaded, ids: list[int]) -> Iterator[tuple[mx.array, mx.array]]:
    """Yield float32 logits `[N, V]` of a chunk's second half and the ids `[N]` that follow, N at most `ROWS`."""
    first, last = len(ids) // 2, len(ids) - 1
    engine.use_adapters((1, engine.adapter_weights))
    caches = engine.new_caches()
    for start in range(0, last, engine.device.chunk):
        piece = ids[start : min(start + engine.device.chunk, last)]
        hidden = engine.model(Batch(mx.array([piece], dtype=mx.int32), start, last), caches)
        mx.eval(hidden)  # here, once for all the slices below
        # The head is applied to the scored positions only, a few at a time.
        for row in range(max(first, start), start + len(piece), ROWS):
            end = min(row + ROWS, start + len(piece))
            logits = engine.model.logits(hidden[:, row - start : end - start])[0].astype(mx.float32)
            yield logits, mx.array(ids[row + 1 : end + 1], dtype=mx.int32)


def _log_probabilities(logits: mx.array) -> mx.array:
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def _negative_log_likelihood(log_probabilities: mx.array, targets: mx.array) -> mx.array:
    return -mx.take_along_axis(log_probabilities, targets[:, None], axis=-1)[:, 0]


@dataclass
class _Losses:
    """Collects negative log-likelihoods, in float64."""

    values: list[np.ndarray[tuple[int], np.dtype[np.float64]]] = field(default_factory=list)

    def add(self, losses: mx.array) -> None:
        self.values.append(np.array(losses, dtype=np.float64))

    def perplexity(self, chunks: int) -> Perplexity:
        losses = np.concatenate(self.values)
        mean = _estimate(losses)
        value = math.exp(mean.value) if mean.value < 700 else math.inf
        return Perplexity(Estimate(value, value * mean.error), len(losses), chunks)


def _estimate(values: np.ndarray[tuple[int], np.dtype[np.float64]]) -> Estimate:
    """Mean and standard error, which is `sqrt((mean of squares - square of mean) / (n - 1))` as in llama-perplexity."""
    return Estimate(float(values.mean()), math.sqrt(float(values.var()) / max(len(values) - 1, 1)))
