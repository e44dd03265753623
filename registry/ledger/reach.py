"""Reach: what has learned from a subject, by whichever adapter the subject came in.

What one adapter has learned comes to others as a copy of its weights, imported under the same digest, and as text that
it wrote. So it is looked for over all adapters, even where a forget names few.
"""

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType

import sqlalchemy as sa

from riverdelta.core.errors import Corrupt

from . import decisions
from . import tables as t
from .journal import EVERYWHERE, Journal, chunks
from .past import Past, Reach, inherited
from .records import Ends, Manifest, Place, VersionRecord, Where, is_before
from .rows import adapter_of, version_of

Places = Iterable[tuple[str, int]]
Texts = Mapping[str, Collection[Place]]  # by who wrote them: where their events lie


class Reaching(Journal):
    """Following what was learned from adapter to adapter."""

    def tainted(self, adapter: str, digests: Collection[str], subjects: Collection[str] = ()) -> frozenset[str]:
        """Those of these weights whose text an adapter must not learn, although they may be in use elsewhere: they saw
        a subject that is suppressed in this adapter alone, or one of these `subjects`."""
        with self.db.read() as c:
            return frozenset(self._tainted(c, adapter, digests, subjects))

    def _tainted(
        self, c: sa.Connection, adapter: str, digests: Collection[str], subjects: Collection[str] = ()
    ) -> set[str]:
        foreign = self._foreign(c, adapter, digests)
        s = t.suppressions.c
        suppressed = c.execute(sa.select(s.subject).where(s.adapter == adapter)).scalars() if foreign else ()
        return self._knowing(c, foreign, [{*suppressed, *subjects}])[0]

    def allowed_from(self, adapter: str, texts: Texts = MappingProxyType({})) -> dict[str, dict[Where, int]]:
        """Per subject that was allowed again, the offsets by (incarnation, partition) from which an adapter may learn
        of it; and per version that wrote such `texts` of others, and saw such a subject, those from which it may learn
        what that one wrote."""
        with self.db.read() as c:
            found = self._allowed_from(c, adapter)
            return found | self._texts_from(c, adapter, texts, found)

    def _allowed_from(self, c: sa.Connection, adapter: str) -> dict[str, dict[Where, int]]:
        found: dict[str, dict[Where, int]] = {}
        key = t.meta.c.key
        mine = sa.or_(*(key.startswith(f"allowed/{name}/", autoescape=True) for name in (adapter, EVERYWHERE)))
        for row in c.execute(sa.select(t.meta).where(mine)):
            held = [((run, partition), end) for run, partition, end in json.loads(row.value)]
            _raise(found.setdefault(row.key.rpartition("/")[2], {}), held)
        return found

    def _texts_from(
        self, c: sa.Connection, adapter: str, texts: Texts, allowed: Mapping[str, Ends] | None = None
    ) -> dict[str, dict[Where, int]]:
        foreign = self._foreign(c, adapter, texts)
        if not foreign:
            return {}
        allowed = self._allowed_from(c, adapter) if allowed is None else allowed
        places = [place for digest in foreign for place in texts[digest]]
        ends = {who: held for who, held in allowed.items() if is_before(places, held)}
        found: dict[str, dict[Where, int]] = {}
        for held, digests in zip(ends.values(), self._knowing(c, foreign, [{who} for who in ends]), strict=True):
            for digest in digests:
                _raise(found.setdefault(digest, {}), held.items())
        return found

    def _foreign(self, c: sa.Connection, adapter: str, digests: Collection[str]) -> set[str]:
        """Those that others have. What is its own saw nobody who was forgotten in it: it would be revoked."""
        v = t.versions.c
        return {
            digest
            for chunk in chunks(sorted(digests))
            for digest in c.execute(sa.select(v.digest).where(v.digest.in_(chunk), v.adapter != adapter)).scalars()
        }

    def _knowing(self, c: sa.Connection, digests: set[str], groups: Sequence[set[str]]) -> list[set[str]]:
        """Of each group of subjects, which of these weights saw any of them."""
        groups = [subjects if digests and self._live(c, subjects) else set() for subjects in groups]
        try:
            past = self._past(c, digests) if any(groups) else Past()
            return [digests & past.knowing(subjects) if subjects else set() for subjects in groups]
        except Corrupt:  # the other way needs no manifest: one that is damaged keeps nobody from sealing
            return [digests & self._reach(c, self._mentioning(c, subjects))[1] for subjects in groups]

    def _past(self, c: sa.Connection, digests: Collection[str]) -> Past:
        """What weights stem from, and back from there."""
        past, v, digests = Past(), t.versions.c, set(digests)
        while digests:
            columns = (v.digest, v.adapter, v.number)
            held = [
                row
                for chunk in chunks(sorted(digests))
                for row in c.execute(sa.select(*columns).where(v.digest.in_(chunk)))
            ]
            past.holders |= {digest: [] for digest in digests}
            self._look_into(c, past.reaches, {name for _, name, _ in held})
            origins, writers, places = set[str](), set[str](), set[tuple[str, int]]()
            for digest, name, number in held:
                past.holders[digest].append((name, number))
                versions = past.reaches[name].versions
                for each in decisions.lineage(versions, number):
                    places |= {(name, segment) for segment in versions[each].saw}
                    if versions[each].segment is None:
                        origins.add(versions[each].digest)
            for place, manifest in self._manifests_of(c, places - past.mentions.keys()):
                past.mentions[place] = manifest.mentions
                writers |= {entry.written_by for entry in manifest.entries}
            digests = (origins | writers) - past.holders.keys() - {""}
        return past

    def _manifests_of(self, c: sa.Connection, places: Places) -> Iterator[tuple[tuple[str, int], Manifest]]:
        """One at a time: there may be very many entries."""
        s, numbers = t.segments.c, dict[str, list[int]]()
        for name, number in sorted(places):
            numbers.setdefault(name, []).append(number)
        for name, of in numbers.items():
            for chunk in chunks(of):
                query = sa.select(s.number, s.manifest).where(s.adapter == name, s.number.in_(chunk))
                for number, packed in c.execute(query):
                    yield (name, number), Manifest.unpack(packed)

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

    def _live(self, c: sa.Connection, mentions: Iterable[str]) -> bool:
        """Whether any live entry mentions one of these."""
        m = t.mentions.c
        return any(
            c.execute(sa.select(sa.exists().where(m.mention.in_(chunk)))).scalar() for chunk in chunks(sorted(mentions))
        )

    def _look_into(self, c: sa.Connection, reaches: dict[str, Reach], names: Collection[str]) -> None:
        for chunk in chunks(sorted(set(names) - reaches.keys())):
            versions: dict[str, dict[int, VersionRecord]] = {name: {} for name in chunk}
            for row in c.execute(sa.select(t.versions).where(t.versions.c.adapter.in_(chunk))):
                versions[row.adapter][row.number] = version_of(row)
            for row in c.execute(sa.select(t.adapters).where(t.adapters.c.name.in_(chunk))):
                reaches[row.name] = Reach(adapter_of(row), versions[row.name])

    def _copies(self, c: sa.Connection, digests: Collection[str], reaches: dict[str, Reach]) -> list[tuple[str, int]]:
        """The imported versions that have one of these digests and are not written off yet. Where a clean version that
        is no copy itself has the very same, they are copies of that."""
        rows = [
            row
            for chunk in chunks(sorted(digests))
            for row in c.execute(sa.select(t.versions).where(t.versions.c.digest.in_(chunk)))
        ]
        held = [
            version_of(row)
            for row in rows
            if row.adapter not in reaches or row.number not in reaches[row.adapter].dirty
        ]
        copied = inherited(held)
        clean = {each.digest for each in held if not each.revoked and (each.adapter, each.number) not in copied}
        return [(each.adapter, each.number) for each in held if each.segment is None and each.digest not in clean]

    def _mentioning(self, c: sa.Connection, mentions: Iterable[str]) -> list[tuple[str, int]]:
        m = t.mentions.c
        return [
            (name, segment)
            for chunk in chunks(sorted(mentions))
            for name, segment in c.execute(sa.select(m.adapter, m.segment).where(m.mention.in_(chunk)))
        ]


def _raise(ends: dict[Where, int], to: Iterable[Place]) -> None:
    for where, end in to:
        ends[where] = max(end, ends.get(where, 0))
