"""Delivery of dead letters through confluent-kafka: every one acknowledged before the call returns."""

import time
from collections.abc import Sequence
from functools import partial
from typing import Any

from riverdelta.core.errors import Unavailable
from riverdelta.core.patience import Patience
from riverdelta.core.settings import Settings

from .dead_letters import headers_of
from .items import DeadLetter

_SECONDS = 10.0
_KEPT_BYTES = 1024  # of a value that the topic does not take


class Delivery:
    """A producer for the dead-letter topic."""

    def __init__(self, settings: Settings, patience: Patience) -> None:
        from confluent_kafka import Producer

        self._events = settings.topics.events
        self._topic = settings.topics.dead_letters
        self._patience = patience
        self._producer = Producer(
            {
                **settings.kafka.for_confluent(),
                "acks": "all",
                "linger.ms": 1,
                "delivery.timeout.ms": int(_SECONDS * 1000),
                "message.max.bytes": 8 * 1024 * 1024,
                "topic.metadata.refresh.interval.ms": 5000,
                "log_level": 2,
                "reconnect.backoff.max.ms": 1000,
            }
        )

    def deliver(self, letters: Sequence[DeadLetter]) -> None:
        """Return once the topic holds every letter; waits while the broker is away (`Stopped` ends the wait)."""
        left = [(letter, True) for letter in letters]
        while left:
            left = self._patience(partial(self._attempt, left), f"dead letters to {self._topic}")

    def _attempt(self, letters: Sequence[tuple[DeadLetter, bool]]) -> list[tuple[DeadLetter, bool]]:
        """Those that must be sent again, shortened; `Unavailable` when any did not arrive for another reason."""
        from confluent_kafka import KafkaError

        failed: list[tuple[DeadLetter, Any]] = []
        arrived: set[int] = set()

        def told(letter: DeadLetter, error: Any, _message: Any) -> None:
            if error is None:
                arrived.add(id(letter))
            else:
                failed.append((letter, error))

        for letter, whole in letters:
            self._produce(letter, whole, partial(told, letter))
        deadline = time.monotonic() + _SECONDS + 5
        while self._producer.flush(0.2) and time.monotonic() < deadline and not self._patience.stop.is_set():
            pass
        too_large = [letter for letter, error in failed if error.code() == KafkaError.MSG_SIZE_TOO_LARGE]
        lost = len(letters) - len(arrived) - len(too_large)
        if lost:
            self._producer.purge()
            self._producer.flush(0)
            why = next((str(error) for _, error in failed), "no answer")
            raise Unavailable(f"{lost} dead letters did not reach {self._topic}: {why}.", "Is the broker running?")
        return [(letter, False) for letter in too_large]

    def _produce(self, letter: DeadLetter, whole: bool, told: Any) -> None:
        value = letter.raw.value if whole or letter.raw.value is None else letter.raw.value[:_KEPT_BYTES]
        headers = headers_of(letter, self._events, whole)
        while True:
            try:
                self._producer.produce(self._topic, value=value, key=letter.raw.key, headers=headers, on_delivery=told)
                return
            except BufferError:
                self._producer.poll(0.1)
