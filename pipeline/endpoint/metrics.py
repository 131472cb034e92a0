"""What Prometheus reads at /metrics: requests as this gateway sees them, and what every engine is doing."""

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from pipeline.endpoint.client import EngineStatus

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """The counters of one gateway, in a registry of their own."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter(
            "smolvlm_requests", "Requests answered, by route and status", ["route", "status"], registry=registry
        )
        self.in_flight = Gauge("smolvlm_requests_in_flight", "Completions under way", registry=registry)
        self.latency = Histogram(
            "smolvlm_request_seconds", "Completions, from request to last byte", buckets=SECONDS, registry=registry
        )
        self.first_token = Histogram(
            "smolvlm_first_token_seconds",
            "Completions, from request to first token",
            buckets=SECONDS,
            registry=registry,
        )
        tokens = Counter("smolvlm_tokens", "Tokens of completions", ["kind"], registry=registry)
        self.prompt_tokens, self.output_tokens = tokens.labels("prompt"), tokens.labels("completion")
        self.disconnects = Counter("smolvlm_disconnects", "Clients that left before their answer", registry=registry)

    def render(self, engines: Iterable[EngineStatus]) -> bytes:
        """Return the exposition text, the engines' numbers included."""
        of_engines = CollectorRegistry()
        of_engines.register(_Engines(list(engines)))
        return generate_latest(self._registry) + generate_latest(of_engines)


class _Engines(Collector):
    def __init__(self, engines: list[EngineStatus]) -> None:
        self._engines = engines

    def collect(self) -> Iterable[Metric]:
        yield self._sequences()
        yield self._gauge("smolvlm_engine_alive", "Whether the engine works", "alive")
        yield self._gauge("smolvlm_engine_batch_occupancy", "Share of the decode batch that is filled", "occupancy")
        yield self._gauge("smolvlm_engine_kv_use", "Share of the key/value cache that is reserved", "kv_use")
        for name, text in (("steps", "Steps"), ("prompt_tokens", "Prompt tokens"), ("generated_tokens", "New tokens")):
            yield self._counter(f"smolvlm_engine_{name}", text, {e.actor_id: e.stats[name] for e in self._engines})
        online = {engine.actor_id: engine.online_requests for engine in self._engines}
        yield self._counter("smolvlm_engine_online_requests", "Requests taken from gateways", online)
        batch = {engine.actor_id: engine.batch_rows for engine in self._engines}
        yield self._counter("smolvlm_engine_batch_rows", "Rows taken from batch jobs", batch)

    def _sequences(self) -> Metric:
        family = GaugeMetricFamily(
            "smolvlm_engine_sequences", "Sequences by class and state", labels=["engine", "class", "state"]
        )
        for engine in self._engines:
            for name in ("online", "batch"):
                for state, count in engine.stats[name].items():
                    family.add_metric([engine.actor_id, name, state], count)
        return family

    def _gauge(self, name: str, text: str, key: str) -> Metric:
        family = GaugeMetricFamily(name, text, labels=["engine"])
        for engine in self._engines:
            family.add_metric([engine.actor_id], float(engine.stats[key]))
        return family

    def _counter(self, name: str, text: str, values: dict[str, int]) -> Metric:
        family = CounterMetricFamily(name, text, labels=["engine"])
        for engine, value in values.items():
            family.add_metric([engine], value)
        return family
