"""Prometheus metrics, named as vLLM names its own, with `riverdelta_` for a prefix.

Label values come from tenants, so their number is bounded: beyond it, the series that moved least lately are dropped.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

_SERIES = 512
_SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_PER_VERSION = ("adapter", "version")


class Metrics:
    """What one server counts. `text` renders it; `watch` adds the engine's own figures."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        given: dict[str, Any] = {"registry": self.registry, "namespace": "riverdelta"}
        self._prompt = Counter("prompt_tokens", "Prompt tokens of finished requests.", _PER_VERSION, **given)
        self._generated = Counter("generation_tokens", "Tokens generated.", _PER_VERSION, **given)
        self._finished = Counter(
            "request_success", "Sequences by how they ended.", (*_PER_VERSION, "finished_reason"), **given
        )
        self._first = Histogram(
            "time_to_first_token_seconds", "From admission to the first token.", buckets=_SECONDS, **given
        )
        self._between = Histogram(
            "inter_token_latency_seconds", "Between two tokens of a sequence.", buckets=_SECONDS, **given
        )
        self._whole = Histogram(
            "e2e_request_latency_seconds", "From admission to the end of the answer.", buckets=_SECONDS, **given
        )
        self._http = Counter("http_requests", "Answers by route and status.", ("route", "status"), **given)
        self._fences = Counter("fences", "Fences carried out.", **given)
        self._fence_seconds = Histogram(
            "fence_seconds", "From reading a fence to being able to acknowledge it.", buckets=_SECONDS, **given
        )
        self._interactions = Counter("interactions", "Interaction events by what became of them.", ("end",), **given)
        self._recent: OrderedDict[tuple[str, str], None] = OrderedDict()
        self._reasons: set[str] = set()

    def text(self) -> bytes:
        """The exposition format."""
        return generate_latest(self.registry)

    def watch(self, stats: Callable[[], dict[str, Any]], server: Callable[[], dict[str, float]]) -> None:
        """Take gauges from `Engine.stats` and from the server at every scrape."""
        self.registry.register(_Live(stats, server))

    def token(self, labels: tuple[str, str], waited: float, first: bool) -> None:
        """A token came `waited` seconds after the request, or after the token before it."""
        self._keep(labels)
        self._generated.labels(*labels).inc()
        (self._first if first else self._between).observe(max(0.0, waited))

    def sequence(self, labels: tuple[str, str], reason: str, prompt_tokens: int) -> None:
        """A sequence ended."""
        self._keep(labels)
        self._reasons.add(reason)
        self._prompt.labels(*labels).inc(prompt_tokens)
        self._finished.labels(*labels, reason).inc()

    def answer(self, seconds: float) -> None:
        """A generating request was answered."""
        self._whole.observe(seconds)

    def http(self, route: str, status: int) -> None:
        """Any request was answered. `route` is one of the application's own paths."""
        self._http.labels(route, str(status)).inc()

    def interaction(self, end: str) -> None:
        """An interaction event was `sent` or `dropped`."""
        self._interactions.labels(end).inc()

    def fence(self, seconds: float) -> None:
        """A fence was carried out."""
        self._fences.inc()
        self._fence_seconds.observe(seconds)

    def _keep(self, labels: tuple[str, str]) -> None:
        self._recent[labels] = None
        self._recent.move_to_end(labels)
        while len(self._recent) > _SERIES:
            old, _ = self._recent.popitem(last=False)
            for counter in (self._prompt, self._generated):
                counter.remove(*old)
            for reason in self._reasons:
                self._finished.remove(*old, reason)


class _Live(Collector):
    def __init__(self, stats: Callable[[], dict[str, Any]], server: Callable[[], dict[str, float]]) -> None:
        self._stats, self._server = stats, server

    def collect(self) -> Iterable[Metric]:
        stats = self._stats()
        blocks, totals, adapters = stats["kv_blocks"], stats["totals"], stats["adapters"].values()
        used = 1 - blocks["free"] / max(1, blocks["total"])
        gauges = {
            "num_requests_running": ("Sequences in the batch.", stats["running"]),
            "num_requests_waiting": ("Sequences in the queue.", stats["waiting"]),
            "kv_cache_usage_perc": ("Share of the KV blocks in use, 0 to 1.", used),
            "adapters_registered": ("Versions registered with the engine.", len(adapters)),
            "adapters_on_device": ("Versions in device slots.", sum(a["tier"] == "device" for a in adapters)),
            "adapters_on_host": ("Versions in host memory only.", sum(a["tier"] == "host" for a in adapters)),
            "adapter_host_bytes": ("Host memory that adapters hold.", stats["host_bytes"]),
            "versions_revoked": ("Versions fenced off since the start.", stats["revoked"]),
            **{name: ("", value) for name, value in self._server().items()},
        }
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(f"riverdelta_{name}", text or name.replace("_", " "), value=value)
        counters = {
            "num_preemptions": ("Sequences put back to wait.", stats["preemptions"]),
            "prefix_cache_queries": ("Prompt tokens looked up in the prefix cache.", totals["prompt_tokens"]),
            "prefix_cache_hits": ("Prompt tokens found in the prefix cache.", totals["cached_tokens"]),
            "engine_steps": ("Steps computed.", totals["steps"]),
        }
        for name, (text, value) in counters.items():
            yield CounterMetricFamily(f"riverdelta_{name}", text, value=value)
