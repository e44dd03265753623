"""The control topic: forget and allow by message, for those whom the cluster lets write there.

Messages are JSON: {"id", "action": "forget" | "allow", "subject", "adapter" or "all_adapters": true, "reason"}, and for
a forget "serve_until_rebuilt". An id acts once. Nobody waits for an answer: a forget of an adapter that the dataflow is
still to make is kept for then. An offset is recorded once its act is durable, so that a crash repeats a message and
never skips one.
"""

import contextlib
import logging
import re
import threading
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from riverdelta.core.errors import BadInput, Conflict, Corrupt, RiverdeltaError
from riverdelta.core.names import ADAPTER
from riverdelta.core.settings import Settings

from .belonging import KeptOpen, subject_key
from .kafka_delete import delete_request
from .ledger import Ledger, Stage
from .operations import LONGEST_SECONDS, Operations, names
from .wakeups import Wakeups

log = logging.getLogger(__name__)
_RETRY_SECONDS = 2.0
_BUCKET = -1  # of the ledger's reading positions: the dataflow's buckets count from 0
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
        if message.adapter and not ADAPTER.fullmatch(message.adapter):
            raise BadInput("The request's adapter is no adapter's name.", "See docs/forgetting.md.")
        if message.serve_until_rebuilt and message.action != "forget":
            raise BadInput("Only a forget has a serve_until_rebuilt.", "See docs/forgetting.md.")
        return message


class Control:
    """Reads the control topic and acts, until told to stop."""

    def __init__(self, ledger: Ledger, settings: Settings, wakeups: Wakeups, stop: threading.Event) -> None:
        self._ledger = ledger
        self._settings = settings
        self._stop = stop
        self._topic = settings.topics.control
        self._keys = KeptOpen(settings)
        self._acts = Operations(ledger, settings, "control", wakeups, self._keys)

    def run(self) -> None:
        """Follow the topic. What cannot be done now (broker or ledger away, another subject key) is tried again, in
        order."""
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
        if not partitions:
            return
        held = self._ledger.positions(incarnation)
        options = {**self._settings.kafka.for_kafka_python(), "enable_auto_commit": False}
        with contextlib.closing(KafkaConsumer(**options, auto_offset_reset="earliest")) as consumer:
            assigned = [TopicPartition(self._topic, number) for number in partitions]
            consumer.assign(assigned)
            for place in assigned:
                consumer.seek(place, held.get((place.partition, _BUCKET), 0))
            polls = 0
            while not self._stop.is_set():
                records = consumer.poll(timeout_ms=500)
                for place, batch in records.items():
                    for record in batch:
                        self._act(record, incarnation)
                        self._ledger.move_positions({(incarnation, place.partition, _BUCKET): record.offset + 1})
                polls += 1
                if not records and polls % 10 == 0 and self._look() != (incarnation, partitions):
                    return  # the topic was made again, or has grown

    def _look(self) -> tuple[str, list[int]]:
        """The topic's incarnation and partitions; none when it does not exist."""
        from kafka import KafkaAdminClient

        with contextlib.closing(KafkaAdminClient(**self._settings.kafka.for_kafka_python())) as admin:
            [topic] = admin.describe_topics([self._topic])
        numbers = sorted(part["partition_index"] for part in topic["partitions"])
        return f"{topic['topic_id']}", [] if topic["error_code"] else numbers

    def _act(self, record: Any, incarnation: str) -> None:
        """Carry out one record; what can never be carried out, whatever comes, is logged and passed over."""
        where = {"topic": record.topic, "incarnation": incarnation, "partition": record.partition}
        where["offset"] = record.offset
        try:
            message = Message.read(record.value)
            # An id that names the subject would keep it: such a request acts once too, under a hash of its id.
            request = message.id
            if names(request, message.subject):
                request = subject_key(self._ledger, self._settings).request(request)
            adapters = None if message.all_adapters else [message.adapter]
            about = message.subject, adapters, message.reason, request
            if message.action == "forget":
                self._forget(about, message.serve_until_rebuilt, where)
            else:
                self._acts.allow(*about)
            log.info("%s by message", message.action, extra={"request": request, **where})
        except (BadInput, Conflict) as error:
            log.error("control message passed over: %s", error, extra=where)

    def _forget(self, about: tuple[str, list[str] | None, str, str], until: float, where: dict[str, Any]) -> None:
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
        if begun.stage is Stage.PURGED:  # asked for again: nobody else removes this message
            delete_request(self._settings, where)
