"""One adapter at one moment: all that the ledger says of it, whoever writes meanwhile."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import sqlalchemy as sa

from . import tables as t
from .journal import Journal
from .records import AdapterRecord, Fact, SegmentRecord, VersionRecord
from .rows import segment_of

_AT_ONCE = 100  # segments, whose manifests are held in memory


@dataclass(frozen=True)
class View:
    """What goes together. `segments` gives each with its packed manifest, once, while the view is open."""

    head: AdapterRecord
    facts: list[Fact]
    versions: dict[int, VersionRecord]
    suppressed: frozenset[str]
    segments: Iterator[tuple[SegmentRecord, bytes]]


class Views(Journal):
    """Reading an adapter as a whole."""

    @contextmanager
    def view(self, adapter: str) -> Iterator[View]:
        """An adapter as it is now; open it for no longer than reading takes."""
        with self.db.read() as c:
            head = self._adapter(c, adapter)
            facts = self._facts(c, adapter)
            versions, suppressed = self._versions(c, adapter), self._suppressed(c, adapter)
            yield View(head, facts, versions, suppressed, _segments(c, adapter))


def _segments(c: sa.Connection, adapter: str) -> Iterator[tuple[SegmentRecord, bytes]]:
    s, last = t.segments.c, 0
    query = sa.select(t.segments).where(s.adapter == adapter).order_by(s.number).limit(_AT_ONCE)
    while rows := c.execute(query.where(s.number > last)).all():
        yield from ((segment_of(row), row.manifest) for row in rows)
        last = rows[-1].number
