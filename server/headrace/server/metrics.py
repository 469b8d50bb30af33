"""The server's Prometheus metrics.

Named after OpenTelemetry (``gen_ai.*``), gRPC's A66 (``grpc.server.call.*``) and the inference gateway's three gauges.
Labels come from small sets: methods of our services, gRPC codes, reasons of our error table, and names of models
that calls were resolved to, never names that callers made up.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from threading import Thread
from typing import Any
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from headrace.backends.types import Call

# The OpenTelemetry conventions advise these for the gen_ai histograms.
_DURATION_BUCKETS = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
_FIRST_TOKEN_BUCKETS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
_PER_TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
_RPC_BUCKETS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)

_TOKEN_TYPES = {
    "input": "input_tokens",
    "cache_read_input": "cache_read_input_tokens",
    "cache_write_input": "cache_write_input_tokens",
    "output": "output_tokens",
    "reasoning_output": "reasoning_output_tokens",
    "sent_output": "sent_output_tokens",
    "accepted_draft": "accepted_draft_tokens",
    "rejected_draft": "rejected_draft_tokens",
}
"""Label value to field of Usage. As there, cache_* are parts of input; the others but rejected_draft, of output."""


class _CountersElsewhere(Collector):
    """A counter, by model, that somebody else counts: it is asked at each scrape."""

    def __init__(self, name: str, text: str, registry: CollectorRegistry) -> None:
        self.sources: dict[str, Callable[[], float]] = {}
        self._name, self._text = name, text
        registry.register(self)

    def collect(self) -> Iterator[CounterMetricFamily]:
        family = CounterMetricFamily(self._name, self._text, labels=("model",))
        for model, source in list(self.sources.items()):
            family.add_metric((model,), source())
        yield family


class _Routing(Collector):
    """What routing has counted, and its circuit breakers, asked at each scrape."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.tries: Mapping[tuple[str, str, str], int] = {}
        self.fallbacks: Mapping[tuple[str, str], int] = {}
        self.states: Callable[[], Iterable[tuple[str, str, enum.Enum]]] = tuple
        registry.register(self)

    def collect(self) -> Iterator[Metric]:
        tries = CounterMetricFamily(
            "headrace_attempts",
            "Tries of calls at models; route is empty where a model was asked for by its own name. outcome: completed,"
            " failed, or given_up for those that say nothing of the model, such as cancels.",
            labels=("route", "model", "outcome"),
        )
        for labels, count in list(self.tries.items()):
            tries.add_metric(labels, count)
        fallbacks = CounterMetricFamily(
            "headrace_fallbacks", "Calls that left a model for the next of their route.", labels=("route", "model")
        )
        for left, count in list(self.fallbacks.items()):
            fallbacks.add_metric(left, count)
        states = GaugeMetricFamily(
            "headrace_circuit_breaker",
            "Whether calls of a route are let through to a model: 1 for the state that holds. half_open: one call is.",
            labels=("route", "model", "state"),
        )
        for route, model, state in self.states():
            for one in type(state):
                states.add_metric((route, model, one.value), one is state)
        yield from (tries, fallbacks, states)


