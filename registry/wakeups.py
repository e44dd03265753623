"""Wake-ups on Kafka: a hint that the ledger has moved. Losing one costs seconds, never work.

What a message says is not trusted: a listener only looks at the ledger sooner than it would have.
"""

import logging
import threading
import time
from collections.abc import Callable

from riverdelta.core.settings import Settings

log = logging.getLogger(__name__)
_RETRY_SECONDS = 2.0


class Wakeups:
    """Send and hear wake-ups. Every method returns at once, whether or not there is a broker."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []
        self._outbox: list[tuple[str, str]] = []
        self._filled = threading.Condition()

    def send(self, topic: str, adapter: str) -> None:
        """Hint on a topic that an adapter's facts have moved."""
        if not self._settings.kafka.bootstrap:
            return
        with self._filled:
            if not any(thread.name == "wakeups" for thread in self._threads):
                self._spawn("wakeups", self._drain)
            if len(self._outbox) < 10_000:
                self._outbox.append((topic, adapter))
            self._filled.notify()

    def listen(self, topic: str, event: threading.Event) -> None:
        """Set `event` whenever something is said on a topic, from a thread of its own."""
        if self._settings.kafka.bootstrap:
            self._spawn(f"hear {topic}", lambda: self._hear(topic, event))

    def close(self) -> None:
        """Stop every thread; one that still waits for a broker that is away is left to die with the process."""
        self._stop.set()
        with self._filled:
            self._filled.notify_all()
        deadline = time.monotonic() + 1.0
        for thread in self._threads:
            thread.join(timeout=max(0.0, deadline - time.monotonic()))

    def _spawn(self, name: str, target: Callable[[], None]) -> None:
        thread = threading.Thread(target=target, name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _drain(self) -> None:
        from kafka import KafkaProducer

        producer = None
        while True:
            with self._filled:
                while not self._outbox and not self._stop.is_set():
                    self._filled.wait(1.0)
                batch, self._outbox = self._outbox, []
            if not batch and self._stop.is_set():
                break
            try:
                if producer is None:
                    producer = KafkaProducer(
                        **self._settings.kafka.for_kafka_python(), linger_ms=0, max_block_ms=2000, retries=0
                    )
                for topic, adapter in dict.fromkeys(batch):
                    producer.send(topic, value=adapter.encode())
                producer.flush(timeout=2)
            except Exception as error:  # the client's own too, when it is closed under it: a hint is not worth a word
                log.debug("wake-up not sent: %s", error)
                self._stop.wait(_RETRY_SECONDS)
        if producer is not None:
            producer.close(timeout=1)

    def _hear(self, topic: str, event: threading.Event) -> None:
        from kafka import KafkaConsumer, TopicPartition
        from kafka.errors import KafkaError

        while not self._stop.is_set():
            try:
                consumer = KafkaConsumer(**self._settings.kafka.for_kafka_python(), auto_offset_reset="latest")
                try:
                    known: set[int] = set()
                    while not self._stop.is_set():
                        partitions = consumer.partitions_for_topic(topic) or set()
                        if partitions != known:
                            consumer.assign([TopicPartition(topic, number) for number in sorted(partitions)])
                            known = set(partitions)
                        if not known:
                            self._stop.wait(_RETRY_SECONDS)
                        elif consumer.poll(timeout_ms=500):
                            event.set()
                finally:
                    consumer.close()
            except (KafkaError, OSError) as error:
                log.debug("not hearing %s: %s", topic, error)
                self._stop.wait(_RETRY_SECONDS)
