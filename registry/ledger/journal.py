"""Inside a ledger transaction: read an adapter's state, and apply a decided change to it with its facts."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, TypeVar

import sqlalchemy as sa

from riverdelta.core.digests import canonical_json, sha256
from riverdelta.core.errors import Conflict, NotFound
from riverdelta.core.times import now

from . import tables as t
from .database import Database
from .decisions import Change
from .records import AdapterRecord, Fact, Manifest, Outcome, SegmentRecord, VersionRecord
from .rows import adapter_of, fact_of, segment_of, version_of

T = TypeVar("T")


EVERYWHERE = "*"
"""In place of an adapter's name: all of them, those to come included."""
_CHUNK = 500  # values in one IN list, rows in one set
_MOVE_SEGMENTS = (
    t.segments.update()
    .where(t.segments.c.adapter == sa.bindparam("adapter_"), t.segments.c.number == sa.bindparam("of"))
    .values(
        outcome=sa.bindparam("to"),
        version=sa.bindparam("by"),
        cause=sa.bindparam("why"),
        note=sa.bindparam("said"),
        hand=sa.bindparam("by_hand"),
        metrics=sa.bindparam("measured"),
    )
)
_MOVE_EPOCHS = (
    t.adapters.update()
    .where(t.adapters.c.name == sa.bindparam("of"))
    .values(epoch=sa.bindparam("to"), head=sa.bindparam("at"))
)


def chunks(values: Sequence[T]) -> Iterator[Sequence[T]]:
    """The values in runs that fit into one statement."""
    return (values[start : start + _CHUNK] for start in range(0, len(values), _CHUNK))


def chained(chain: str, line: str) -> str:
    """The chain after a line, of which its digest is enough: who checks the chain need not be told every line."""
    return sha256(chain.encode() + line.encode())


def fact_rows(
    before: AdapterRecord,
    chain: str,
    facts: Sequence[tuple[str, dict[str, Any]]],
    at: str,
    actor: str,
    reason: str,
) -> list[dict[str, Any]]:
    """Rows of the facts that follow an adapter's head, whose last fact's chain is given, each chained to the last."""
    rows = []
    for seq, (kind, body) in enumerate(facts, start=before.head + 1):
        chain = chained(chain, sha256(canonical_json([before.name, seq, kind, body, at, actor, reason])))
        rows.append(
            {
                "adapter": before.name,
                "seq": seq,
                "kind": kind,
                "body": body,
                "at": at,
                "actor": actor,
                "reason": reason,
                "chain": chain,
            }
        )
    return rows


