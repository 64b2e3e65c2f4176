"""Numbers of a running server for Prometheus, in a registry of their own."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from bindllm.serving.engine import Engine

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)


class Metrics:
    """Counters of one server.

    Args:
        engine: its queue and its batch are read when the numbers are asked for.
    """

    def __init__(self, engine: Engine) -> None:
        # The global registry would mix the numbers of several servers in one process.
        self._registry = registry = CollectorRegistry()
        # Memory and open files of the process: the first signs of a leak.
        ProcessCollector(registry=registry)
        # The library adds "_total" to the names of counters.
        self.requests = Counter(
            "bindllm_requests", "Requests by route and status", ["route", "status"], registry=registry
        )
        self.seconds = Histogram(
            "bindllm_request_seconds", "Time of a request", ["route"], buckets=_SECONDS, registry=registry
        )
        self.first_token = Histogram(
            "bindllm_time_to_first_token_seconds",
            "Time from submission to the first token",
            buckets=_SECONDS,
            registry=registry,
        )
        self.token_interval = Histogram(
            "bindllm_time_per_output_token_seconds",
            "Time between the tokens of an answer",
            buckets=_TOKEN_SECONDS,
            registry=registry,
        )
        self.tokens = Counter("bindllm_tokens", "Tokens of prompts and answers", ["kind"], registry=registry)
        # Looked up once: it counts with every piece.
        self.answer_tokens = self.tokens.labels("completion")
        registry.register(_EngineCollector(engine))

    def text(self) -> bytes:
        """Return all numbers in the text format of Prometheus."""
        return generate_latest(self._registry)


class _EngineCollector(Collector):
    """Reads the numbers that the engine keeps, when they are asked for."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        """Yield one metric after the other."""
        engine, counters, recent = self._engine, self._engine.counters, self._engine.recent
        # Without the lock of the engine: each number is read at once, and they need not agree.
        yield GaugeMetricFamily("bindllm_requests_waiting", "Requests in the queue", engine.waiting)
        yield GaugeMetricFamily("bindllm_requests_running", "Requests in the batch", engine.running)
        yield CounterMetricFamily("bindllm_decoding_steps", "Steps, each a token of all rows", counters.steps)
        yield CounterMetricFamily("bindllm_embedding_hits", "Media found among the recent ones", recent.hits)
        yield CounterMetricFamily("bindllm_embedding_misses", "Media that were encoded", recent.misses)
        finished = CounterMetricFamily("bindllm_answers", "Answers by their end", labels=["finish"])
        # A copy, since the engine's thread adds to it.
        for end, count in dict(counters.finished).items():
            finished.add_metric([end], count)
        yield finished
