"""How far a partition of the control topic has been heard.

A request that cannot be carried out yet waits, and those behind it are heard all the same. The recorded offset stays
before the first that waits: whoever comes after a crash reads it again. That those behind it are done is recorded too:
one of them that was refused, or found nothing to do, must not act on what was asked for since.
"""

import logging
from collections.abc import Collection
from typing import Any

from riverdelta.core.times import now

from .ledger import Ledger

log = logging.getLogger(__name__)


class Heard:
    """One partition's requests: which are done, and the records of those that `waiting` holds by offset, in order."""

    def __init__(self, ledger: Ledger, incarnation: str, partition: int) -> None:
        self.incarnation = incarnation
        self.partition = partition
        self.waiting: dict[int, Any] = {}
        self._ledger = ledger
        self._next, unread = ledger.heard(incarnation, partition)
        self._unread = set(unread)  # they wait, and lie in Kafka: this process has not met them yet

    @property
    def first(self) -> int:
        """The offset to read from."""
        return min((self._next, *self.waiting, *self._unread))

    def is_done(self, offset: int) -> bool:
        """Whether a request was carried out, or passed over for good."""
        return offset < self._next and offset not in self._unread and offset not in self.waiting

    def waits(self, offset: int) -> bool:
        """Whether a request waits, since this process has met it or since an earlier one has."""
        return offset in self.waiting or offset in self._unread

    def note(self, record: Any, done: bool) -> None:
        """Record, durably, that a request is done or waits."""
        if gone := sorted(offset for offset in self._unread if offset < record.offset):
            log.error("Kafka holds the requests at offsets %s no more, which waited to be carried out", gone)
        self._unread = {offset for offset in self._unread if offset > record.offset}
        self._next = max(self._next, record.offset + 1)
        if done:
            self.waiting.pop(record.offset, None)
        else:
            self.waiting[record.offset] = record
        self._ledger.record_heard(self.incarnation, self.partition, self._next, [*self.waiting, *sorted(self._unread)])


def tell_lost(ledger: Ledger, incarnation: str, known: Collection[tuple[str, int]]) -> None:
    """Tell, once, of requests that waited on a topic that has been made again since, but for those of the `known`
    (incarnation, partition)."""
    for (run, partition), waiting in ledger.waiting_requests().items():
        told = f"lost/{run}/{partition}"
        if run != incarnation and (run, partition) not in known and ledger.recall(told) is None:
            log.error(
                "The control topic was made again: the requests at offsets %s, which waited, are lost",
                waiting,
                extra={"incarnation": run, "partition": partition},
            )
            ledger.remember(told, now())