class Journal:
    """What every part of the ledger does inside one transaction."""

    def __init__(self, db: Database) -> None:
        self.db = db

    def _apply(self, c: sa.Connection, before: AdapterRecord, change: Change, actor: str, reason: str) -> AdapterRecord:
        after = replace(change.adapter, head=before.head + len(change.facts))
        moved = c.execute(
            t.adapters.update()
            .where(t.adapters.c.name == before.name, t.adapters.c.head == before.head)
            .values({key: value for key, value in asdict(after).items() if key != "name"})
        )
        if moved.rowcount != 1:
            raise Conflict(f"{before.name} has moved on meanwhile.", "Read the head again.")
        if change.segments:
            moves = [
                {
                    "of": segment.number,
                    "to": segment.outcome,
                    "by": segment.version,
                    "why": segment.cause,
                    "said": segment.note,
                    "by_hand": segment.hand,
                    "measured": segment.metrics,
                }
                for segment in change.segments
            ]
            for segment in change.segments:
                if segment.dropped:
                    s = t.segments.c
                    gone = t.segments.update().where(s.adapter == before.name, s.number == segment.number)
                    c.execute(gone.values(payload=""))
            c.execute(_MOVE_SEGMENTS, [{"adapter_": before.name, **move} for move in moves])
        v = t.versions.c
        for chunk in chunks(change.revoked):
            c.execute(t.versions.update().where(v.adapter == before.name, v.number.in_(chunk)).values(revoked=True))
        for chunk in chunks(change.dropped):
            c.execute(t.versions.update().where(v.adapter == before.name, v.number.in_(chunk)).values(purged=True))
        where = (t.facts.c.adapter == before.name, t.facts.c.seq == before.head)
        chain = c.execute(sa.select(t.facts.c.chain).where(*where)).scalar() or ""
        c.execute(t.facts.insert(), fact_rows(before, chain, change.facts, now(), actor, reason))
        return after

    def _apply_all(
        self, c: sa.Connection, changes: Sequence[tuple[AdapterRecord, Change]], actor: str, reason: str
    ) -> None:
        """Many adapters' changes of nothing but their epoch, under `_lock_all`, set by set."""
        f, at = t.facts.c, now()
        for chunk in chunks(changes):
            last = t.adapters.join(t.facts, sa.and_(f.adapter == t.adapters.c.name, f.seq == t.adapters.c.head))
            names = [before.name for before, _ in chunk]
            query = sa.select(f.adapter, f.chain).select_from(last).where(t.adapters.c.name.in_(names))
            chains = {row.adapter: row.chain for row in c.execute(query)}
            rows = [fact_rows(before, chains[before.name], change.facts, at, actor, reason) for before, change in chunk]
            c.execute(t.facts.insert(), [row for each in rows for row in each])
            c.execute(
                _MOVE_EPOCHS,
                [
                    {"of": before.name, "to": change.adapter.epoch, "at": before.head + len(change.facts)}
                    for before, change in chunk
                ],
            )

    def _lock_all(self, c: sa.Connection) -> None:
        """Keep every other writer out until the transaction ends (on SQLite each writer does so already)."""
        if not self.db.sqlite:
            c.execute(sa.text("LOCK TABLE fences, adapters IN EXCLUSIVE MODE"))

    def _remember(self, c: sa.Connection, key: str, value: str) -> tuple[str, bool]:
        """The value that stands under a key of `meta`, and whether it is the one given now."""
        new = self.db.put(c, t.meta, {"key": key}, {"value": value}, replace=False)
        return str(c.execute(sa.select(t.meta.c.value).where(t.meta.c.key == key)).scalar()), new

    def _adapter(self, c: sa.Connection, name: str, lock: bool = False) -> AdapterRecord:
        query = sa.select(t.adapters).where(t.adapters.c.name == name)
        row = c.execute(query.with_for_update() if lock else query).first()
        if row is None:
            raise NotFound(f"There is no adapter {name[:80]}.", "`riverdelta registry list` shows those there are.")
        return adapter_of(row)

    def _segment(self, c: sa.Connection, adapter: str, number: int) -> SegmentRecord:
        s = t.segments.c
        row = c.execute(sa.select(t.segments).where(s.adapter == adapter, s.number == number)).first()
        if row is None:
            raise NotFound(f"{adapter} has no segment {number}.", f"`riverdelta registry log {adapter}` lists them.")
        return segment_of(row)

    def _first_awaiting(self, c: sa.Connection, adapter: str) -> int | None:
        s = t.segments.c
        query = sa.select(sa.func.min(s.number)).where(s.adapter == adapter, s.outcome == Outcome.AWAITING)
        return c.execute(query).scalar()

    def _segments(self, c: sa.Connection, adapter: str, first: int = 1) -> list[SegmentRecord]:
        s = t.segments.c
        columns = [column for column in t.segments.columns if column is not s.manifest]
        query = sa.select(*columns).where(s.adapter == adapter, s.number >= first).order_by(s.number)
        return [segment_of(row) for row in c.execute(query)]

    def _manifest(self, c: sa.Connection, adapter: str, number: int) -> Manifest:
        s = t.segments.c
        held = c.execute(sa.select(s.manifest).where(s.adapter == adapter, s.number == number)).scalar()
        if held is None:
            raise NotFound(f"{adapter} has no segment {number}.", f"`riverdelta registry log {adapter}` lists them.")
        return Manifest.unpack(held)

    def _only_revoked(
        self, c: sa.Connection, digests: Collection[str], dirty: Mapping[str, Collection[int]] | None = None
    ) -> set[str]:
        """Those of the weights' digests that versions have and no clean one does: each is revoked, or `dirty`, about to
        be, by adapter and number. Equal weights may be a clean version's too (nothing learned between): they and their
        text are the clean version's."""
        v, dirty = t.versions.c, dirty or {}
        held, clean = set[str](), set[str]()
        for chunk in chunks(sorted(digests)):
            query = sa.select(v.digest, v.revoked, v.adapter, v.number).where(v.digest.in_(chunk))
            for digest, revoked, adapter, number in c.execute(query):
                (held if revoked or number in dirty.get(adapter, ()) else clean).add(digest)
        return held - clean

    def _facts(self, c: sa.Connection, adapter: str, after: int = 0) -> list[Fact]:
        """The journal of an adapter after a sequence number, in order."""
        query = sa.select(t.facts).where(t.facts.c.adapter == adapter, t.facts.c.seq > after).order_by(t.facts.c.seq)
        return [fact_of(row) for row in c.execute(query)]

    def _suppressed(self, c: sa.Connection, adapter: str) -> frozenset[str]:
        """The subjects that an adapter must not learn from."""
        s = t.suppressions.c
        return frozenset(c.execute(sa.select(s.subject).where(s.adapter.in_((adapter, EVERYWHERE)))).scalars())

    def _versions(self, c: sa.Connection, adapter: str) -> dict[int, VersionRecord]:
        rows = c.execute(sa.select(t.versions).where(t.versions.c.adapter == adapter))
        return {row.number: version_of(row) for row in rows}
