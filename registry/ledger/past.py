"""Past: what weights may have learned from, decided without I/O from the versions that have them and stem from them."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from . import decisions
from .decisions import Versions
from .records import AdapterRecord, VersionRecord


@dataclass
class Reach:
    """How far it goes in one adapter: the segments that hold live entries of it, the imported versions that are copies
    of what saw such, and the versions that saw either."""

    head: AdapterRecord
    versions: Versions
    touched: set[int] = field(default_factory=set)
    copies: set[int] = field(default_factory=set)
    dirty: set[int] = field(default_factory=set)


def inherited(versions: Iterable[VersionRecord]) -> set[tuple[str, int]]:
    """Those of all versions that have some weights, by adapter and number, that were imported, or follow an import and
    learned nothing: training is no proof that an adapter came to its weights by itself."""
    found = set[tuple[str, int, str]]()
    for version in sorted(versions, key=lambda each: each.number):  # a parent's number is lower than its child's
        if version.segment is None or (version.adapter, version.parent, version.digest) in found:
            found.add((version.adapter, version.number, version.digest))
    return {(adapter, number) for adapter, number, _ in found}


@dataclass
class Past:
    """All that weights may have learned from: the versions that have these digests, or ones that stem from them by copy
    or text; those versions' adapters; and what live entries mention in the segments that they saw."""

    holders: dict[str, list[tuple[str, int]]] = field(default_factory=dict)
    reaches: dict[str, Reach] = field(default_factory=dict)
    mentions: dict[tuple[str, int], set[str]] = field(default_factory=dict)

    def knowing(self, subjects: Collection[str]) -> set[str]:
        """Those of the digests that only versions have that saw one of these subjects, or revoked ones: to the fixed
        point of `Reaching._reach` from all that mentions them."""
        writers = set[str]()
        for reach in self.reaches.values():
            reach.touched, reach.copies = set(), set()
        while True:
            known = writers.union(subjects)
            for (name, number), mentioned in self.mentions.items():
                if not known.isdisjoint(mentioned):
                    self.reaches[name].touched.add(number)
            while self._copy():
                pass
            found = {digest for digest in self.holders if self._saw(digest) and not self._held_clean(digest)}
            if found == writers:
                return writers
            writers = found

    def _copy(self) -> bool:
        """Go on to the copies of what is dirty; whether there were more."""
        for reach in self.reaches.values():
            reach.dirty = decisions.dirty_versions(reach.versions, reach.touched, reach.copies)
        more = [
            version
            for digest in self.holders
            if self._saw(digest) and not self._held_clean(digest, but=inherited(self._versions(digest)))
            for version in self._versions(digest)
            if version.segment is None and version.number not in self.reaches[version.adapter].dirty
        ]
        for version in more:
            self.reaches[version.adapter].copies.add(version.number)
        return bool(more)

    def _versions(self, digest: str) -> list[VersionRecord]:
        return [self.reaches[name].versions[number] for name, number in self.holders[digest]]

    def _saw(self, digest: str) -> bool:
        return any(number in self.reaches[name].dirty for name, number in self.holders[digest])

    def _held_clean(self, digest: str, but: Collection[tuple[str, int]] = ()) -> bool:
        """Whether a clean version has it (another than these)."""
        return any(
            not version.revoked
            and version.number not in self.reaches[version.adapter].dirty
            and (version.adapter, version.number) not in but
            for version in self._versions(digest)
        )
