"""What the dataflow tells Prometheus."""

import logging
from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, start_http_server

from riverdelta.core.errors import Conflict

log = logging.getLogger(__name__)


class Metrics:
    """The dataflow's counters, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

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
        self.lag = gauge("lag", "Records on the broker that have not been read", "partition")

    def count(self, outcomes: Mapping[str, int]) -> None:
        """Add events by outcome."""
        for outcome, number in outcomes.items():
            self.events.labels(outcome).inc(number)

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
