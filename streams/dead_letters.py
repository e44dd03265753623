"""Dead letters: what was refused, on `<events>.DLT` with its original bytes, the reason and the origin in headers."""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from riverdelta.core.errors import Unavailable
from riverdelta.core.settings import Settings
from riverdelta.core.telemetry import now

from .access import check_access
from .items import DeadLetter, Headers

_PREFIX = "dlt."
_IDLE_SECONDS = 1.5  # the embedded broker does not know where a log ends


@dataclass(frozen=True)
class HeldLetter:
    """A dead letter as the topic holds it. `whole` is False where the value did not fit and only its start is kept."""

    partition: int
    offset: int
    reason: str
    message: str
    topic: str
    incarnation: str
    origin_partition: int
    origin_offset: int
    at: str
    key: bytes | None
    value: bytes | None
    headers: Headers
    whole: bool


def headers_of(letter: DeadLetter, topic: str, whole: bool = True) -> list[tuple[str, bytes | None]]:
    """The original headers, then ours."""
    ours = {
        "reason": letter.reason,
        "message": letter.message[:1000],
        "topic": topic,
        "incarnation": letter.where[0],
        "partition": letter.where[1],
        "offset": letter.offset,
        "at": now(),
    }
    if not whole:
        ours["whole"] = "no"
    kept = [(name, value) for name, value in letter.raw.headers if not name.startswith(_PREFIX)]
    return kept + [(f"{_PREFIX}{name}", str(value).encode()) for name, value in ours.items()]


def list_dead_letters(settings: Settings, limit: int | None = None) -> list[HeldLetter]:
    """The dead letters that Kafka holds, oldest first, each origin once; the last `limit` of them."""
    found: dict[tuple[str, int, int], HeldLetter] = {}
    for record in _records(settings):
        letter = _read(record)
        found.setdefault((letter.incarnation, letter.origin_partition, letter.origin_offset), letter)
    letters = sorted(found.values(), key=lambda letter: letter.at)
    return letters if limit is None else letters[-limit:] if limit else []


def replay_dead_letters(settings: Settings, selection: Callable[[HeldLetter], bool]) -> tuple[int, int]:
    """Publish the original bytes of the selected letters on the events topic again, every delivery checked.

    Returns how many were published, and how many cannot be because the topic holds them cut short.
    """
    from .publish import Publisher

    chosen = [letter for letter in list_dead_letters(settings) if selection(letter)]
    whole = [letter for letter in chosen if letter.whole]
    with Publisher(settings) as publisher:
        for number, letter in enumerate(whole, start=1):
            publisher.send(f"dead letter {number}", letter.key, letter.value, letter.headers)
    return len(whole), len(chosen) - len(whole)


def _read(record: Any) -> HeldLetter:
    ours = {name[len(_PREFIX) :]: value.decode() for name, value in record.headers if name.startswith(_PREFIX)}
    return HeldLetter(
        record.partition,
        record.offset,
        ours.get("reason", ""),
        ours.get("message", ""),
        ours.get("topic", ""),
        ours.get("incarnation", ""),
        int(ours.get("partition", -1)),
        int(ours.get("offset", -1)),
        ours.get("at", ""),
        record.key,
        record.value,
        tuple((name, value) for name, value in record.headers if not name.startswith(_PREFIX)),
        ours.get("whole") != "no",
    )


def _records(settings: Settings) -> Iterator[Any]:
    """Everything on the topic, up to where it ended when reading began or until nothing more comes."""
    from kafka import KafkaConsumer, TopicPartition
    from kafka.errors import KafkaError

    topic = settings.topics.dead_letters
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
                if batches:
                    last = time.monotonic()
                elif time.monotonic() - last > _IDLE_SECONDS and all(consumer.position(p) >= ends[p] for p in parts):
                    return
    except KafkaError as error:
        raise Unavailable(f"Cannot read {topic}: {error!r}.", "Is the broker running?") from error
