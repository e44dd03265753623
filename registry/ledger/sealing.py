"""Sealing: many segments of many adapters in one transaction, read and written set by set."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import sqlalchemy as sa

from riverdelta.core.errors import Conflict, NotFound, StaleEpoch
from riverdelta.core.times import now

from . import decisions
from . import tables as t
from .database import upsert
from .journal import chunks, fact_rows
from .reach import Reaching
from .records import AdapterRecord, Cause, Manifest, Outcome, Place, SegmentRecord, Where, is_before
from .rows import adapter_of

# Built once: building a statement costs more than running it.
_ADD_SEGMENTS = t.segments.insert()
_ADD_FACTS = t.facts.insert()
_MOVE_HEADS = (
    t.adapters.update()
    .where(t.adapters.c.name == sa.bindparam("of"), t.adapters.c.head == sa.bindparam("was"))
    .values(head=sa.bindparam("to"), next_index=sa.bindparam("index"), next_segment=sa.bindparam("segment"))
)
_MOVE_CONSUMED = upsert(t.consumed, "next_offset")


@dataclass(frozen=True)
class Seal:
    """What a dataflow worker asks to append: a payload and its keys, already written, its manifest, and how far it has
    consumed.

    `consumed` maps (incarnation, partition) to (offset expected in the ledger, next offset): both are checked
    and moved in the sealing transaction, so that of two owners only one can append.
    """

    adapter: str
    epoch: int
    first: int
    manifest: Manifest
    trigger: str
    payload: str
    payload_sha: str
    consumed: Mapping[Where, tuple[int, int]]
    keyring: str = ""
    root: str = ""


class Sealing(Reaching):
    """Appending to adapters' logs."""

    def seal(
        self, seals: Sequence[Seal], actor: str, look: Callable[[], None] | None = None
    ) -> list[SegmentRecord | Exception]:
        """Append segments in one durable transaction: for each the segment, or why it was refused.

        Seals of one adapter build on each other in the order given: after one that is refused, so are the others.
        `look` is called last, and nothing is recorded when it raises (see `registry.written`).
        """
        with self.db.write() as c:
            # Every transaction locks adapters by name, so that no two wait for each other.
            batch = _Batch(actor)
            for names in chunks(sorted({seal.adapter for seal in seals})):
                self._read(c, batch, names)
            # An adapter that has nothing yet of what a version wrote kept its epoch when that was revoked.
            written: dict[str, dict[str, list[Place]]] = {}
            for seal in seals:
                for digest, places in seal.manifest.texts.items():
                    written.setdefault(seal.adapter, {}).setdefault(digest, []).extend(places)
            revoked = self._only_revoked(c, set[str]().union(*written.values()))
            for name, texts in written.items():
                batch.barred[name] = revoked | self._tainted(c, name, texts)
                batch.texts_from[name] = self._texts_from(c, name, texts)
            done = [batch.decide(seal) for seal in seals]
            self._write(c, batch)
            if look is not None:
                look()
        return done

    def _read(self, c: sa.Connection, batch: "_Batch", names: Sequence[str]) -> None:
        a, f = t.adapters.c, t.facts.c
        heads = sa.select(t.adapters).where(a.name.in_(names)).order_by(a.name)
        for row in c.execute(heads.with_for_update()):
            batch.before[row.name] = batch.heads[row.name] = adapter_of(row)
        # A statement of its own: PostgreSQL joins a row that it had to wait for with what the others held before.
        last = t.adapters.join(t.facts, sa.and_(f.adapter == a.name, f.seq == a.head))
        for row in c.execute(sa.select(a.name, f.chain).select_from(last).where(a.name.in_(names))):
            batch.chains[row.name] = row.chain
        for row in c.execute(sa.select(t.consumed).where(t.consumed.c.adapter.in_(names))):
            batch.consumed[row.adapter, row.incarnation, row.partition] = row.next_offset

    def _write(self, c: sa.Connection, batch: "_Batch") -> None:
        if not batch.segments:
            return
        c.execute(_ADD_SEGMENTS, batch.segments)
        if batch.mentions:
            batch.mentions.sort()  # in the order of their tree, a page of it is met once
            self.db.append(c, t.mentions, batch.mentions)
        if batch.moved:
            rows = [
                {"adapter": adapter, "incarnation": run, "partition": partition, "next_offset": to}
                for (adapter, run, partition), to in batch.moved.items()
            ]
            c.execute(_MOVE_CONSUMED[self.db.sqlite], rows)
        c.execute(_ADD_FACTS, batch.facts)
        moves = [
            {"of": name, "was": was.head, "to": to.head, "index": to.next_index, "segment": to.next_segment}
            for name, was in batch.before.items()
            if (to := batch.heads[name]) is not was
        ]
        if c.execute(_MOVE_HEADS, moves).rowcount != len(moves):
            raise Conflict("Adapters have moved on meanwhile.", "Read their heads again.")

    def consumed(self, adapter: str) -> dict[Where, int]:
        """Per (incarnation, partition), the offset before which every event of the adapter has been decided."""
        with self.db.read() as c:
            rows = c.execute(sa.select(t.consumed).where(t.consumed.c.adapter == adapter))
            return {(row.incarnation, row.partition): row.next_offset for row in rows}


