"""The ledger: one ordered history of facts about each adapter, and the only place where an adapter's head moves."""

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import sqlalchemy as sa

from riverdelta.core.digests import digest_of, seed_of
from riverdelta.core.errors import Conflict, NotFound, Refused
from riverdelta.core.names import check_adapter
from riverdelta.core.recipe import Recipe
from riverdelta.core.times import now

from . import decisions
from . import tables as t
from .claims import Claims
from .database import Database, upsert
from .decisions import Change, Line
from .forgetting import Forgetting
from .records import AdapterRecord, Cause, Fact, Gap, Hand, Manifest, Outcome, PartRecord, SegmentRecord, VersionRecord
from .retention import decide_retention
from .rows import adapter_of, segment_of, version_of, version_row
from .sealing import Sealing
from .view import Views


@dataclass(frozen=True)
class Increment:
    """What a trainer asks to commit: a candidate whose weights and state already lie in the store."""

    adapter: str
    segment: int
    epoch: int
    parent: int
    digest: str
    state: str
    saw: tuple[int, ...]
    fingerprint: Mapping[str, Any]
    metrics: Mapping[str, Any] = field(default_factory=dict)
    parts: tuple[PartRecord, ...] = ()
    withheld: str = ""
    token: int = 0


_CONTROL = -1  # the control topic's bucket of reading positions: the dataflow's count from 0
_MOVE_POSITIONS = upsert(t.positions, "next_offset")


@dataclass(frozen=True)
class Work:
    """The next increment of an adapter: train `segment` on `parent` (None is the base) at `epoch`. `learns` names what
    it may learn from. `token` is that of the claim under which it is done."""

    adapter: AdapterRecord
    segment: SegmentRecord
    parent: VersionRecord | None
    learns: str = ""
    token: int = 0


