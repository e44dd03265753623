"""Reach: what has learned from a subject, by whichever adapter the subject came in.

What one adapter has learned comes to others as a copy of its weights, imported under the same digest, and as text that
it wrote. So it is looked for over all adapters, even where a forget names few.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

import sqlalchemy as sa

from . import decisions
from . import tables as t
from .decisions import Versions
from .journal import Journal, chunks
from .records import AdapterRecord, VersionRecord
from .rows import adapter_of, version_of

Places = Iterable[tuple[str, int]]


@dataclass
class Reach:
    """How far it goes in one adapter: the segments that hold live entries of it, the imported versions that are copies
    of what saw such, and the versions that saw either."""

    head: AdapterRecord
    versions: Versions
    touched: set[int] = field(default_factory=set)
    copies: set[int] = field(default_factory=set)
    dirty: set[int] = field(default_factory=set)


class Reaching(Journal):
    """Following what was learned from adapter to adapter."""

    def tainted(self, adapter: str, digests: Collection[str]) -> frozenset[str]:
        """Those of these weights whose text an adapter must not learn, although they may be in use elsewhere: they saw
        a subject that is suppressed in this adapter alone."""
        with self.db.read() as c:
            return frozenset(self._tainted(c, adapter, digests))

    def _tainted(self, c: sa.Connection, adapter: str, digests: Collection[str]) -> set[str]:
        v, s = t.versions.c, t.suppressions.c
        foreign = {  # what is its own saw nobody who is suppressed: it would be revoked
            digest
            for chunk in chunks(sorted(digests))
            for digest in c.execute(sa.select(v.digest).where(v.digest.in_(chunk), v.adapter != adapter)).scalars()
        }
        if not foreign:
            return set()
        suppressed = set(c.execute(sa.select(s.subject).where(s.adapter == adapter)).scalars())
        return foreign & self._reach(c, self._mentioning(c, suppressed))[1]

    def _reach(self, c: sa.Connection, segments: Places, copies: Places = ()) -> tuple[dict[str, Reach], set[str]]:
        """From segments and imported versions, by adapter, to a fixed point: what saw them, copies of that, and text
        that it wrote; with the digests that only such versions have, or revoked ones."""
        reaches: dict[str, Reach] = {}
        segments, copies = list(segments), list(copies)
        while True:
            self._look_into(c, reaches, {name for name, _ in (*segments, *copies)})
            for name, number in segments:
                reaches[name].touched.add(number)
            for name, number in copies:
                reaches[name].copies.add(number)
            for reach in reaches.values():
                reach.dirty = decisions.dirty_versions(reach.versions, reach.touched, reach.copies)
            digests = {reach.versions[v].digest for reach in reaches.values() for v in reach.dirty}
            segments, copies = [], self._copies(c, digests, reaches)
            if copies:
                continue
            writers = self._only_revoked(c, digests, {name: reach.dirty for name, reach in reaches.items()})
            found = self._mentioning(c, writers)
            segments = [(name, n) for name, n in found if name not in reaches or n not in reaches[name].touched]
            if not segments:
                return reaches, writers

    def _look_into(self, c: sa.Connection, reaches: dict[str, Reach], names: Collection[str]) -> None:
        for chunk in chunks(sorted(set(names) - reaches.keys())):
            versions: dict[str, dict[int, VersionRecord]] = {name: {} for name in chunk}
            for row in c.execute(sa.select(t.versions).where(t.versions.c.adapter.in_(chunk))):
                versions[row.adapter][row.number] = version_of(row)
            for row in c.execute(sa.select(t.adapters).where(t.adapters.c.name.in_(chunk))):
                reaches[row.name] = Reach(adapter_of(row), versions[row.name])

    def _copies(self, c: sa.Connection, digests: Collection[str], reaches: dict[str, Reach]) -> list[tuple[str, int]]:
        """The imported versions that have one of these digests and are not written off yet. Where a clean version was
        trained to the very same, they are copies of that."""
        v = t.versions.c
        columns = (v.adapter, v.number, v.digest, v.segment, v.revoked)
        held = [
            row
            for chunk in chunks(sorted(digests))
            for row in c.execute(sa.select(*columns).where(v.digest.in_(chunk)))
            if row.adapter not in reaches or row.number not in reaches[row.adapter].dirty
        ]
        clean = {row.digest for row in held if row.segment is not None and not row.revoked}
        return [(row.adapter, row.number) for row in held if row.segment is None and row.digest not in clean]

    def _mentioning(self, c: sa.Connection, mentions: Iterable[str]) -> list[tuple[str, int]]:
        m = t.mentions.c
        return [
            (name, segment)
            for chunk in chunks(sorted(mentions))
            for name, segment in c.execute(sa.select(m.adapter, m.segment).where(m.mention.in_(chunk)))
        ]
