"""Publish events with kafka-python, every delivery checked."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from riverdelta.core.errors import BadInput, Refused, Unavailable
from riverdelta.core.events import ContractError, decode
from riverdelta.core.settings import Settings

from .access import check_access, check_listens

_CHECK_EVERY = 1000
_SECONDS = 30.0
_NAMED = 3  # bad lines of a file, each with its reason


@dataclass
class Published:
    """What arrived: how many events, and per partition the last offset."""

    events: int = 0
    adapters: Counter[str] = field(default_factory=Counter)
    last: dict[int, int] = field(default_factory=dict)


class Publisher:
    """A kafka-python producer for the events topic that counts a record only once the broker has acknowledged it."""

    def __init__(self, settings: Settings) -> None:
        from kafka import KafkaProducer
        from kafka.errors import KafkaError

        self._topic = settings.topics.events
        self._waiting: list[tuple[str, Any]] = []
        self.last: dict[int, int] = {}
        check_listens(settings.kafka)
        check_access(settings.kafka)
        try:
            self._producer = KafkaProducer(
                **settings.kafka.for_kafka_python(),
                acks="all",
                linger_ms=5,
                max_block_ms=int(_SECONDS * 1000),
                delivery_timeout_ms=int(_SECONDS * 1000),
                request_timeout_ms=int(_SECONDS * 500),
            )
        except KafkaError as error:
            raise Unavailable(
                f"What listens at {settings.kafka.bootstrap} does not answer as a Kafka broker.",
                "Is --kafka right, and the broker well? Try again then.",
            ) from error

    def send(
        self, name: str, key: bytes | None, value: bytes | None, headers: Sequence[tuple[str, bytes | None]] = ()
    ) -> None:
        """Send a record; `name` says which one it was if it does not arrive."""
        from kafka.errors import KafkaError

        try:
            future = self._producer.send(self._topic, key=key, value=value, headers=list(headers))
        except KafkaError as error:
            raise self._lost(name, error) from error
        self._waiting.append((name, future))
        if len(self._waiting) >= _CHECK_EVERY:
            self.check()

    def check(self) -> None:
        """Return once everything sent has been acknowledged; the error names the first record that was not."""
        from kafka.errors import KafkaError

        self._producer.flush()
        waiting, self._waiting = self._waiting, []
        for name, future in waiting:
            try:
                met = future.get(timeout=_SECONDS)
            except KafkaError as error:
                raise self._lost(name, error) from error
            self.last[met.partition] = max(met.offset, self.last.get(met.partition, -1))

    def _lost(self, name: str, error: Exception) -> Exception:
        if type(error).__name__ in ("MessageSizeTooLargeError", "RecordTooLargeError"):
            return BadInput(f"{name} is larger than the broker takes: {error!r}.", "Shorten it.")
        if type(error).__name__ == "TopicAuthorizationFailedError":
            return Refused(f"The cluster does not let this client write to {self._topic}.", "Grant it Write.")
        return Unavailable(
            f"{name} did not reach {self._topic}: {error!r}.", "What came before it arrived; publish from it on again."
        )

    def __enter__(self) -> "Publisher":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            if kind is None:
                self.check()
        finally:
            self._producer.close(timeout=5)


def check_lines(lines: Iterable[bytes]) -> int:
    """How many events JSON lines hold; `BadInput` names the first few lines that are none."""
    count = 0
    bad: list[str] = []
    for number, line in enumerate(lines, start=1):
        if value := line.strip():
            count += 1
            try:
                decode(value)
            except ContractError as error:
                bad.append(f"Line {number} ({error.reason}): {error.message}" if len(bad) < _NAMED else "")
    if bad:
        more = f" And {len(bad) - _NAMED} more." if len(bad) > _NAMED else ""
        raise BadInput(
            f"Nothing was sent. Lines that are no events: {len(bad)} of {count}. {' '.join(bad[:_NAMED])}{more}",
            "docs/events.md shows the contract.",
        )
    return count


def publish(settings: Settings, lines: Iterable[bytes], *, progress: Callable[[int], None] | None = None) -> Published:
    """Publish JSON lines, keyed by adapter; blank lines are skipped.

    A line that is not an event is refused before it is sent (`BadInput` names it); what came before it has arrived.
    `progress` is called with the number of events acknowledged so far.
    """
    done = Published()
    with Publisher(settings) as publisher:
        for number, line in enumerate(lines, start=1):
            value = line.strip()
            if not value:
                continue
            try:
                event = decode(value)
            except ContractError as error:
                publisher.check()
                raise BadInput(
                    f"Line {number} is not an event ({error.reason}): {error.message}",
                    f"Mend it, and publish from line {number} on: the {done.events} events before it have arrived. "
                    "docs/events.md shows the contract.",
                ) from error
            publisher.send(f"Line {number}", event.adapter.encode(), value)
            done.events += 1
            done.adapters[event.adapter] += 1
            if progress is not None and done.events % _CHECK_EVERY == 0:
                progress(done.events)
        publisher.check()
        if progress is not None:
            progress(done.events)
        done.last = dict(publisher.last)
    return done
