"""Past: what weights may have learned from, decided without I/O from the versions that have them and stem from them."""

from collections.abc import Collection
from dataclasses import dataclass, field

from . import decisions
from .decisions import Versions
from .records import AdapterRecord


@dataclass
class Reach:
    """How far it goes in one adapter: the segments that hold live entries of it, the imported versions that are copies
    of what saw such, and the versions that saw either."""

    head: AdapterRecord
    versions: Versions
    touched: set[int] = field(default_factory=set)
    copies: set[int] = field(default_factory=set)
    dirty: set[int] = field(default_factory=set)


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
        copies = {
            (name, number)
            for digest, held in self.holders.items()
            if self._saw(digest) and not self._held_clean(digest, trained=True)
            for name, number in held
            if self.reaches[name].versions[number].segment is None and number not in self.reaches[name].dirty
        }
        for name, number in copies:
            self.reaches[name].copies.add(number)
        return bool(copies)

    def _saw(self, digest: str) -> bool:
        return any(number in self.reaches[name].dirty for name, number in self.holders[digest])

    def _held_clean(self, digest: str, trained: bool = False) -> bool:
        """Whether a clean version has it (one that was `trained` here)."""
        clean = [(name, number) for name, number in self.holders[digest] if number not in self.reaches[name].dirty]
        versions = [self.reaches[name].versions[number] for name, number in clean]
        return any(not version.revoked and (version.segment is not None or not trained) for version in versions)
