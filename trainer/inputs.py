"""What increments are made from, read from ledger and store: a segment's entries, the earlier log, a parent's files."""

from bisect import bisect_right
from collections.abc import Sequence
from typing import overload

from riverdelta.core.digests import sha256
from riverdelta.core.errors import Corrupt
from riverdelta.core.recipe import Recipe
from riverdelta.core.shards import shard_of
from riverdelta.core.store import ObjectStore, state_key, weights_key
from riverdelta.registry import contents
from riverdelta.registry.keystore import KeyStore
from riverdelta.registry.ledger import Ledger, SegmentRecord, VersionRecord, Work
from riverdelta.registry.ledger.decisions import lineage

from .near_duplicates import without_near_duplicates

# So many segments' contents are kept while the inputs of several shards are read.
_HELD_SEGMENTS = 256


class Log:
    """One adapter's entries, as a whole and shard by shard."""

    def __init__(self, ledger: Ledger, store: ObjectStore, keys: KeyStore, recipe: Recipe) -> None:
        self.count, self._horizon = recipe.shards.count, recipe.retain.horizon
        self._ledger, self._store, self._keys, self._alike = ledger, store, keys, recipe.curate.alike
        self._held: dict[int, list[bytes | None]] = {}
        self._shared: dict[int, list[list[int]]] = {}
        self._masked: dict[int, int] = {}

    def since(self, segment: SegmentRecord) -> int:
        """The first segment that an increment of this one may still look at."""
        return segment.number - self._horizon if self._horizon else 0

    def places(self, segment: SegmentRecord, shard: int | None) -> Sequence[int]:
        """Where in a segment a shard's entries are; all places for None."""
        if shard is None or self.count == 1:
            return range(segment.count)
        found = self._shared.get(segment.number)
        if found is None:
            found = self._shared[segment.number] = [[] for _ in range(self.count)]
            for place, entry in enumerate(self._ledger.manifest(segment.adapter, segment.number).entries):
                found[shard_of(entry.subjects, segment.first + place, self.count)].append(place)
        return found[shard]

    def live(self, segment: SegmentRecord, shard: int) -> list[bool]:
        """Which of a shard's entries in a segment are not tombstones."""
        entries = self._ledger.manifest(segment.adapter, segment.number).entries
        return [not entries[place].tombstone for place in self.places(segment, shard)]

    def said(self, segment: SegmentRecord, shard: int | None = None) -> list[bytes | None]:
        """The contents of a shard's entries, None for tombstones and for a subject's near-duplicates."""
        said = self._read(segment)
        return [said[place] for place in self.places(segment, shard)]

    def masked(self, segment: SegmentRecord) -> int:
        """How many of a segment's entries are a subject's near-duplicates, and teach nothing."""
        if self._alike:
            self._read(segment)
        return self._masked.get(segment.number, 0)

    def _read(self, segment: SegmentRecord) -> list[bytes | None]:
        if segment.number not in self._held:
            while len(self._held) >= (_HELD_SEGMENTS if self.count > 1 else 1):
                del self._held[next(iter(self._held))]
            self._held[segment.number] = self._read_now(segment)
        return self._held[segment.number]

    def _read_now(self, segment: SegmentRecord) -> list[bytes | None]:
        live = contents.read(self._ledger, self._store, self._keys, segment)
        if not self._alike:
            return live
        # Only what is about the very same subjects is compared, and that belongs to one shard.
        subjects = [entry.subjects for entry in self._ledger.manifest(segment.adapter, segment.number).entries]
        kept = without_near_duplicates(live, subjects, self._alike)
        self._masked[segment.number] = kept.count(None) - live.count(None)
        return kept


class Earlier(Sequence[bytes | None]):
    """A shard's entries (None: all) in segments that were learned, in that order, each read when asked for.

    `used` names the segments of which a live entry was handed out.
    """

    def __init__(self, log: Log, segments: Sequence[SegmentRecord], shard: int | None = None) -> None:
        self._log, self._segments, self._shard = log, segments, shard
        self._ends = [0]
        for segment in segments:
            self._ends.append(self._ends[-1] + len(log.places(segment, shard)))
        self.used: set[int] = set()

    def __len__(self) -> int:
        return self._ends[-1]

    @overload
    def __getitem__(self, slot: int) -> bytes | None: ...
    @overload
    def __getitem__(self, slot: slice) -> "Sequence[bytes | None]": ...
    def __getitem__(self, slot: int | slice) -> "bytes | Sequence[bytes | None] | None":
        if isinstance(slot, slice):
            return [self[place] for place in range(*slot.indices(len(self)))]
        if not 0 <= slot < len(self):
            raise IndexError(slot)
        which = bisect_right(self._ends, slot) - 1
        content = self._log.said(self._segments[which], self._shard)[slot - self._ends[which]]
        if content is not None:
            self.used.add(self._segments[which].number)
        return content


def line_of(ledger: Ledger, work: Work) -> list[VersionRecord]:
    """The versions that the work builds on, oldest first."""
    if work.parent is None:
        return []
    versions = ledger.versions(work.adapter.name)
    return [versions[number] for number in reversed(lineage(versions, work.parent.number))]


def learned_by(
    ledger: Ledger, line: Sequence[VersionRecord], since: int, shard: int | None = None
) -> list[SegmentRecord]:
    """The segments that a line, or one shard in it, has learned, in that order, from the number `since` on."""
    return [
        ledger.segment(version.adapter, version.segment)
        for place, version in enumerate(line)
        if version.segment is not None
        and version.segment >= since
        and (shard is None or version.parts[shard].key != (line[place - 1].parts[shard].key if place else ""))
    ]


def files_of(store: ObjectStore, version: VersionRecord) -> tuple[bytes, bytes | None]:
    """A version's weights and optimiser state; `NotFound` or `Corrupt` where the store does not hold them."""
    weights = _checked(store.get(weights_key(version.digest)), version.digest)
    return weights, _checked(store.get(state_key(version.state)), version.state) if version.state else None


def _checked(data: bytes, digest: str) -> bytes:
    if sha256(data) != digest:
        raise Corrupt(f"What the store holds as {digest[:12]} is something else.", "Restore it from a backup.")
    return data
