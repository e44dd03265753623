"""What an increment is made from, read from ledger and store: the segment, the earlier log, the parent's files."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

from riverdelta.core.digests import sha256
from riverdelta.core.errors import Corrupt
from riverdelta.core.recipe import Recipe
from riverdelta.core.store import ObjectStore, state_key, weights_key
from riverdelta.registry import contents
from riverdelta.registry.keystore import KeyStore
from riverdelta.registry.ledger import Ledger, SegmentRecord, Work
from riverdelta.registry.ledger.decisions import lineage

from .gate import usual_of
from .near import without_near_duplicates


@dataclass(frozen=True)
class Inputs:
    """Contents in index order, None for tombstones, how surprising the lineage's segments were, and the parent's files,
    None for what it does not have."""

    entries: list[bytes | None]
    earlier: "Earlier"
    usual: list[float]
    weights: bytes | None
    state: bytes | None


class Earlier(Sequence[bytes | None]):
    """The entries of the segments that a version and its ancestors learned, in that order, each read when asked for.

    `used` names the segments of which a live entry was handed out.
    """

    def __init__(
        self, ledger: Ledger, store: ObjectStore, keys: KeyStore, segments: Sequence[SegmentRecord], alike: float
    ) -> None:
        self._ledger, self._store, self._keys = ledger, store, keys
        self._segments, self._alike = segments, alike
        self._ends = [0]
        for segment in segments:
            self._ends.append(self._ends[-1] + segment.count)
        self._read: tuple[int, list[bytes | None]] = (-1, [])
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
        if self._read[0] != which:
            read = _read(self._ledger, self._store, self._keys, self._segments[which], self._alike)
            self._read = (which, read)
        content = self._read[1][slot - self._ends[which]]
        if content is not None:
            self.used.add(self._segments[which].number)
        return content


def read_inputs(ledger: Ledger, store: ObjectStore, keys: KeyStore, work: Work) -> Inputs:
    """Everything that a piece of work needs; `NotFound` or `Corrupt` where the store does not hold it."""
    parent, name = work.parent, work.adapter.name
    learned: list[SegmentRecord] = []
    usual: list[float] = []
    weights = state = None
    if parent is not None:
        versions = ledger.versions(name)
        line = [versions[number] for number in reversed(lineage(versions, parent.number))]
        numbers = [version.segment for version in line]
        usual = usual_of(version.metrics for version in line)
        learned = [ledger.segment(name, number) for number in numbers if number is not None]
        weights = _checked(store.get(weights_key(parent.digest)), parent.digest)
        if parent.state:
            state = _checked(store.get(state_key(parent.state)), parent.state)
    alike = Recipe.from_dict(work.adapter.recipe).curate.alike
    entries = _read(ledger, store, keys, work.segment, alike)
    return Inputs(entries, Earlier(ledger, store, keys, learned, alike), usual, weights, state)


def _read(
    ledger: Ledger, store: ObjectStore, keys: KeyStore, segment: SegmentRecord, alike: float
) -> list[bytes | None]:
    """A segment's contents, None for tombstones and for a subject's near-duplicates."""
    live = contents.read(ledger, store, keys, segment)
    if not alike:
        return live
    subjects = [entry.subjects for entry in ledger.manifest(segment.adapter, segment.number).entries]
    return without_near_duplicates(live, subjects, alike)


def _checked(data: bytes, digest: str) -> bytes:
    if sha256(data) != digest:
        raise Corrupt(f"What the store holds as {digest[:12]} is something else.", "Restore it from a backup.")
    return data
