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


def described(client: Any, name: str) -> dict[str, Any] | None:
    """A topic as its cluster describes it, None where there is none; `ValueError` where the cluster does not show
    it: that is no word on whether there is one."""
    from kafka.errors import UnknownTopicOrPartitionError

    topic: dict[str, Any]
    [topic] = client.describe_topics([name])
    if topic["error_code"] == UnknownTopicOrPartitionError.errno:
        return None
    if topic["error_code"]:
        raise ValueError(f"error {topic['error_code']}")
    return topic
