"""Intake: Kafka records become items and dead letters, sorted into one parcel per bucket."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from riverdelta.core.events import ContractError, Event, Example, Feedback, Interaction, content_of, decode
from riverdelta.core.keys import SubjectKey

from .items import EXAMPLE, DeadLetter, Headers, Item, Parcel, Raw, Where, bucket_of

# One Kafka record: partition, offset, timestamp in milliseconds, key, value, headers.
Record = tuple[int, int, int, bytes | None, bytes | None, Headers]


class Read(NamedTuple):
    """Records of one topic incarnation, and for each partition the offset that reading has reached with them."""

    number: tuple[int, int]
    run: str
    records: Sequence[Record]
    reached: Mapping[Where, int]


class Intake:
    """Decodes, validates and hashes. Beyond this point a subject exists only as a keyed hash."""

    def __init__(self, key: SubjectKey, buckets: int) -> None:
        self._key = key
        self._buckets = buckets
        self._owners: dict[str, int] = {}

    def sort_all(self, reads: list[Read]) -> list[tuple[str, Parcel]]:
        """The parcels of several reads."""
        return [parcel for read in reads for parcel in self.sort(read)]

    def sort(self, read: Read) -> list[tuple[str, Parcel]]:
        """A parcel for every bucket, empty ones too, so that each knows how far every partition has been read."""
        run = read.run
        parcels = [Parcel(number, read.number, read.reached, [], []) for number in range(self._buckets)]
        wheres: dict[int, Where] = {}
        owners, owner, item = self._owners, self._owner, self.item
        for partition, offset, timestamp, key, value, headers in read.records:
            where = wheres.get(partition) or wheres.setdefault(partition, (run, partition))
            raw = Raw(key, value, headers)
            try:
                event = decode(value, headers)
            except ContractError as error:
                letter = DeadLetter(raw, where, offset, error.reason, error.message)
                parcels[partition % self._buckets].dead.append(letter)
            else:
                name = event.record.adapter
                bucket = owners.get(name)
                parcels[owner(name) if bucket is None else bucket].items.append(
                    item(event, where, offset, timestamp, raw)
                )
        return [(str(parcel.bucket), parcel) for parcel in parcels]

    def item(self, event: Event, where: Where, offset: int, timestamp: int, raw: Raw) -> Item:
        """An event with its names hashed."""
        record = event.record
        key, names = self._key, event.subjects
        subjects = (key.subject(names[0]),) if len(names) == 1 else tuple(sorted(map(key.subject, names)))
        content = content_of(record)
        if isinstance(record, Example):  # nearly all of them
            identity = key.event(record.source, record.id) if record.id else b""
            logged = timestamp / 1000
            return Item(EXAMPLE, record.adapter, where, offset, identity, subjects, content, raw, b"", "", logged)
        response = key.event("\0response", record.response)
        identity = self._lesson(record) if isinstance(record, Feedback) else b""
        digest = record.digest if isinstance(record, Interaction) else ""
        return Item(
            event.kind,
            event.adapter,
            where,
            offset,
            identity,
            subjects,
            content,
            raw,
            response,
            digest,
            timestamp / 1000,
        )

    def _lesson(self, feedback: Feedback) -> bytes:
        """What feedback teaches of a response, once each; nothing when it is neither a correction nor approval."""
        if isinstance(feedback.correction, str):
            return self._key.event("\0correction", feedback.response)
        if isinstance(feedback.rating, float) and feedback.rating > 0:
            return self._key.event("\0rating", feedback.response)
        return b""

    def _owner(self, adapter: str) -> int:
        owner = self._owners.get(adapter)
        if owner is None:
            if len(self._owners) >= 100_000:  # names come from outside
                self._owners.clear()
            owner = self._owners[adapter] = bucket_of(adapter, self._buckets)
        return owner
