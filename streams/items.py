"""What flows between the steps of the dataflow: items, dead letters, and parcels of them for one bucket."""

import zlib
from collections.abc import Callable, Mapping

from msgspec import Struct, msgpack

Where = tuple[str, int]  # (topic incarnation, partition)
Headers = tuple[tuple[str, bytes | None], ...]

EXAMPLE, INTERACTION, FEEDBACK = "example", "interaction", "feedback"


class Raw(Struct, frozen=True, array_like=True, gc=False):
    """A Kafka record as it came, for dead-lettering."""

    key: bytes | None
    value: bytes | None
    headers: Headers


class Item(Struct, frozen=True, array_like=True, gc=False):
    """One valid event, its names hashed.

    `event` is the keyed hash that a duplicate is known by: of the producer's source and id (empty: it gave none), or
    for feedback of the response and what it says of it (empty: nothing to learn). `response` is the one by which an
    interaction and its feedback meet, `digest` the weights that wrote an interaction. `content` is what the entry
    would say, or this event's share of it; None once its subject is forgotten. `logged` is Kafka's timestamp in
    seconds. `raw` is there for whoever may have to dead-letter the event.
    """

    kind: str
    adapter: str
    where: Where
    offset: int
    event: bytes
    subjects: tuple[str, ...]
    content: bytes | None
    raw: Raw | None
    response: bytes = b""
    digest: str = ""
    logged: float = 0.0


class DeadLetter(Struct, frozen=True, array_like=True, gc=False):
    """A record that is no event, or an event that no adapter may take: where it came from and why it is refused."""

    raw: Raw
    where: Where
    offset: int
    reason: str
    message: str


class Parcel(Struct, frozen=True, array_like=True, gc=False):
    """What one read brings one bucket: its items, and for every partition the offset that reading has reached.

    `read` says which read it was: the reader's number and a serial number.
    """

    bucket: int
    read: tuple[int, int]
    reached: Mapping[Where, int]
    items: list[Item]
    dead: list[DeadLetter]

    def __reduce__(self) -> "tuple[Callable[[bytes], Parcel], tuple[bytes]]":
        """Bytewax pickles what goes to another process: as one piece it takes less than half the time."""
        return _unpack, (msgpack.encode(self),)


_parcels = msgpack.Decoder(Parcel)


def _unpack(packed: bytes) -> Parcel:
    return _parcels.decode(packed)


def bucket_of(adapter: str, buckets: int) -> int:
    """The owner of an adapter's state: a hash of its name that is the same in every process and version.

    >>> bucket_of("acme-support", 64)
    6
    """
    return zlib.crc32(adapter.encode()) % buckets
