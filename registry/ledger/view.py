"""One adapter at one moment: all that the ledger says of it, whoever writes meanwhile."""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import sqlalchemy as sa

from . import tables as t
from .journal import Journal, chunks
from .records import AdapterRecord, Fact, SegmentRecord, Stage, VersionRecord
from .rows import segment_of

_AT_ONCE = 100  # segments, whose manifests are held in memory


@dataclass(frozen=True)
class Asked:
    """A forget procedure, but for what it erases and where: that is long where it is of many. `epoch` is the one that
    it gave the adapter, None where it is of every adapter."""

    subject: str
    stage: Stage
    epoch: int | None
    everywhere: bool


@dataclass(frozen=True)
class View:
    """What goes together. `segments` gives each with its packed manifest, once, and `finds` tells by which of some
    mentions a forget finds a segment, while the view is open. `forgets` are those that the facts tell of."""

    head: AdapterRecord
    facts: list[Fact]
    versions: dict[int, VersionRecord]
    suppressed: frozenset[str]
    forgets: dict[str, Asked]
    segments: Iterator[tuple[SegmentRecord, bytes]]
    finds: Callable[[int, Collection[str]], set[str]]


class Views(Journal):
    """Reading an adapter as a whole."""

    @contextmanager
    def view(self, adapter: str) -> Iterator[View]:
        """An adapter as it is now; open it for no longer than reading takes."""
        with self.db.read() as c:
            head = self._adapter(c, adapter)
            facts = self._facts(c, adapter)
            versions, suppressed = self._versions(c, adapter), self._suppressed(c, adapter)
            forgets = _forgets(c, adapter, {fact.body["request"] for fact in facts if fact.kind == "forget"})
            segments, finds = _segments(c, adapter), partial(_finds, c, adapter)
            yield View(head, facts, versions, suppressed, forgets, segments, finds)


def _forgets(c: sa.Connection, adapter: str, requests: Collection[str]) -> dict[str, Asked]:
    f = t.forgets.c
    epoch = sa.case((f.everywhere, None), else_=f.adapters[adapter].as_integer())
    columns = (f.id, f.subject, f.stage, epoch.label("epoch"), f.everywhere)
    return {
        row.id: Asked(row.subject, Stage(row.stage), row.epoch, row.everywhere)
        for chunk in chunks(sorted(requests))
        for row in c.execute(sa.select(*columns).where(f.id.in_(chunk)))
    }


def _finds(c: sa.Connection, adapter: str, segment: int, mentions: Collection[str]) -> set[str]:
    m = t.mentions.c
    return {
        mention
        for chunk in chunks(sorted(mentions))
        for mention in c.execute(
            sa.select(m.mention).where(m.mention.in_(chunk), m.adapter == adapter, m.segment == segment)
        ).scalars()
    }


def _segments(c: sa.Connection, adapter: str) -> Iterator[tuple[SegmentRecord, bytes]]:
    s, last = t.segments.c, 0
    query = sa.select(t.segments).where(s.adapter == adapter).order_by(s.number).limit(_AT_ONCE)
    while rows := c.execute(query.where(s.number > last)).all():
        yield from ((segment_of(row), row.manifest) for row in rows)
        last = rows[-1].number
