"""Where the events topic ends: what was sent before a subject was allowed again is told by it from what comes after."""

import base64
import uuid

from riverdelta.core.errors import Unavailable
from riverdelta.core.settings import Settings

from .kafka_admin import admin, described


def log_ends(settings: Settings) -> dict[tuple[str, int], int]:
    """Per (incarnation, partition), the offset that the next event will have; none where no Kafka is known or there is
    no such topic, and too low ones of the embedded broker. `Unavailable` where Kafka does not say."""
    if not settings.kafka.bootstrap:
        return {}
    from kafka import TopicPartition
    from kafka.admin import OffsetSpec
    from kafka.errors import KafkaError

    name = settings.topics.events
    try:
        with admin(settings) as client:
            topic = described(client, name)
            if topic is None:
                return {}
            places = [TopicPartition(name, part["partition_index"]) for part in topic["partitions"]]
            found = client.list_partition_offsets(dict.fromkeys(places, OffsetSpec.LATEST))
    except (KafkaError, OSError, ValueError, KeyError) as error:
        raise Unavailable(f"Kafka does not say where {name} ends: {error!r}.", "Is the broker running?") from error
    # librdkafka, which the dataflow reads with, writes a topic's id in base64 without padding: of either alphabet.
    encoders = base64.b64encode, base64.urlsafe_b64encode
    run = uuid.UUID(str(topic["topic_id"])).bytes
    runs = {encode(run).decode().rstrip("=") for encode in encoders}
    return {(run, place.partition): found[place].offset for run in runs for place in places}
