"""Forget in the ledger: the fence's one transaction, the procedure's record, suppression and its end."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import sqlalchemy as sa

from riverdelta.core.errors import BadInput
from riverdelta.core.telemetry import now

from . import decisions
from . import tables as t
from .decisions import Change
from .leases import Leases
from .records import AdapterRecord, Forget, Stage
from .rows import forget_of

EVERYWHERE = "*"
_ORDER = list(Stage)


class Forgetting(Leases):
    """Forget procedures and suppression lists. Subjects are given as keyed hashes."""

    def forget(
        self, request: str, subject: str, adapters: Sequence[str] | None, actor: str, reason: str = ""
    ) -> Forget:
        """The fence: suppress, raise epochs, revoke, move releases, all in one transaction.

        `adapters` None means every adapter, those to come included. A request id seen before changes nothing and
        gives the procedure as it stands.
        """
        if not request or len(request) > 128:
            raise BadInput("A forget needs a request id of 1 to 128 characters.", "Use a fresh one for each request.")
        with self.db.write() as c:
            held = c.execute(sa.select(t.forgets).where(t.forgets.c.id == request)).first()
            if held is not None:
                return forget_of(held)
            fence = self._last_fence(c, lock=True) + 1
            names = sorted(set(adapters)) if adapters is not None else self._names(c)
            epochs: dict[str, int] = {}
            doomed: list[dict[str, Any]] = []
            digests: set[str] = set()
            for name in names:
                head = self._adapter(c, name, lock=True)
                doomed.append(self._forget_one(c, head, subject, request, actor, reason))
                digests.update(doomed[-1]["digests"])
                epochs[name] = head.epoch + 1
            for name in names if adapters is not None else [EVERYWHERE]:
                self._suppress(c, name, subject)
            at = now()
            # Equal weights may be a clean version's too (nothing learned between): only what none may serve is fenced.
            digests -= self._clean_digests(c, digests)
            c.execute(t.fences.insert().values(number=fence, at=at, digests=sorted(digests)))
            forget = Forget(
                request,
                subject,
                adapters is None,
                epochs,
                fence,
                Stage.FENCED,
                at,
                actor,
                reason,
                {"doomed": doomed},
            )
            c.execute(t.forgets.insert().values(asdict(forget)))
        return forget

    def _forget_one(
        self, c: sa.Connection, head: AdapterRecord, subject: str, request: str, actor: str, reason: str
    ) -> dict[str, Any]:
        """Erase in the manifests to a fixed point: what a revoked version wrote must not be learned from either."""
        versions = self._versions(c, head.name)
        mentions = {subject}
        touched: set[int] = set()
        while True:
            found = self._mentioning(c, head.name, mentions) - touched
            if not found:
                break
            touched |= found
            mentions |= {versions[v].digest for v in decisions.dirty_versions(versions, touched)}
            mentions -= {version.digest for version in versions.values() if self._is_clean(versions, version, touched)}
        entries = 0
        for number in sorted(touched):
            before = self._manifest(c, head.name, number)
            after = before.erased(mentions)
            entries += sum(new.tombstone for new in after.entries) - sum(old.tombstone for old in before.entries)
            s = t.segments.c
            c.execute(
                t.segments.update().where(s.adapter == head.name, s.number == number).values(manifest=after.pack())
            )
            gone = before.mentions - after.mentions
            m = t.mentions.c
            c.execute(
                t.mentions.delete().where(m.adapter == head.name, m.segment == number, m.mention.in_(sorted(gone)))
            )
        change = decisions.decide_forget(head, versions, self._segments(c, head.name), touched, subject, request)
        change = replace(change, facts=tuple((kind, {**body, "entries": entries}) for kind, body in change.facts))
        self._apply(c, head, change, actor, reason)
        return {
            "adapter": head.name,
            "segments": sorted(touched),
            "entries": entries,
            "versions": list(change.revoked),
            "digests": sorted({versions[v].digest for v in change.revoked}),
            "states": sorted({versions[v].state for v in change.revoked} - {""}),
            "rebuild": [segment.number for segment in change.segments],
        }

    @staticmethod
    def _is_clean(versions: decisions.Versions, version: Any, touched: set[int]) -> bool:
        return not version.revoked and version.number not in decisions.dirty_versions(versions, touched)

    def _clean_digests(self, c: sa.Connection, digests: set[str]) -> set[str]:
        v = t.versions.c
        query = sa.select(v.digest).where(v.digest.in_(sorted(digests)), v.revoked.is_(False))
        return set(c.execute(query).scalars())

    def _mentioning(self, c: sa.Connection, adapter: str, mentions: set[str]) -> set[int]:
        m = t.mentions.c
        query = sa.select(m.segment).where(m.adapter == adapter, m.mention.in_(sorted(mentions)))
        return set(c.execute(query).scalars())

    def _suppress(self, c: sa.Connection, adapter: str, subject: str) -> None:
        s = t.suppressions.c
        if not c.execute(sa.select(s.since).where(s.adapter == adapter, s.subject == subject)).first():
            c.execute(t.suppressions.insert().values(adapter=adapter, subject=subject, since=now()))

    def allow(self, subject: str, adapters: Sequence[str] | None, actor: str, reason: str = "") -> list[str]:
        """End suppression: the subject's events from each adapter's present index on may be learned again.

        Returns the adapters (or `*`) for which the subject was suppressed.
        """
        s = t.suppressions.c
        lifted = []
        with self.db.write() as c:
            names = sorted(set(adapters)) if adapters is not None else [EVERYWHERE, *self._names(c)]
            for name in names:
                gone = c.execute(t.suppressions.delete().where(s.adapter == name, s.subject == subject))
                if gone.rowcount:
                    lifted.append(name)
            told = self._names(c) if EVERYWHERE in lifted else lifted
            for name in told:
                head = self._adapter(c, name, lock=True)
                fact = ("allow", {"subject": subject, "index": head.next_index})
                self._apply(c, head, Change(head, (fact,)), actor, reason)
        return lifted

    def suppressed(self, adapter: str) -> frozenset[str]:
        """The keyed hashes of the subjects that an adapter must not learn from."""
        s = t.suppressions.c
        with self.db.read() as c:
            return frozenset(c.execute(sa.select(s.subject).where(s.adapter.in_((adapter, EVERYWHERE)))).scalars())

    def forgets(self, unfinished: bool = False) -> list[Forget]:
        """Forget procedures, oldest first."""
        query = sa.select(t.forgets).order_by(t.forgets.c.fence)
        if unfinished:
            query = query.where(t.forgets.c.stage != Stage.PURGED)
        with self.db.read() as c:
            return [forget_of(row) for row in c.execute(query)]

    def advance(self, request: str, stage: Stage, body: Mapping[str, Any], actor: str) -> Forget:
        """Record that a procedure has reached a stage; reaching it again changes nothing."""
        with self.db.write() as c:
            row = c.execute(sa.select(t.forgets).where(t.forgets.c.id == request).with_for_update()).one()
            forget = forget_of(row)
            if _ORDER.index(stage) <= _ORDER.index(forget.stage):
                return forget
            moved = replace(forget, stage=stage, body={**forget.body, **body})
            c.execute(t.forgets.update().where(t.forgets.c.id == request).values(stage=stage, body=moved.body))
            for name in forget.adapters:
                head = self._adapter(c, name, lock=True)
                fact = ("forget_stage", {"request": request, "stage": str(stage)})
                self._apply(c, head, Change(head, (fact,)), actor, "")
        return moved

    def is_rebuilt(self, forget: Forget) -> bool:
        """Whether nothing that the forget set back still awaits its rebuild."""
        s = t.segments.c
        with self.db.read() as c:
            for part in forget.body["doomed"]:
                waiting = sa.select(s.number).where(
                    s.adapter == part["adapter"], s.number.in_(part["rebuild"]), s.outcome == "awaiting"
                )
                if c.execute(waiting).first():
                    return False
        return True

    def replace_payload(self, adapter: str, segment: int, payload: str, payload_sha: str) -> None:
        """Point a segment at a payload rewritten without its tombstones' contents."""
        s = t.segments.c
        with self.db.write() as c:
            c.execute(
                t.segments.update()
                .where(s.adapter == adapter, s.number == segment)
                .values(payload=payload, payload_sha=payload_sha)
            )

    def mark_purged(self, adapter: str, versions: Sequence[int]) -> None:
        """Record that versions' weights and state are gone from the store and from MLflow."""
        v = t.versions.c
        with self.db.write() as c:
            c.execute(t.versions.update().where(v.adapter == adapter, v.number.in_(versions)).values(purged=True))

    def digests_in_use(self) -> frozenset[str]:
        """Weights and state digests that some version still needs."""
        v = t.versions.c
        with self.db.read() as c:
            rows = c.execute(sa.select(v.digest, v.state).where(v.revoked.is_(False)))
            return frozenset(digest for row in rows for digest in row if digest)

    def _names(self, c: sa.Connection) -> list[str]:
        return list(c.execute(sa.select(t.adapters.c.name).order_by(t.adapters.c.name)).scalars())
