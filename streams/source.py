"""The source: a worker's share of the events topic's partitions, read from where the ledger says.

The incarnation of a topic is Kafka's topic id. librdkafka goes on reading at its old offset when a topic has been
deleted and made again, so each batch is passed on only after the broker, asked once the batch had come, has still
named the same id: ids never return, so what came before is of that incarnation.
"""

import contextlib
import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from bytewax.inputs import DynamicSource, StatelessSourcePartition

from riverdelta.core.errors import BadInput, Corrupt, Unavailable
from riverdelta.core.settings import Settings
from riverdelta.registry.ledger import Gap

from .ending import Ending
from .intake import Read, Record
from .items import Where
from .metrics import Metrics

log = logging.getLogger(__name__)

BATCH = 4096
_IDLE = timedelta(milliseconds=5)
_BEAT_SECONDS = 0.1  # even when nothing comes: ages are checked, fences looked for
_LOOK_SECONDS = 1.0
_ASK_SECONDS = 10.0
_PATIENT_SECONDS = 0.05
_WATERMARK_SECONDS = 2.0
_TELL_SECONDS = 30.0


@dataclass(frozen=True)
class Topic:
    """What the broker says of the events topic now."""

    run: str
    partitions: frozenset[int]


def _described(answer: Any, name: str) -> Topic | None:
    """The topic in a DescribeTopics answer; None while it does not exist. Errors are `Unavailable`."""
    from confluent_kafka import KafkaError, KafkaException

    try:
        found = answer.result(timeout=0)
    except KafkaException as error:
        if error.args[0].code() == KafkaError.UNKNOWN_TOPIC_OR_PART:
            return None
        raise Unavailable(f"The broker does not describe {name}: {error.args[0].str()}.", "Is it running?") from error
    run = str(found.topic_id)
    if not found.topic_id or found.topic_id.get_most_significant_bits() == 0:
        raise BadInput(
            f"The broker gives {name} no topic id.", "Apache Kafka from 2.8 on does: events are known by it."
        )
    return Topic(run, frozenset(partition.id for partition in found.partitions))


