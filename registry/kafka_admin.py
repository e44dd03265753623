"""Kafka's admin client for a forget, which waits for no cluster: what does not answer soon is done without."""

import contextlib
from typing import Any

from riverdelta.core.settings import Settings

_BOOTSTRAP_MS = 5_000
_ANSWER_MS = 10_000


def admin(settings: Settings) -> contextlib.closing[Any]:
    """kafka-python's admin client, closed at the end; its errors are its own, and `OSError` and `ValueError`."""
    from kafka import KafkaAdminClient

    return contextlib.closing(
        KafkaAdminClient(
            **settings.kafka.for_kafka_python(), bootstrap_timeout_ms=_BOOTSTRAP_MS, request_timeout_ms=_ANSWER_MS
        )
    )
