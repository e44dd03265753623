"""Everything that a topic holds, from its beginning to where it ended when reading began."""

import contextlib
import time
from collections.abc import Generator
from typing import Any

from riverdelta.core.errors import Unavailable
from riverdelta.core.settings import Settings

from .access import check_access, check_listens

_IDLE_SECONDS = 1.5  # the embedded broker does not know where a log ends
_PATIENCE_SECONDS = 30.0


def read_all(settings: Settings, topic: str) -> Generator[Any, None, None]:
    """kafka-python's records, in each partition's order; none where there is no such topic. `Unavailable` when the
    broker goes away or says nothing for half a minute before the end."""
    from kafka import KafkaConsumer, TopicPartition
    from kafka.errors import KafkaError

    check_listens(settings.kafka)
    check_access(settings.kafka)
    try:
        with contextlib.closing(
            KafkaConsumer(**settings.kafka.for_kafka_python(), auto_offset_reset="earliest", enable_auto_commit=False)
        ) as consumer:
            numbers = consumer.partitions_for_topic(topic)
            if not numbers:
                return
            parts = [TopicPartition(topic, number) for number in sorted(numbers)]
            consumer.assign(parts)
            consumer.seek_to_beginning(*parts)
            ends = consumer.end_offsets(parts)
            last = time.monotonic()
            while True:
                batches = consumer.poll(timeout_ms=200)
                for records in batches.values():
                    yield from records
                idle = time.monotonic() - last
                if batches:
                    last = time.monotonic()
                elif idle > _IDLE_SECONDS and all(consumer.position(part) >= ends[part] for part in parts):
                    return
                elif idle > _PATIENCE_SECONDS:
                    raise Unavailable(f"{topic} cannot be read to its end.", "Is the broker running?")
    except KafkaError as error:
        raise Unavailable(f"Cannot read {topic}: {error!r}.", "Is the broker running?") from error
