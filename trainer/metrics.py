"""What the trainer tells Prometheus."""

import logging

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from riverdelta.core.errors import Conflict

log = logging.getLogger(__name__)


class Metrics:
    """The trainer's counters, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        registry = self.registry
        self.steps = Counter("riverdelta_trainer_steps", "Optimiser steps, one for each adapter", registry=registry)
        self.tokens = Counter("riverdelta_trainer_tokens", "Tokens trained on, fillers included", registry=registry)
        self.outcomes = Counter(
            "riverdelta_trainer_outcomes", "Increments by what became of them", ("outcome",), registry=registry
        )
        self.masked = Counter(
            "riverdelta_trainer_entries_masked",
            "Entries that teach nothing: near-duplicates of an earlier one of their subject, again when trained again",
            registry=registry,
        )
        self.rejected_in_a_row = Gauge(
            "riverdelta_trainer_rejected_in_a_row",
            "Segments that the gate has rejected in a row, of adapters where these are as many as the recipe's alarm",
            ("adapter",),
            registry=registry,
        )
        self.waiting = Gauge(
            "riverdelta_trainer_waiting", "Adapters with a segment that awaits its outcome", registry=registry
        )
        self.active = Gauge("riverdelta_trainer_active", "Adapters being trained", registry=registry)
        self.seconds = Histogram(
            "riverdelta_trainer_increment_seconds",
            "From taking up a segment to its version",
            buckets=(0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000),
            registry=registry,
        )

    def serve(self, host: str, port: int) -> None:
        """Answer Prometheus at an address; nothing when the port is 0."""
        if not port:
            return
        try:
            start_http_server(port, addr=host, registry=self.registry)
        except OSError as error:
            raise Conflict(
                f"The metrics port {port} is taken: {error}.", "Set trainer.metrics_port to another."
            ) from error
        log.info("Metrics at http://%s:%d/metrics", host, port)
