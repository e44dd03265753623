"""An adapter's log read again from Kafka alone: what its events said, in the order that the ledger gave them."""

import base64
import contextlib
import time
import uuid
from collections.abc import Collection, Generator, Sequence
from dataclasses import dataclass

from riverdelta.core.errors import NotFound, Unavailable
from riverdelta.core.events import ContractError, Event, Feedback, Interaction, content_of, decode
from riverdelta.core.settings import Settings
from riverdelta.streams.joining import compose

Where = tuple[int, int]  # partition and offset
_IDLE_SECONDS = 1.5  # the embedded broker does not know where a log ends
_PATIENCE_SECONDS = 30.0


@dataclass(frozen=True)
class Lesson:
    """What one entry teaches, whom it is about, and the digest of the weights that wrote it, if any did."""

    content: bytes
    subjects: tuple[str, ...]
    written_by: str = ""


def check_incarnation(settings: Settings, wanted: Collection[str]) -> None:
    """`NotFound` unless the events topic is the one that every entry came from."""
    from riverdelta.streams.topics import admin

    name = settings.topics.events
    with admin(settings) as client:
        topics = [topic for topic in client.describe_topics([name]) if not topic["error_code"]]
    if {_id(each) for each in wanted} != {uuid.UUID(str(topic["topic_id"])) for topic in topics}:
        raise NotFound(
            f"The topic {name} is no longer the one that the entries came from.",
            "It was deleted, or a memory-only broker has restarted: the raw events are gone.",
        )


def _id(incarnation: str) -> uuid.UUID:
    """A topic's id from the form that librdkafka, which the dataflow reads with, writes it in: base64, unpadded.

    >>> str(_id("AAAAAAAAAAEAAAAAAAAAAg"))
    '00000000-0000-0001-0000-000000000002'
    """
    return uuid.UUID(
        bytes=base64.b64decode(incarnation + "==", altchars=b"-_" if set("-_") & set(incarnation) else None)
    )


def read_lessons(settings: Settings, adapter: str, wanted: Sequence[Where]) -> dict[Where, Lesson]:
    """The lessons at these places of the events topic; `NotFound` when Kafka no longer holds one of them."""
    events = _events(settings, adapter, set(wanted))
    gone = [at for at in wanted if at not in events]
    if gone:
        raise NotFound(
            f"Kafka no longer holds {len(gone)} of {len(wanted)} events of {adapter}, the first at "
            f"{gone[0][0]}:{gone[0][1]}.",
            "Retention has removed them, or a memory-only broker has restarted; the ledger's own check is "
            f"`riverdelta registry verify {adapter}`.",
        )
    partners = _Partners(events.values())
    return {at: partners.lesson(events[at]) for at in wanted}


class _Partners:
    """Interactions and the feedback on them, found by response."""

    def __init__(self, events: Collection[Event]) -> None:
        records = [event.record for event in events]
        self._interactions: dict[str, Interaction] = {}
        self._feedback: dict[str, Feedback] = {}
        for record in records:
            if isinstance(record, Interaction):
                self._interactions.setdefault(record.response, record)
            elif isinstance(record, Feedback):
                self._feedback.setdefault(record.response, record)
        self._subjects = {id(event.record): event.subjects for event in events}

    def lesson(self, event: Event) -> Lesson:
        record = event.record
        if isinstance(record, Interaction):
            pair = record, self._feedback[record.response]
        elif isinstance(record, Feedback):
            pair = self._interactions[record.response], record
        else:
            return Lesson(content_of(record), event.subjects)
        content, by_model = compose(content_of(pair[0]), content_of(pair[1]))
        subjects = {*self._subjects[id(pair[0])], *self._subjects[id(pair[1])]}
        return Lesson(content, tuple(sorted(subjects)), pair[0].digest if by_model else "")


def _events(settings: Settings, adapter: str, wanted: set[Where]) -> dict[Where, Event]:
    """The adapter's events, from each partition's beginning until all that is wanted, and its partners, are there."""
    found: dict[Where, Event] = {}
    missing, partners = set(wanted), False
    with contextlib.closing(_records(settings)) as records:
        for partition, offset, event in records:
            if event.adapter == adapter:
                found[partition, offset] = event
                missing.discard((partition, offset))
                partners = partners or isinstance(event.record, Interaction | Feedback)
            if not missing and not partners:
                break
    return found


def _records(settings: Settings) -> Generator[tuple[int, int, Event], None, None]:
    from kafka import KafkaConsumer, TopicPartition
    from kafka.errors import KafkaError

    topic = settings.topics.events
    try:
        with contextlib.closing(
            KafkaConsumer(**settings.kafka.for_kafka_python(), auto_offset_reset="earliest", enable_auto_commit=False)
        ) as consumer:
            parts = [TopicPartition(topic, number) for number in sorted(consumer.partitions_for_topic(topic) or ())]
            if not parts:
                return
            consumer.assign(parts)
            consumer.seek_to_beginning(*parts)
            began = last = time.monotonic()
            while True:
                batches = consumer.poll(timeout_ms=200)
                now = time.monotonic()
                if batches:
                    last = now
                elif now - last > _IDLE_SECONDS and (last > began or now - began > _PATIENCE_SECONDS):
                    return
                for part, records in batches.items():
                    for record in records:
                        with contextlib.suppress(ContractError):
                            yield part.partition, record.offset, decode(record.value, record.headers)
    except KafkaError as error:
        raise Unavailable(f"Cannot read {topic}: {error!r}.", "Is the broker running?") from error
