"""Prometheus metrics in vLLM's words, without its prefix."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

if TYPE_CHECKING:
    from runner.server.answering import Answering
    from runner.server.guessing import Guesses
    from runner.server.serving import Serving

_FIRST = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
_GAP = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5)
_WHOLE = (0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480)


class Metrics:
    """The counters of one server, in a registry of its own."""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving
        self.registry = CollectorRegistry()
        label = ["model_name"]
        self._running = Gauge("num_requests_running", "Answers under way.", label, registry=self.registry)
        self._waiting = Gauge("num_requests_waiting", "Answers that wait.", label, registry=self.registry)
        self._prompt = Counter("prompt_tokens", "Tokens of prompts.", label, registry=self.registry)
        self._generated = Counter("generation_tokens", "Tokens of answers.", label, registry=self.registry)
        self._cache = Gauge("kv_cache_bytes", "Bytes of answers under way.", label, registry=self.registry)
        self._usage = Gauge(
            "kv_cache_usage_perc",
            "Part of the memory for caches that answers under way take; 1 is all of it.",
            label,
            registry=self.registry,
        )
        self._queries = Counter(
            "prefix_cache_queries",
            "Tokens of prompts that were looked for in the cache.",
            label,
            registry=self.registry,
        )
        self._hits = Counter("prefix_cache_hits", "Tokens of prompts found there.", label, registry=self.registry)
        self._success = Counter(
            "request_success", "Answers that ended by themselves.", [*label, "finished_reason"], registry=self.registry
        )
        self._first = Histogram(
            "time_to_first_token_seconds", "Until the first token.", label, buckets=_FIRST, registry=self.registry
        )
        self._gap = Histogram(
            "inter_token_latency_seconds", "Between two tokens.", label, buckets=_GAP, registry=self.registry
        )
        self._whole = Histogram(
            "e2e_request_latency_seconds", "Until the last token.", label, buckets=_WHOLE, registry=self.registry
        )

        self._guesses = {
            name: Counter(f"spec_decode_num_{name}", told, label, registry=self.registry)
            for name, told in (
                ("drafts", "Times that the draft model has guessed."),
                ("draft_tokens", "Tokens that it has guessed."),
                ("accepted_tokens", "Tokens that it has guessed right."),
            )
        }
        self._guessed: dict[tuple[str, str], int] = {}  # counted so far

    def finished(self, answer: Answering) -> None:
        """Count a request that has ended, or was ended."""
        name, usage = answer.prepared.served.name, answer.usage
        self._generated.labels(name).inc(usage.completion_tokens)
        if answer.first is None:
            return
        self._prompt.labels(name).inc(usage.prompt_tokens)
        self._queries.labels(name).inc(usage.prompt_tokens)
        self._hits.labels(name).inc(usage.cached_tokens)
        self._first.labels(name).observe(answer.first - answer.started)
        gap = self._gap.labels(name)
        for seconds in answer.gaps:
            gap.observe(seconds)
        if len(answer.finished) == answer.prepared.ask.choices:
            self._whole.labels(name).observe(answer.last - answer.started)
        for reason in answer.finished.values():
            self._success.labels(name, reason).inc()

    def text(self) -> bytes:
        """What a scrape gets; no thread that computes is asked."""
        for served in self._serving.models.values():
            status = served.backend.status()
            self._running.labels(served.name).set(status.running)
            self._waiting.labels(served.name).set(status.waiting)
            self._cache.labels(served.name).set(status.nbytes)
            self._usage.labels(served.name).set(status.usage)
            if status.guesses is not None:
                self._count_guesses(served.name, status.guesses)
        return generate_latest(self.registry)

    def _count_guesses(self, name: str, guesses: Guesses) -> None:
        found = {"drafts": guesses.rounds, "draft_tokens": guesses.tokens, "accepted_tokens": guesses.right}
        for what, count in found.items():
            self._guesses[what].labels(name).inc(count - self._guessed.get((name, what), 0))
            self._guessed[name, what] = count
