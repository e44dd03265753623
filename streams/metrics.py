"""What the dataflow tells Prometheus."""

import logging
from collections import Counter as Tally
from collections.abc import Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, start_http_server

from riverdelta.core.errors import Conflict

log = logging.getLogger(__name__)
OTHERS = "_others"  # no adapter's name


class Metrics:
    """The dataflow's counters, in a registry of their own."""

    def __init__(self, adapters: int = 100) -> None:
        """`adapters` have series of their own, the first that are sealed for; the rest share one."""
        self.registry = CollectorRegistry()
        self._most = adapters
        self._named: set[str] = set()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"riverdelta_stream_{name}", text, labels, registry=self.registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"riverdelta_stream_{name}", text, labels, registry=self.registry)

        self.consumed = counter("records", "Records read from the events topic")
        self.events = counter("events", "Events by what became of them", "outcome")
        self.dead = counter("dead_letters", "Dead letters delivered, by reason", "reason")
        self.segments = counter("segments", "Segments sealed, by trigger", "trigger")
        self.sealed = counter("entries_sealed", "Entries sealed")
        self.refused = counter("seals_refused", "Seals that the ledger refused, by why", "why")
        self.expired = counter("joins_expired", "Interactions and feedback that met nothing in time", "kind")
        self.lost = counter("offsets_lost", "Offsets that retention removed before they were read")
        self.open = gauge("open_entries", "Entries that no segment holds yet")
        self.waiting = gauge("waiting", "Interactions and feedback that wait for each other")
        self.adapters = gauge("adapters", "Adapters in memory")
        self.sealed_each = counter("adapter_entries_sealed", "Entries sealed, by adapter", "adapter")
        self.open_each = gauge("adapter_open_entries", "Entries that no segment holds yet, by adapter", "adapter")
        self.lag = gauge("lag", "Records on the broker that have not been read", "partition")

    def count(self, outcomes: Mapping[str, int]) -> None:
        """Add events by outcome."""
        for outcome, number in outcomes.items():
            self.events.labels(outcome).inc(number)

    def seal(self, adapter: str, trigger: str, entries: int) -> None:
        """Add a segment."""
        self.segments.labels(trigger).inc()
        self.sealed.inc(entries)
        if len(self._named) < self._most:
            self._named.add(adapter)
        if self._most:
            self.sealed_each.labels(adapter if adapter in self._named else OTHERS).inc(entries)

    def hold(self, entries: Iterable[tuple[str, int]]) -> None:
        """Set what is open, by adapter."""
        held: Tally[str] = Tally(dict.fromkeys((*self._named, OTHERS), 0))
        for adapter, number in entries:
            held[adapter if adapter in self._named else OTHERS] += number
        self.open.set(held.total())
        if self._most:
            for adapter, number in held.items():
                self.open_each.labels(adapter).set(number)

    def serve(self, host: str, port: int) -> None:
        """Answer Prometheus at an address; nothing when the port is 0."""
        if not port:
            return
        try:
            start_http_server(port, addr=host, registry=self.registry)
        except OSError as error:
            raise Conflict(
                f"The metrics port {port} is taken: {error}.", "Set streams.metrics_port to another."
            ) from error
        log.info("metrics served", extra={"url": f"http://{host}:{port}/metrics"})