class Metrics:
    """The metrics of one server, in one registry."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry

        def histogram(name: str, text: str, labels: tuple[str, ...], buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, text, labels, registry=registry, buckets=buckets)

        self._request_duration = histogram(
            "gen_ai_server_request_duration_seconds",
            "Time of a generation or a scoring, from arrival to end. error_type is empty where it succeeded.",
            ("model", "error_type"),
            _DURATION_BUCKETS,
        )
        self._first_token = histogram(
            "gen_ai_server_time_to_first_token_seconds",
            "Time from arrival until the first output token was sampled.",
            ("model",),
            _FIRST_TOKEN_BUCKETS,
        )
        self._per_token = histogram(
            "gen_ai_server_time_per_output_token_seconds",
            "Time per output token after the first, of one generation.",
            ("model",),
            _PER_TOKEN_BUCKETS,
        )
        self._tokens = Counter(
            "gen_ai_usage_tokens",
            "Tokens used. Not disjoint: input includes cache_*, output includes the others but rejected_draft.",
            ("model", "type"),
            registry=registry,
        )
        self._rpcs_started = Counter(
            "grpc_server_call_started", "RPCs that began.", ("grpc_method",), registry=registry
        )
        self._rpc_duration = histogram(
            "grpc_server_call_duration_seconds",
            "Time of an RPC, from arrival to its status.",
            ("grpc_method", "grpc_status"),
            _RPC_BUCKETS,
        )
        self._resumed = Counter(
            "headrace_resumed_streams", "Connections that went on with the stream of an earlier one.", registry=registry
        )
        self._charged = Counter(
            "headrace_charged_nanos",
            "What tenants pay, in billionths of the currency's unit.",
            ("model", "currency"),
            registry=registry,
        )
        self._warned = Counter(
            "headrace_soft_limit_warnings",
            "Calls that could have brought their tenant or key beyond a soft limit.",
            ("model",),
            registry=registry,
        )
        self._replayed = Counter(
            "headrace_replayed_answers",
            "Answers that were given before, under the same idempotency key.",
            registry=registry,
        )
        self._response_cache = Counter(
            "headrace_response_cache_lookups",
            "Calls by what the response cache had for them: hit, miss, or bypass where it was not asked.",
            ("model", "status"),
            registry=registry,
        )
        self._cached_bytes = Gauge(
            "headrace_response_cache_bytes", "Size of the stored answers in this process, about.", registry=registry
        )
        self._cache_failures = Gauge(
            "headrace_response_cache_failures",
            "Times that the response cache could not be used; calls went on without it.",
            registry=registry,
        )
        self._open_holds = Gauge(
            "headrace_open_holds", "Calls of this process that are not settled.", registry=registry
        )
        self._unsent_events = Gauge(
            "headrace_unsent_usage_events", "Settled calls that usage_events has not been told of.", registry=registry
        )
        self._queued = Gauge(
            "headrace_queued_requests", "Generations that wait for a start.", ("model",), registry=registry
        )
        self._running = Gauge("headrace_running_requests", "Generations that run.", ("model",), registry=registry)
        self._kv_utilization = Gauge(
            "headrace_kv_cache_utilization", "Used part of the KV cache, 0 to 1.", ("model",), registry=registry
        )
        self._retained = Gauge(
            "headrace_prefix_cache_tokens",
            "Tokens in the KV cache of sequences that are over, for others to begin with.",
            ("model",),
            registry=registry,
        )
        self._looked_up = _CountersElsewhere(
            "headrace_prefix_cache_looked_up_tokens", "Prompt tokens that were looked up, of each choice.", registry
        )
        self._reused = _CountersElsewhere(
            "headrace_prefix_cache_reused_tokens", "Those that were there and did not have to be computed.", registry
        )
        self._preemptions = _CountersElsewhere(
            "headrace_preemptions", "Times that a generation gave way to a more urgent one, to go on later.", registry
        )

        self._routing = _Routing(registry)

    def rpc_started(self, method: str) -> None:
        self._rpcs_started.labels(method).inc()

    def rpc_finished(self, method: str, status: str, seconds: float) -> None:
        self._rpc_duration.labels(method, status).observe(seconds)

    def stream_resumed(self) -> None:
        self._resumed.inc()

    def generation_finished(self, call: Call, *, seconds: float, error_type: str) -> None:
        """A generation ended, in whatever way; ``error_type`` is the reason its ErrorInfo gave, empty on success."""
        # Before a model is resolved there is only the name that the caller gave.
        model = call.model.card.name if call.model is not None else ""
        self._request_duration.labels(model, error_type).observe(seconds)
        meter, usage = call.meter, call.meter.usage()
        if meter.replayed:
            self._replayed.inc()
            return
        if meter.cache is not None:
            self._response_cache.labels(model, meter.cache.name.lower()).inc()
        if meter.cost is not None:
            self._charged.labels(model, meter.cost.currency).inc(meter.cost.charge_nanos)
        if meter.warnings:
            self._warned.labels(model).inc()
        if meter.first_token is not None:
            self._first_token.labels(model).observe(max(0.0, meter.first_token - call.arrived))
            if meter.last_token is not None and usage.output_tokens is not None and usage.output_tokens > 1:
                self._per_token.labels(model).observe(
                    max(0.0, meter.last_token - meter.first_token) / (usage.output_tokens - 1)
                )
        for token_type, name in _TOKEN_TYPES.items():
            if count := getattr(usage, name):
                self._tokens.labels(model, token_type).inc(count)

    def observe_ledger(self, *, open_holds: Callable[[], float], unsent_events: Callable[[], float]) -> None:
        """Sets where the ledger's gauges come from; the functions are called as those of ``observe_engine``."""
        self._open_holds.set_function(open_holds)
        self._unsent_events.set_function(unsent_events)

    def observe_routes(
        self,
        *,
        tries: Mapping[tuple[str, str, str], int],
        fallbacks: Mapping[tuple[str, str], int],
        states: Callable[[], Iterable[tuple[str, str, enum.Enum]]],
    ) -> None:
        """Sets where the metrics of routing come from: by route, model and outcome; by route and the model that was
        left; and by route and model the state of its circuit breaker. They are read as those of ``observe_engine``.
        """
        self._routing.tries, self._routing.fallbacks, self._routing.states = tries, fallbacks, states

    def observe_response_cache(self, *, num_bytes: Callable[[], float], failures: Callable[[], float]) -> None:
        """Sets where the response cache's gauges come from; the functions are called as those of ``observe_engine``."""
        self._cached_bytes.set_function(num_bytes)
        self._cache_failures.set_function(failures)

    def observe_engine(
        self,
        model: str,
        *,
        queued: Callable[[], float],
        running: Callable[[], float],
        kv_utilization: Callable[[], float] | None = None,
        retained_tokens: Callable[[], float] | None = None,
        looked_up_tokens: Callable[[], float] | None = None,
        reused_tokens: Callable[[], float] | None = None,
        preemptions: Callable[[], float] | None = None,
    ) -> None:
        """Sets where the gauges of ``model`` come from, and the counters that others keep. The functions are called at
        each scrape, from its thread.
        """
        self._queued.labels(model).set_function(queued)
        self._running.labels(model).set_function(running)
        if kv_utilization is not None:
            self._kv_utilization.labels(model).set_function(kv_utilization)
        if retained_tokens is not None:
            self._retained.labels(model).set_function(retained_tokens)
        if looked_up_tokens is not None:
            self._looked_up.sources[model] = looked_up_tokens
        if reused_tokens is not None:
            self._reused.sources[model] = reused_tokens
        if preemptions is not None:
            self._preemptions.sources[model] = preemptions


@dataclass(frozen=True, slots=True)
class MetricsEndpoint:
    """A running HTTP server that answers every GET with the metrics as text."""

    port: int
    _server: WSGIServer
    _thread: Thread

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def serve_metrics(metrics: Metrics, *, host: str, port: int) -> MetricsEndpoint:
    """Starts the endpoint; port 0 takes a free one."""
    server: Any
    server, thread = start_http_server(port, addr=host, registry=metrics.registry)
    return MetricsEndpoint(server.server_port, server, thread)
