"""The control topic: forget and allow by message, for those whom the cluster lets write there.

Messages are JSON: {"id", "action": "forget" | "allow", "subject", "adapter" or "all_adapters": true, "reason"}, and for
a forget "serve_until_rebuilt". An id acts once. Nobody waits for an answer: a forget of an adapter that the dataflow is
still to make is kept for then. A request is recorded as done once its act is durable, so that a crash repeats a message
and never skips one. One that cannot be carried out yet waits, and keeps none behind it waiting whose order with it does
not count (see `registry.heard`).
"""

import contextlib
import logging
import re
import threading
import time
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from riverdelta.core.errors import BadInput, Conflict, Corrupt, RiverdeltaError, Unavailable
from riverdelta.core.names import check_adapter, subject_name
from riverdelta.core.settings import Settings
from riverdelta.core.times import of_epoch

from .belonging import KeptOpen, subject_key
from .heard import Heard, tell_lost
from .kafka_admin import described
from .kafka_delete import delete_request
from .ledger import Forget, Ledger, Stage
from .operations import LONGEST_SECONDS, Operations, names
from .wakeups import Wakeups

log = logging.getLogger(__name__)
_RETRY_SECONDS = 2.0
_TELL_SECONDS = 600.0  # after which the log tells again of a request that waits
_MOST_WAITING = 1000  # on a partition: then nothing can be done, and what waits is tried before more is read
_MAX_BYTES = 64 * 1024


class Message(Struct, frozen=True, forbid_unknown_fields=True):
    """One request."""

    id: Annotated[str, Meta(min_length=1, max_length=128)]
    action: Literal["forget", "allow"]
    subject: Annotated[str, Meta(min_length=1, max_length=256)]
    adapter: str = ""
    all_adapters: bool = False
    reason: Annotated[str, Meta(max_length=1000)] = ""
    serve_until_rebuilt: Annotated[float, Meta(ge=0, le=LONGEST_SECONDS)] = 0.0

    @classmethod
    def read(cls, value: bytes | None) -> "Message":
        """The request in a record's value; `BadInput` says what is wrong with it, without quoting it.

        >>> Message.read(b'{"id": "1", "action": "forget", "subject": "ann", "adapter": "acme"}').adapter
        'acme'
        """
        if not value or len(value) > _MAX_BYTES:
            raise BadInput(f"A request has 1 to {_MAX_BYTES} bytes.", "See docs/forgetting.md.")
        try:
            message = msgspec.json.decode(value, type=cls)
        except msgspec.ValidationError as error:
            # What the message says may name a subject, and logs stay: only where it does not fit is told.
            where = re.search(
                r"at `\$\.(id|action|subject|adapter|all_adapters|reason|serve_until_rebuilt)", str(error)
            )
            at = f" at {where[1]!r}" if where else ""
            raise BadInput(f"The request does not fit{at}.", "See docs/forgetting.md.") from error
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise BadInput("The request is not JSON.", "See docs/forgetting.md.") from error
        if not message.id.isprintable():
            raise BadInput("A request's id is of printable characters.", "See docs/forgetting.md.")
        if bool(message.adapter) == message.all_adapters:
            raise BadInput("A request names an adapter or all_adapters, one of them.", "See docs/forgetting.md.")
        if message.adapter:
            try:
                check_adapter(message.adapter)
            except BadInput as error:
                raise BadInput("The request's adapter is no adapter's name.", "See docs/forgetting.md.") from error
        if message.serve_until_rebuilt and message.action != "forget":
            raise BadInput("Only a forget has a serve_until_rebuilt.", "See docs/forgetting.md.")
        return message

    def follows(self, earlier: "Message") -> bool:
        """Whether it must not be carried out before an earlier one: of forgets and allows of a subject the last counts,
        and an id allows one subject only. Forgets do not hinder each other, but for the same one asked for twice."""
        if self.action == earlier.action == "forget":
            return self == earlier
        alike = self.action == earlier.action and self.id == earlier.id
        return alike or subject_name(self.subject) == subject_name(earlier.subject)