@dataclass
class _Batch:
    """What one transaction has read, decided, and is about to write."""

    actor: str
    at: str = field(default_factory=now)
    before: dict[str, AdapterRecord] = field(default_factory=dict)
    heads: dict[str, AdapterRecord] = field(default_factory=dict)
    chains: dict[str, str] = field(default_factory=dict)
    consumed: dict[tuple[str, str, int], int] = field(default_factory=dict)
    moved: dict[tuple[str, str, int], int] = field(default_factory=dict)
    segments: list[dict[str, Any]] = field(default_factory=list)
    mentions: list[tuple[str, str, int]] = field(default_factory=list)
    facts: list[dict[str, Any]] = field(default_factory=list)
    refusals: dict[str, Exception] = field(default_factory=dict)
    barred: dict[str, set[str]] = field(default_factory=dict)
    texts_from: dict[str, dict[str, dict[Where, int]]] = field(default_factory=dict)

    def decide(self, seal: Seal) -> SegmentRecord | Exception:
        """The next segment of its adapter, or why not."""
        name = seal.adapter
        if name not in self.refusals:
            try:
                return self._append(seal)
            except (Conflict, NotFound) as refused:
                self.refusals[name] = refused
        return self.refusals[name]

    def _append(self, seal: Seal) -> SegmentRecord:
        head = self.heads.get(seal.adapter)
        if head is None:
            raise NotFound(
                f"There is no adapter {seal.adapter[:80]}.", "`riverdelta registry list` shows those there are."
            )
        entries = seal.manifest.entries
        barred, since = self.barred.get(head.name, ()), self.texts_from.get(head.name, {})
        texts = seal.manifest.texts.items() if barred or since else ()
        if any(digest in barred or is_before(places, since.get(digest, {})) for digest, places in texts):
            raise StaleEpoch(
                f"A segment of {head.name} holds what a version wrote that is revoked since, or saw whom it forgot.",
                "Suppress again, then seal.",
            )
        tombstones = [entry.tombstone for entry in entries].count(True)
        packed = seal.manifest.pack()
        change = decisions.decide_seal(
            head,
            seal.epoch,
            seal.first,
            len(entries),
            tombstones,
            seal.trigger,
            seal.root,
            seal.manifest.digest_as(packed),
        )
        for (run, partition), (expected, _) in seal.consumed.items():
            held = self.consumed.get((head.name, run, partition), 0)
            if held != expected:
                raise Conflict(
                    f"{head.name} has consumed partition {partition} up to {held}, not {expected}.",
                    "Another worker owns it now: read the head again.",
                )
        for (run, partition), (_, to) in seal.consumed.items():
            self.consumed[head.name, run, partition] = self.moved[head.name, run, partition] = to
        segment = SegmentRecord(
            head.name,
            head.next_segment,
            seal.first,
            len(entries),
            seal.trigger,
            seal.payload,
            seal.payload_sha,
            self.at,
            Outcome.AWAITING if head.held is None else Outcome.SET_ASIDE,
            cause=Cause.NONE if head.held is None else Cause.HOLD,
            keyring=seal.keyring,
            root=seal.root,
        )
        self.segments.append({**vars(segment), "manifest": packed})
        self.mentions += [(mention, head.name, segment.number) for mention in sorted(seal.manifest.mentions)]
        rows = fact_rows(head, self.chains[head.name], change.facts, self.at, self.actor, "")
        self.facts += rows
        self.chains[head.name] = rows[-1]["chain"]
        self.heads[head.name] = replace(change.adapter, head=head.head + len(rows))
        return segment
