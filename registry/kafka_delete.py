"""DeleteRecords: remove from Kafka the request that asked for a forget, as it names the subject in plain text.

Kafka deletes only what lies below an offset. On the control topic that may go: every request below one that has been
carried out has been carried out too. On the events topic others' events lie below, which stay until retention.
"""

import logging
from collections.abc import Mapping
from typing import Any

from riverdelta.core.settings import Settings

from .kafka_admin import admin, described

log = logging.getLogger(__name__)
_TIMEOUT_MS = 10_000


def delete_request(settings: Settings, asked: Mapping[str, Any]) -> bool:
    """Whether nobody can read the request (topic, incarnation, partition, offset) any more, nor those before it.

    A cluster that is away, does not let this client, or knows no DeleteRecords leaves it to retention.
    """
    from kafka import TopicPartition
    from kafka.errors import KafkaError

    place = TopicPartition(asked["topic"], asked["partition"])
    try:
        with admin(settings) as client:
            topic = described(client, asked["topic"])
            if topic is None or f"{topic['topic_id']}" != asked["incarnation"]:
                return True  # it went with the topic
            client.delete_records({place: asked["offset"] + 1}, timeout_ms=_TIMEOUT_MS)
    except (KafkaError, OSError, ValueError, KeyError) as error:
        log.warning("Retention removes the request that asked: Kafka does not delete it (%r)", error)
        return False
    return True