class Ledger(Sealing, Claims, Forgetting, Views):
    """Every fact about every adapter. Safe to use from several threads and processes."""

    @classmethod
    def open(cls, url: str) -> "Ledger":
        """Open a ledger, made or migrated as needed."""
        ledger = cls(Database(url))
        ledger.db.migrate()
        return ledger

    def close(self) -> None:
        """Close the database."""
        self.db.close()

    # -- the folder's own facts ------------------------------------------------------------------------------

    def recall(self, key: str) -> str | None:
        """A fact about the whole ledger, if it is written."""
        with self.db.read() as c:
            return c.execute(sa.select(t.meta.c.value).where(t.meta.c.key == key)).scalar()

    def remember(self, key: str, value: str) -> str:
        """Write a fact about the whole ledger once; the value that stands is returned."""
        if (known := self.recall(key)) is not None:
            return known
        with self.db.write() as c:
            return self._remember(c, key, value)[0]

    def record_gap(self, gap: Gap) -> None:
        """Write once that records were gone before they were read."""
        key = f"gap/{gap.incarnation}/{gap.partition}/{gap.first}"
        self.remember(key, json.dumps({"to": gap.to, "at": now()}))

    def gaps(self) -> list[Gap]:
        """What was gone before it was read, in the order of partitions and offsets."""
        with self.db.read() as c:
            rows = list(c.execute(sa.select(t.meta).where(t.meta.c.key.startswith("gap/"))))
        return sorted(Gap.of(row.key, json.loads(row.value)) for row in rows)

    # -- adapters --------------------------------------------------------------------------------------------

    def create(self, name: str, recipe: Recipe, actor: str, reason: str = "", cap: int | None = None) -> AdapterRecord:
        """Make an adapter; `Conflict` when it exists, `Refused` when `cap` adapters exist already."""
        with self.db.write() as c:
            return self._create(c, name, recipe, actor, reason, cap)

    def _create(
        self, c: sa.Connection, name: str, recipe: Recipe, actor: str, reason: str, cap: int | None
    ) -> AdapterRecord:
        check_adapter(name)
        self._lock_all(c)  # a forget of everything must not miss an adapter that is being made
        self._check_free(c, name)
        if cap is not None and (c.execute(sa.select(sa.func.count()).select_from(t.adapters)).scalar() or 0) >= cap:
            raise Refused(f"{cap} adapters exist, the most allowed.", "Raise streams.max_adapters in the settings.")
        record = AdapterRecord(
            name, recipe.to_dict(), recipe.digest, seed_of("adapter", name, recipe.seed), created_at=now()
        )
        c.execute(t.adapters.insert().values(asdict(record)))
        body = {"recipe": record.recipe, "recipe_digest": record.recipe_digest, "seed": record.seed}
        return self._apply(c, record, Change(record, (("created", body),)), actor, reason)

    def adapters(self) -> list[AdapterRecord]:
        """Every adapter, by name."""
        with self.db.read() as c:
            return [adapter_of(row) for row in c.execute(sa.select(t.adapters).order_by(t.adapters.c.name))]

    def adapter(self, name: str) -> AdapterRecord:
        """One adapter's head."""
        with self.db.read() as c:
            return self._adapter(c, name)

    def heads(self) -> dict[str, int]:
        """Each adapter's number of facts: what changed since the last look is what moved."""
        with self.db.read() as c:
            return {name: head for name, head in c.execute(sa.select(t.adapters.c.name, t.adapters.c.head))}  # noqa: C416

    def facts(self, adapter: str, after: int = 0) -> list[Fact]:
        """The journal of an adapter after a sequence number, in order."""
        with self.db.read() as c:
            return self._facts(c, adapter, after)

    # -- streams: segments -----------------------------------------------------------------------------------

    def segments(self, adapter: str, first: int = 1) -> list[SegmentRecord]:
        """The segments of an adapter from a number on, in order."""
        with self.db.read() as c:
            return self._segments(c, adapter, first)

    def segment(self, adapter: str, number: int) -> SegmentRecord:
        """One segment."""
        with self.db.read() as c:
            return self._segment(c, adapter, number)

    def manifest(self, adapter: str, number: int) -> Manifest:
        """The entries of a segment."""
        with self.db.read() as c:
            return self._manifest(c, adapter, number)

    def manifests(self, adapter: str, index: int = 0) -> list[tuple[SegmentRecord, Manifest]]:
        """The segments that hold entries from an index on, in order, with their entries."""
        s = t.segments.c
        query = sa.select(t.segments).where(s.adapter == adapter, s.first + s.count > index).order_by(s.number)
        with self.db.read() as c:
            return [(segment_of(row), Manifest.unpack(row.manifest)) for row in c.execute(query)]

    def move_positions(self, moves: Mapping[tuple[str, int, int], int]) -> None:
        """Record from where a restarted dataflow must read again, by (incarnation, partition, bucket of adapters)."""
        rows = [
            {"incarnation": incarnation, "partition": partition, "bucket": bucket, "next_offset": to}
            for (incarnation, partition, bucket), to in sorted(moves.items())
        ]
        with self.db.write() as c:
            c.execute(_MOVE_POSITIONS[self.db.sqlite], rows)

    def positions(self, incarnation: str) -> dict[tuple[int, int], int]:
        """Per (partition, bucket), the recorded position."""
        with self.db.read() as c:
            rows = c.execute(sa.select(t.positions).where(t.positions.c.incarnation == incarnation))
            return {(row.partition, row.bucket): row.next_offset for row in rows}

    def has_read(self) -> bool:
        """Whether a dataflow has ever read events."""
        with self.db.read() as c:
            return bool(c.execute(sa.select(sa.exists().where(t.positions.c.bucket != _CONTROL))).scalar())

    def record_heard(self, incarnation: str, partition: int, until: int, waiting: Sequence[int]) -> None:
        """Record that every request on a partition of the control topic before an offset is done, but those at the
        `waiting` offsets."""
        position = {"incarnation": incarnation, "partition": partition, "bucket": _CONTROL}
        value = json.dumps([until, *waiting])
        with self.db.write() as c:
            c.execute(_MOVE_POSITIONS[self.db.sqlite], [{**position, "next_offset": min([until, *waiting])}])
            self.db.put(c, t.meta, {"key": f"heard/{incarnation}/{partition}"}, {"value": value})

    def heard(self, incarnation: str, partition: int) -> tuple[int, list[int]]:
        """The offset before which every request on a partition of the control topic is done, and those that are not."""
        p, m = t.positions.c, t.meta.c
        position = sa.select(p.next_offset).where(
            p.incarnation == incarnation, p.partition == partition, p.bucket == _CONTROL
        )
        with self.db.read() as c:
            known = c.execute(sa.select(m.value).where(m.key == f"heard/{incarnation}/{partition}")).scalar()
            if known is None:  # an older ledger
                return int(c.execute(position).scalar() or 0), []
        until, *waiting = json.loads(known)
        return until, waiting

    def waiting_requests(self) -> dict[tuple[str, int], list[int]]:
        """Per (incarnation, partition) of the control topic that has any, the offsets of the requests that wait."""
        found: dict[tuple[str, int], list[int]] = {}
        with self.db.read() as c:
            for row in c.execute(sa.select(t.meta).where(t.meta.c.key.startswith("heard/"))):
                _, run, partition = row.key.split("/")
                _, *waiting = json.loads(row.value)
                if waiting:
                    found[run, int(partition)] = waiting
        return found

    # -- trainer: increments ---------------------------------------------------------------------------------

    def waiting(self) -> list[tuple[str, int]]:
        """Per adapter with work, its first awaiting segment; the adapter that has waited longest first."""
        s = t.segments.c
        query = sa.select(s.adapter, sa.func.min(s.number)).where(s.outcome == Outcome.AWAITING).group_by(s.adapter)
        with self.db.read() as c:
            rows = c.execute(query.order_by(sa.func.min(s.sealed_at), s.adapter))
            return [(name, number) for name, number in rows]

    def behind(self, names: Sequence[str]) -> set[str]:
        """Those of these adapters that have not learned all that is sealed: something awaits its outcome, or a
        rollback holds them."""
        s, a = t.segments.c, t.adapters.c
        awaiting = sa.select(s.adapter).where(s.outcome == Outcome.AWAITING, s.adapter.in_(names))
        held = sa.select(a.name).where(a.name.in_(names), a.held.is_not(None))
        with self.db.read() as c:
            return set(c.execute(sa.union(awaiting, held)).scalars())

    def drifting(self, names: Sequence[str]) -> set[str]:
        """Those of these adapters that ask for a segment early: what was learned last had drifted, and nothing that was
        sealed for such a reason awaits its outcome."""
        s, v, a = t.segments.c, t.versions.c, t.adapters.c
        asked = sa.exists().where(s.adapter == a.name, s.outcome == Outcome.AWAITING, s.trigger == "drift")
        tips = t.adapters.join(t.versions, sa.and_(v.adapter == a.name, v.number == a.tip))
        drifted = v.metrics["drift"].as_integer() == 1
        query = sa.select(a.name).select_from(tips).where(a.name.in_(names), a.held.is_(None), drifted, ~asked)
        with self.db.read() as c:
            return set(c.execute(query).scalars())

    def count_awaiting(self, adapter: str) -> int:
        """How many segments of an adapter await their outcome."""
        s = t.segments.c
        query = sa.select(sa.func.count()).where(s.adapter == adapter, s.outcome == Outcome.AWAITING)
        with self.db.read() as c:
            return int(c.execute(query).scalar() or 0)

    def rejections(self, adapter: str | None = None) -> dict[str, int]:
        """Per adapter that has any, how many candidates in a row the gate has rejected since it accepted the tip; those
        that a person discarded do not count."""
        s, a = t.segments.c, t.adapters.c
        here = sa.and_(s.adapter == a.name, s.version == a.tip, s.cause == Cause.GATE, s.hand == Hand.NONE)
        query = sa.select(a.name, sa.func.count()).select_from(t.adapters.join(t.segments, here)).group_by(a.name)
        if adapter is not None:
            query = query.where(a.name == adapter)
        with self.db.read() as c:
            return {name: count for name, count in c.execute(query)}  # noqa: C416

    def work(self, adapter: str) -> Work | None:
        """The adapter's next increment, read in one view, or None when nothing awaits."""
        with self.db.read() as c:
            number = self._first_awaiting(c, adapter)
            if number is None:
                return None
            head, versions = self._adapter(c, adapter), self._versions(c, adapter)
            learned = Line.of(versions, head.tip).trained.keys()
            learns = self._name_of(c, adapter, {*learned, number})
            return Work(head, self._segment(c, adapter, number), versions[head.tip] if head.tip else None, learns)

    def _name_of(self, c: sa.Connection, adapter: str, segments: Collection[int]) -> str:
        """Names what these segments hold now. No two sealings have the same root, as every entry has a salt; which
        entries have become tombstones since follows from the journal up to its last forget. Numbers and the epoch would
        not do: they come again in a ledger that was restored."""
        f, s = t.facts.c, t.segments.c
        forgets = sa.select(f.chain).where(f.adapter == adapter, f.kind == "forget").order_by(f.seq.desc()).limit(1)
        sealed = sa.select(s.number, s.root).where(s.adapter == adapter).order_by(s.number)
        roots = [root for number, root in c.execute(sealed) if number in segments]
        return digest_of([c.execute(forgets).scalar(), roots])

    def commit(self, increment: Increment, actor: str, look: Callable[[], None] | None = None) -> VersionRecord:
        """Make a candidate the adapter's next version and, unless the gate withholds it, its release; `StaleEpoch` or
        `Conflict` when the ledger has moved on since the work began. `look` is called last, as in `seal`."""
        with self.db.write() as c:
            adapter = self._adapter(c, increment.adapter, lock=True)
            self._check_claim(c, adapter.name, increment.token, actor)
            segment = self._segment(c, adapter.name, increment.segment)
            first = self._first_awaiting(c, adapter.name)
            s = t.segments.c
            decided_here = c.execute(  # decisions in the lineage count as seen
                sa.select(s.number).where(
                    s.adapter == adapter.name,
                    s.cause.in_((Cause.GATE, Cause.ERROR)),
                    s.version == increment.parent,
                )
            ).scalars()
            saw = tuple(sorted({*increment.saw, increment.segment, *decided_here}))
            change = decisions.decide_increment(
                adapter,
                segment,
                first,
                increment.epoch,
                increment.parent,
                increment.digest,
                saw,
                [part.digest for part in increment.parts],
                increment.withheld,
            )
            version = VersionRecord(
                adapter.name,
                adapter.next_version,
                increment.digest,
                increment.state,
                increment.parent,
                increment.segment,
                increment.epoch,
                adapter.recipe_digest,
                saw,
                dict(increment.fingerprint),
                dict(increment.metrics),
                now(),
                parts=increment.parts,
                withheld=increment.withheld,
            )
            c.execute(t.versions.insert().values(version_row(version)))
            self._apply(c, adapter, change, actor, "")
            if look is not None:
                look()
        return version

    def set_aside(
        self,
        adapter: str,
        segment: int,
        epoch: int,
        parent: int,
        cause: Cause,
        note: str,
        actor: str,
        metrics: Mapping[str, Any] | None = None,
        token: int = 0,
    ) -> None:
        """Record that a segment was not learned, why, and what was measured."""
        with self.db.write() as c:
            head = self._adapter(c, adapter, lock=True)
            self._check_claim(c, adapter, token, actor)
            found, first = self._segment(c, adapter, segment), self._first_awaiting(c, adapter)
            change = decisions.decide_set_aside(head, found, first, epoch, parent, cause, note, metrics or {})
            self._apply(c, head, change, actor, "")

    def import_adapter(
        self,
        name: str,
        recipe: Recipe,
        digest: str,
        fingerprint: Mapping[str, Any],
        actor: str,
        reason: str = "",
        look: Callable[[], None] | None = None,
    ) -> VersionRecord:
        """Make an adapter whose version 1 is weights trained elsewhere, which lie in the store already; `Refused` when
        a forget has revoked those very weights, or they saw whom one forgot under this name. `look` is called last, as
        in `seal`."""
        with self.db.write() as c:
            head = self._create(c, name, recipe, actor, reason, None)
            self._check_weights(c, name, digest)
            version = VersionRecord(
                name, 1, digest, "", 0, None, 0, head.recipe_digest, (), dict(fingerprint), {}, now()
            )
            c.execute(t.versions.insert().values(version_row(version)))
            moved = replace(head, next_version=2, tip=1, release=1)
            facts = (
                ("imported", {"version": 1, "digest": digest}),
                ("release", {"from": 0, "to": 1, "digest": digest}),
            )
            self._apply(c, head, Change(moved, facts), actor, reason)
            if look is not None:
                look()
        return version

    def check_import(self, name: str, digest: str) -> None:
        """`Conflict` or `Refused` where `import_adapter` would be, as things stand."""
        check_adapter(name)
        with self.db.read() as c:
            self._check_free(c, name)
            self._check_weights(c, name, digest)

    def _check_free(self, c: sa.Connection, name: str) -> None:
        if c.execute(sa.select(t.adapters.c.name).where(t.adapters.c.name == name)).first():
            raise Conflict(f"The adapter {name} exists already.", f"`riverdelta registry show {name}` shows it.")

    def _check_weights(self, c: sa.Connection, name: str, digest: str) -> None:
        if self._only_revoked(c, {digest}):
            raise Refused(
                f"The weights {digest[:12]} are revoked: they saw what was since forgotten.",
                "Import an adapter that did not.",
            )
        # Suppressed ahead of the adapter: what saw them is in use where they were not forgotten.
        seen, _ = self._reach(c, self._mentioning(c, self._suppressed(c, name)))
        if any(reach.versions[number].digest == digest for reach in seen.values() for number in reach.dirty):
            raise Refused(
                f"The weights {digest[:12]} saw a subject that is forgotten in {name}.",
                "Import an adapter that did not.",
            )

    def versions(self, adapter: str) -> dict[int, VersionRecord]:
        """Every version of an adapter by number, revoked ones included."""
        with self.db.read() as c:
            self._adapter(c, adapter)
            return self._versions(c, adapter)

    def version(self, adapter: str, number: int) -> VersionRecord:
        """One version."""
        v = t.versions.c
        with self.db.read() as c:
            row = c.execute(sa.select(t.versions).where(v.adapter == adapter, v.number == number)).first()
        if row is None:
            raise NotFound(f"{adapter} has no version {number}.", f"`riverdelta registry show {adapter}` lists them.")
        return version_of(row)

    def releases(self) -> dict[str, tuple[int, str]]:
        """Per adapter, the version that servers answer with and its digest; (0, "") for the base. It is the released
        one, or one that a forget has left them until its rebuild; never another that is revoked, whatever a head
        says: servers free weights again that they find here."""
        a, v = t.adapters.c, t.versions.c
        clean = sa.and_(v.adapter == a.name, v.number == a.release, v.revoked.is_(False))
        query = sa.select(a.name, v.number, v.digest).select_from(t.adapters.outerjoin(t.versions, clean))
        with self.db.read() as c:
            found = {name: (release or 0, digest or "") for name, release, digest in c.execute(query)}
            return found | self._loans(c)

    # -- operators -------------------------------------------------------------------------------------------

    def _act(
        self, adapter: str, actor: str, reason: str, decide: Callable[[sa.Connection, AdapterRecord], Change]
    ) -> AdapterRecord:
        with self.db.write() as c:
            self._take_back(c, adapter)
            head = self._adapter(c, adapter, lock=True)
            return self._apply(c, head, decide(c, head), actor, reason)

    def release(self, adapter: str, version: int, actor: str, reason: str = "") -> AdapterRecord:
        """Move the release, without a hold."""
        return self._act(
            adapter,
            actor,
            reason,
            lambda c, head: decisions.decide_release(head, self._versions(c, adapter), version),
        )

    def rollback(self, adapter: str, version: int | None, actor: str, reason: str = "") -> AdapterRecord:
        """Move the release to an earlier version (default: the released one's parent) and hold it there."""

        def decide(c: sa.Connection, head: AdapterRecord) -> Change:
            versions = self._versions(c, adapter)
            target = version
            if target is None:
                target = versions[head.release].parent if head.release else 0
                target = decisions.newest_clean(versions, target)
                if not target:
                    raise Refused(
                        f"{adapter} has no version before {head.release}.",
                        f"Name the one to go to, or {adapter}@0: the base.",
                    )
            return decisions.decide_rollback(head, versions, self._segments(c, adapter), target)

        return self._act(adapter, actor, reason, decide)

    def resume(self, adapter: str, mode: decisions.Mode, actor: str, reason: str = "") -> AdapterRecord:
        """End a hold."""
        return self._act(
            adapter,
            actor,
            reason,
            lambda c, head: decisions.decide_resume(head, self._versions(c, adapter), self._segments(c, adapter), mode),
        )

    def decide_by_hand(self, adapter: str, segment: int, hand: Hand, actor: str, reason: str = "") -> AdapterRecord:
        """Accept or discard a segment, whatever the gate says."""
        return self._act(
            adapter,
            actor,
            reason,
            lambda c, head: decisions.decide_by_hand(
                head, self._versions(c, adapter), self._segments(c, adapter), segment, hand
            ),
        )

    def retain(self, adapter: str, actor: str, dry: bool = False) -> Change | None:
        """Let go of what the recipe's `retain` no longer keeps, unless a procedure is under way; what that was."""
        with self.db.write() as c:
            head = self._adapter(c, adapter, lock=True)
            if any(adapter in held.adapters for held in self._forgets(c, unfinished=True)):
                return None
            rules = Recipe.from_dict(head.recipe).retain
            change = decide_retention(head, self._versions(c, adapter), self._segments(c, adapter), rules)
            if change is not None and not dry:
                self._apply(c, head, change, actor, "")
        return change

    # -- MLflow's share --------------------------------------------------------------------------------------

    def projected(self, adapter: str) -> tuple[int, dict[str, Any]]:
        """How much of the journal MLflow shows, and the projector's own notes."""
        with self.db.read() as c:
            row = c.execute(sa.select(t.projections).where(t.projections.c.adapter == adapter)).first()
        return (row.seq, row.body) if row else (0, {})

    def mark_projected(self, adapter: str, seq: int, body: Mapping[str, Any], was: int | None = None) -> bool:
        """Record what MLflow shows; with `was`, only if that much was shown until now. Whether it was recorded."""
        p = t.projections.c
        with self.db.write() as c:
            held = c.execute(sa.select(p.seq).where(p.adapter == adapter).with_for_update()).scalar() or 0
            if was is not None and held != was:
                return False
            self.db.put(c, t.projections, {"adapter": adapter}, {"seq": seq, "body": dict(body)})
        return True