class Control:
    """Reads the control topic and acts, until told to stop."""

    def __init__(self, ledger: Ledger, settings: Settings, wakeups: Wakeups, stop: threading.Event) -> None:
        self._ledger = ledger
        self._settings = settings
        self._stop = stop
        self._topic = settings.topics.control
        self._keys = KeptOpen(settings)
        self._acts = Operations(ledger, settings, "control", wakeups, self._keys)
        self._told: dict[tuple[str, int, int], float] = {}
        self._heard: dict[int, Heard] = {}
        self._gone: list[Heard] = []  # of topics made again: what waits of them lies nowhere else

    def run(self) -> None:
        """Follow the topic. What cannot be done now (broker or ledger away, another subject key) is tried again."""
        from kafka.errors import KafkaError

        if not self._settings.kafka.bootstrap:
            log.warning("no Kafka is known: nobody hears %s", self._topic)
            return
        told = ""
        while not self._stop.is_set():
            try:
                self._follow()
                told = ""
            except (KafkaError, OSError, RiverdeltaError) as error:
                level = logging.ERROR if isinstance(error, Corrupt) else logging.WARNING
                what = type(error).__name__
                log.log(logging.DEBUG if told == what else level, "not hearing %s: %s", self._topic, error)
                told = what
            except Exception:  # a bug must not leave requests to forget unheard for good
                log.exception("following %s failed; beginning again", self._topic)
            self._stop.wait(_RETRY_SECONDS)
        self._keys.close()

    def _follow(self) -> None:
        from kafka import KafkaConsumer, TopicPartition

        incarnation, partitions = self._look()
        heard = self._begin(incarnation, partitions)
        if not partitions:
            return
        options = {**self._settings.kafka.for_kafka_python(), "enable_auto_commit": False}
        with contextlib.closing(KafkaConsumer(**options, auto_offset_reset="earliest")) as consumer:
            assigned = {number: TopicPartition(self._topic, number) for number in partitions}
            consumer.assign(list(assigned.values()))
            for number, place in assigned.items():
                consumer.seek(place, heard[number].first)
            polls, tried = 0, time.monotonic()
            again: list[tuple[Any, Heard]] = []
            while not self._stop.is_set():
                full = {place for number, place in assigned.items() if len(heard[number].waiting) >= _MOST_WAITING}
                if consumer.paused() - full:
                    return  # beside others, one that is resumed may give nothing more: a new consumer reads it
                consumer.pause(*full)
                records = consumer.poll(timeout_ms=500)
                for place, batch in records.items():
                    for record in batch:
                        self._hear(record, heard[place.partition])
                if not again and time.monotonic() - tried >= _RETRY_SECONDS:
                    again = self._waiting(*self._gone, *heard.values())
                    tried = time.monotonic()
                # One that fails may have taken its time: what has come meanwhile is heard before the next is tried.
                while again and self._hear(*again.pop(0)):
                    tried = time.monotonic()
                polls += 1
                if not records and polls % 10 == 0 and self._look() != (incarnation, partitions):
                    return  # the topic was made again, or has grown

    def _begin(self, incarnation: str, partitions: list[int]) -> dict[int, Heard]:
        """What has been heard of each partition. What waits of a topic that is gone is kept for as long as this process
        lives, and tried; where that was another process, it is lost, and told of."""
        heard = {number: Heard(self._ledger, incarnation, number) for number in partitions}
        left = [each for each in self._heard.values() if each.incarnation != incarnation and each.waiting]
        for each in left:
            log.error(
                "%s was made again: the requests at offsets %s wait in this process only, until it ends",
                self._topic,
                list(each.waiting),
                extra={"incarnation": each.incarnation, "partition": each.partition},
            )
        self._gone, self._heard = [each for each in self._gone if each.waiting] + left, heard
        for again in self._waiting(*self._gone):
            self._hear(*again)
        if partitions:
            tell_lost(self._ledger, incarnation, {(each.incarnation, each.partition) for each in self._gone})
        for each in self._heard.values():  # whoever came before may have been killed before it did
            self._remove_purged(each)
        return self._heard

    def _waiting(self, *heard: Heard) -> list[tuple[Any, Heard]]:
        return [(record, each) for each in heard for record in each.waiting.values()]

    def _hear(self, record: Any, heard: Heard) -> bool:
        """Carry out a record, or let it wait; whether it is done."""
        if heard.is_done(record.offset):
            return True
        waited, met = heard.waits(record.offset), record.offset in heard.waiting
        done = self._try(record, heard)
        if done or not met:
            heard.note(record, done)
        if done and waited and not heard.waiting:
            self._remove_purged(heard)
        return done

    def _try(self, record: Any, heard: Heard) -> bool:
        place = heard.incarnation, record.partition, record.offset
        try:
            if self._must_wait(record, heard):
                return False
            self._act(record, heard.incarnation, alone=not any(offset < record.offset for offset in heard.waiting))
        except Exception as error:  # whatever it is, requests of others are not to wait for it
            if time.monotonic() >= self._told.get(place, 0.0):
                self._told[place] = time.monotonic() + _TELL_SECONDS
                usual = isinstance(error, (RiverdeltaError, OSError)) and not isinstance(error, Corrupt)
                log.log(
                    logging.WARNING if usual else logging.ERROR,
                    "a control message waits, and is tried again: %s",
                    error,
                    exc_info=not isinstance(error, (RiverdeltaError, OSError)),
                    extra={"topic": record.topic, "partition": record.partition, "offset": record.offset},
                )
            return False
        self._told.pop(place, None)
        return True

    def _must_wait(self, record: Any, heard: Heard) -> bool:
        """Whether an earlier request waits that it must not overtake."""
        earlier = [held for offset, held in heard.waiting.items() if offset < record.offset]
        if heard not in self._gone:
            earlier += [held for held, _ in self._waiting(*self._gone)]
        if not earlier:
            return False
        try:
            message = Message.read(record.value)
        except BadInput:
            return False
        return any(message.follows(Message.read(held.value)) for held in earlier)

    def _remove_purged(self, heard: Heard) -> None:
        """Remove from Kafka what was purged while a request before it waited, and would have gone with it."""
        asked = [held.body.get("asked", {}) for held in self._ledger.forgets() if held.stage is Stage.PURGED]
        where = {"incarnation": heard.incarnation, "partition": heard.partition}
        mine = [each for each in asked if where.items() <= each.items() and each["offset"] < heard.first]
        if mine:
            delete_request(self._settings, max(mine, key=lambda each: int(each["offset"])))

    def _look(self) -> tuple[str, list[int]]:
        """The topic's incarnation and partitions; none when it does not exist."""
        from kafka import KafkaAdminClient

        with contextlib.closing(KafkaAdminClient(**self._settings.kafka.for_kafka_python())) as admin:
            try:
                topic = described(admin, self._topic)
            except ValueError as error:
                raise Unavailable(f"Kafka does not show {self._topic}: {error}.", "May it be read?") from error
        if topic is None:
            return "", []
        return f"{topic['topic_id']}", sorted(part["partition_index"] for part in topic["partitions"])

    def _act(self, record: Any, incarnation: str, alone: bool = True) -> None:
        """Carry out one record; what can never be carried out, whatever comes, is logged and passed over. `alone`: none
        before it waits."""
        where = {"topic": record.topic, "incarnation": incarnation, "partition": record.partition}
        where |= {"offset": record.offset, "sent_at": _sent_at(record)}
        try:
            message = Message.read(record.value)
            # An id that names the subject would keep it: such a request acts once too, under a hash of its id.
            request = message.id
            if names(request, message.subject):
                request = subject_key(self._ledger, self._settings).request(request)
            adapters = None if message.all_adapters else [message.adapter]
            about = message.subject, adapters, message.reason, request
            if message.action == "forget":
                begun = self._forget(about, message.serve_until_rebuilt, where)
                if alone and begun.stage is Stage.PURGED:  # asked for again: nobody else removes this message
                    delete_request(self._settings, where)
            else:
                self._acts.allow(*about, where)
            log.info("%s by message", message.action, extra={"request": request, **where})
        except (BadInput, Conflict) as error:
            log.error("control message passed over: %s", error, extra=where)

    def _forget(self, about: tuple[str, list[str] | None, str, str], until: float, where: dict[str, Any]) -> Forget:
        """Fence off what a message asks for. An id that somebody has used for another forget keeps nobody's from being
        carried out: it is, under an id of its place on the topic."""
        try:
            begun = self._acts.fence(*about, until, where)
        except Conflict:
            place = f"{where['incarnation']}/{where['partition']}/{where['offset']}"
            begun = self._acts.fence(*about[:3], place, until, where)
            log.warning("the id was another forget's", extra={"request": place, **where})
        if missing := [name for name, epoch in begun.adapters.items() if not epoch]:
            log.warning("there is no adapter %s yet: it will begin without the subject", *missing, extra=where)
        return begun


def _sent_at(record: Any) -> str:
    """When a record was sent, by Kafka's timestamp; "" where it has none. Never later than now: nothing could be asked
    for after it."""
    return of_epoch(min(record.timestamp / 1000, time.time())) if record.timestamp > 0 else ""