class Reader(StatelessSourcePartition[Read]):  # type: ignore[misc]
    """One worker's partitions: those whose number is the worker's, modulo the number of workers."""

    def __init__(
        self,
        settings: Settings,
        worker: int,
        workers: int,
        floors: Callable[[str], Mapping[int, int]],
        record: Callable[[Gap], None],
        ending: Ending,
        metrics: Metrics,
    ) -> None:
        """`floors` gives for a topic incarnation the offsets that the ledger wants partitions read from; `record` hears
        what retention has removed of them."""
        from confluent_kafka import Consumer
        from confluent_kafka.admin import AdminClient

        common = {**settings.kafka.for_confluent(), "log_level": 2, "reconnect.backoff.max.ms": 1000}
        self._name = settings.topics.events
        self._worker, self._workers = worker, workers
        self._floors = floors
        self._record = record
        self._ending = ending
        self._metrics = metrics
        self._admin = AdminClient(common)
        self._consumer = Consumer(
            {
                **common,
                "group.id": "riverdelta",  # never joined: partitions are assigned, nothing is committed
                "enable.auto.commit": False,
                "auto.offset.reset": "error",
                "queued.max.messages.kbytes": 65536,
                "fetch.wait.max.ms": 100,
                "topic.metadata.refresh.interval.ms": 5000,
            }
        )
        self._topic: Topic | None = None
        self._reached: dict[Where, int] = {}
        self._broken: set[int] = set()  # partitions whose offset the broker does not have
        self._held: list[Record] = []
        self._asked: Future[Any] | None = None
        self._serial = 0
        self._beaten = self._looked = float("-inf")
        self._awake: datetime | None = None
        self._told, self._told_at = "", 0.0

    # -- Bytewax -----------------------------------------------------------------------------------------------------

    def next_batch(self) -> list[Read]:
        """The next records, or now and then a beat without any."""
        if self._ending.stop.is_set():
            raise StopIteration
        try:
            return self._next(time.monotonic())
        except Exception as error:
            self._ending.by(error)
            raise StopIteration from error

    def next_awake(self) -> datetime | None:
        """At once while records come."""
        return self._awake

    def close(self) -> None:
        """Stop reading."""
        self._consumer.close()

    def _next(self, now: float) -> list[Read]:
        if not self._held and self._topic is not None:
            self._held = self._consume()
        if self._asked is None and (self._held or self._broken or now - self._looked >= _LOOK_SECONDS):
            self._looked = now
            self._asked = self._ask()
        if self._confirm() and self._held:
            records, self._held = self._held, []
            self._awake = None
            return [self._read(records, now)]
        self._awake = datetime.now(UTC) + _IDLE
        return [self._read([], now)] if now - self._beaten >= _BEAT_SECONDS else []

    def _read(self, records: list[Record], now: float) -> Read:
        run = self._topic.run if self._topic else ""
        for partition, offset, *_ in records:
            self._reached[run, partition] = offset + 1
        self._metrics.consumed.inc(len(records))
        self._beaten = now
        self._serial += 1
        return Read((self._worker, self._serial), run, records, dict(self._reached))

    # -- records -----------------------------------------------------------------------------------------------------

    def _consume(self) -> list[Record]:
        records: list[Record] = []
        for message in self._consumer.consume(BATCH, timeout=0):
            if (error := message.error()) is not None:
                self._meet(error, message.partition())
                continue
            where, logged = (message.partition(), message.offset()), message.timestamp()[1]
            records.append((*where, logged, message.key(), message.value(), tuple(message.headers() or ())))
        return records

    def _meet(self, error: Any, partition: int) -> None:
        from confluent_kafka import KafkaError

        code = error.code()
        if code in (KafkaError._AUTO_OFFSET_RESET, KafkaError.OFFSET_OUT_OF_RANGE):
            self._broken.add(partition)
        elif code in (KafkaError.TOPIC_AUTHORIZATION_FAILED, KafkaError._AUTHENTICATION):
            raise BadInput(f"The broker does not let this client read {self._name}: {error.str()}.", "Grant it Read.")
        else:
            self._tell(f"reading {self._name}: {error.str()}")  # librdkafka tries again by itself

    # -- the topic ---------------------------------------------------------------------------------------------------

    def _ask(self) -> "Future[Any]":
        from confluent_kafka import TopicCollection

        topics = TopicCollection([self._name])
        asked: Future[Any] = self._admin.describe_topics(topics, request_timeout=_ASK_SECONDS)[self._name]
        return asked

    def _confirm(self) -> bool:
        """Whether the broker, asked after the held records came, has named the topic that they were read from."""
        if self._asked is None:
            return False
        with contextlib.suppress(FutureTimeout):
            if self._held:
                self._asked.exception(timeout=_PATIENT_SECONDS)
        if not self._asked.done():
            return False
        answer, self._asked = self._asked, None
        try:
            topic = _described(answer, self._name)
            if topic is None:
                self._held = []
                raise Unavailable(f"The topic {self._name} does not exist.", "Create it, and reading begins.")
            same = self._topic is not None and self._topic.run == topic.run
            if not same:
                self._begin(topic)
            self._follow(topic)
        except Unavailable as error:
            self._tell(str(error))
            return False
        self._tell("")
        return same

    def _begin(self, topic: Topic) -> None:
        """Turn to an incarnation of the topic that this reader has not read before."""
        if self._topic is not None:
            log.warning(
                "the topic was made again: what had not been read of the old one is gone",
                extra={"topic": self._name, "old": self._topic.run, "new": topic.run},
            )
        self._held = []
        self._reached = {}
        self._broken.clear()
        self._consumer.unassign()
        self._topic = Topic(topic.run, frozenset())

    def _follow(self, topic: Topic) -> None:
        """Begin partitions that are new, and those whose offset the broker does not have once more."""
        numbers = {number for number in topic.partitions if number % self._workers == self._worker}
        if new := sorted(numbers - {partition for _, partition in self._reached}):
            floors = self._floors(topic.run)
            # All are asked for before any is fetched: what is asked behind a fetch waits until that has found records.
            lows = {number: self._watermarks(number)[0] for number in new}
            self._assign({number: self._above(number, floors.get(number, low), low) for number, low in lows.items()})
            log.info(
                "reading",
                extra={
                    "topic": self._name,
                    "incarnation": topic.run,
                    "from": {number: self._reached[topic.run, number] for number in new},
                },
            )
        for number in sorted(self._broken):
            low, high = self._watermarks(number)
            wanted = self._reached[topic.run, number]
            if wanted > high:
                raise Corrupt(
                    f"Partition {number} of {self._name} ends at offset {high}, but was read up to {wanted}: "
                    "the broker has lost its end.",
                    "Make the topic again: under its new id it is read from its beginning.",
                )
            self._assign({number: self._above(number, wanted, low)})
        self._broken.clear()
        self._topic = topic
        self._measure_lag()

    def _above(self, number: int, wanted: int, low: int) -> int:
        """Where to begin: at `wanted`, or where retention has left the log to begin."""
        if wanted < low:
            assert self._topic is not None
            self._record(Gap(self._topic.run, number, wanted, low))
            self._metrics.lost.inc(low - wanted)
            log.error(
                "retention has removed records that were not learned yet; reading goes on behind them. Send them again "
                "if their producers still can, and keep records longer (topics.retention_hours)",
                extra={"topic": self._name, "partition": number, "from": wanted, "to": low},
            )
        return max(wanted, low)

    def _watermarks(self, number: int) -> tuple[int, int]:
        from confluent_kafka import KafkaException, TopicPartition

        try:
            low, high = self._consumer.get_watermark_offsets(
                TopicPartition(self._name, number), timeout=_WATERMARK_SECONDS
            )
        except KafkaException as error:
            raise Unavailable(
                f"Partition {number} of {self._name} does not answer: {error.args[0].str()}.", "Has it a leader?"
            ) from error
        return low, high

    def _assign(self, offsets: Mapping[int, int]) -> None:
        from confluent_kafka import TopicPartition

        assert self._topic is not None
        parts = [TopicPartition(self._name, number, offset) for number, offset in offsets.items()]
        if held := [part for part in self._consumer.assignment() if part.partition in offsets]:
            self._consumer.incremental_unassign(held)
        self._consumer.incremental_assign(parts)
        for number, offset in offsets.items():
            self._reached[self._topic.run, number] = offset

    def _measure_lag(self) -> None:
        from confluent_kafka import TopicPartition

        for (_, number), reached in self._reached.items():
            _, high = self._consumer.get_watermark_offsets(TopicPartition(self._name, number), cached=True)
            if high >= 0:
                self._metrics.lag.labels(str(number)).set(max(0, high - reached))

    def _tell(self, problem: str) -> None:
        """Log a problem when it is new, and every half minute while it lasts."""
        now = time.monotonic()
        if problem and (problem != self._told or now - self._told_at > _TELL_SECONDS):
            log.warning(problem)
            self._told_at = now
        elif self._told and not problem:
            log.info("the broker answers again", extra={"topic": self._name})
        self._told = problem


class Source(DynamicSource[Read]):  # type: ignore[misc]
    """Readers, one per worker."""

    def __init__(self, build: Callable[[int, int], Reader]) -> None:
        self._build = build

    def build(self, _step_id: str, worker_index: int, worker_count: int) -> Reader:
        """The reader of a worker."""
        return self._build(worker_index, worker_count)
