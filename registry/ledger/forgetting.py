"""Forget in the ledger: the fence's one transaction, the procedure's record, suppression and its end."""

import json
import re
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import sqlalchemy as sa

from riverdelta.core.errors import BadInput, Conflict, NotFound
from riverdelta.core.store import state_key, weights_key
from riverdelta.core.times import now

from . import decisions
from . import tables as t
from .decisions import Change
from .journal import EVERYWHERE, chunks
from .lending import Lending
from .past import Reach
from .reach import Reaching
from .records import AdapterRecord, Forget, Outcome, Stage
from .rows import adapter_of, forget_of

_ORDER = list(Stage)
_HOLD_SECONDS = 0.25  # that deleting objects keeps others from the ledger, and one deletion more
_YIELD_SECONDS = 0.02  # in which they come to it
_HASH = re.compile(r"[0-9a-f]{64}")


class Forgetting(Lending, Reaching):
    """Forget procedures and suppression lists. Subjects are given as keyed hashes."""

    def forget(
        self,
        request: str,
        subject: str,
        adapters: Sequence[str] | None,
        actor: str,
        reason: str = "",
        asked: Mapping[str, Any] | None = None,
        until: str = "",
        ahead: bool = False,
        receipt: bool = False,
    ) -> Forget:
        """The fence: suppress, raise epochs, revoke, move releases, all in one transaction.

        `adapters` None means every adapter, those to come included. In an adapter that is named, all goes that has
        learned from the subject, even where the subject came in by another: a copy of that one's weights, text that it
        wrote. One that is not named is drawn in where it has learned so from a version revoked here. `asked` says where
        a message that asked for it lies (topic, incarnation, partition, offset), and when it was sent (`sent_at`). With
        `until`, servers answer with the releases that they have until their rebuild, or that time at the latest. A
        request id seen before changes nothing and gives the procedure as it stands; `Conflict` where that was about
        somebody else, or did not name all of these adapters, or a `receipt` has been written for one that is to begin
        now. An adapter that does not exist is `NotFound`; `ahead` suppresses by its name, for when it is made.
        """
        if not request or len(request) > 128 or not request.isprintable():
            raise BadInput(
                "A forget needs a request id of 1 to 128 printable characters.", "Use a fresh one for each request."
            )
        if not _HASH.fullmatch(subject):
            raise BadInput("A subject is stored only as its keyed hash.", "Hash it with core.keys.SubjectKey first.")
        if adapters is not None and not adapters:
            raise BadInput("A forget names at least one adapter.", "Name adapters, or ask for all of them.")
        with self.db.write() as c:
            self._lock_all(c)
            held = c.execute(sa.select(t.forgets).where(t.forgets.c.id == request)).first()
            if held is not None:
                stands = _the_same(forget_of(held), subject, adapters)
                if receipt:
                    raise Conflict(
                        f"Request {stands.id} was begun at {stands.at}: it is too late for a receipt.",
                        "Repeat it without --receipt; one that was written then opens its certificate.",
                    )
                return self._again(c, stands, asked)
            heads = self._heads(c, adapters, missing=ahead)
            reaches, writers = seen, wrote = self._reach(c, self._mentioning(c, {subject}))
            if not seen.keys() <= heads.keys():
                segments = [(name, each) for name in seen.keys() & heads.keys() for each in seen[name].touched]
                copies = [(name, each) for name in seen.keys() & heads.keys() for each in seen[name].copies]
                reaches, writers = self._reach(c, segments, copies)
            lent = self._lend(c, reaches, bool(until))
            heads = self._heads(c, adapters, missing=ahead)  # calling loans in moves heads
            at, fence = now(), self._last_fence(c) + 1
            # The journal binds the time of the fence; of a loan's, when it is called in.
            about = {"request": request, "subject": subject, **({"until": until} if lent else {"fenced_at": at})}
            doomed = []
            for name, reach in sorted(reaches.items()):
                mentions = {subject} | wrote if name in heads else writers
                more = {"lent": lent[name][0]} if name in lent else {}
                more |= {} if name in heads else {"drawn_in": True}  # the subject is not suppressed there
                doomed.append(self._forget_one(c, reach, mentions, {**about, **more}, actor, reason))
            spared = [head for name, head in heads.items() if name not in reaches]
            nothing = {**about, "entries": 0}
            self._apply_all(
                c, [(head, decisions.decide_forget(head, {}, (), (), nothing)) for head in spared], actor, reason
            )
            reached = [*spared, *(reach.head for reach in reaches.values())]
            epochs = dict.fromkeys(adapters or (), 0) | {head.name: head.epoch + 1 for head in reached}
            for name in sorted(set(adapters)) if adapters is not None else [EVERYWHERE]:
                self._suppress(c, name, subject)
            digests = {digest for part in doomed for digest in part["digests"]}
            # Even those that a clean version elsewhere has: servers free them again for that one once nothing else is
            # on its way.
            digests -= {digest for _, digest in lent.values()}
            c.execute(t.fences.insert().values(number=fence, at=at, digests=sorted(digests)))
            forget = Forget(
                request,
                subject,
                adapters is None,
                dict(sorted(epochs.items())),
                fence,
                Stage.LENDING if lent else Stage.FENCED,
                at,
                actor,
                reason,
                {
                    "doomed": doomed,
                    "named": None if adapters is None else sorted(set(adapters)),
                    **({"asked": dict(asked)} if asked else {}),
                    **({"lent": lent, "until": until} if lent else {}),
                },
            )
            c.execute(t.forgets.insert().values(asdict(forget)))
        return forget

    def _again(self, c: sa.Connection, held: Forget, asked: Mapping[str, Any] | None) -> Forget:
        """A procedure that is asked for again by a message, which it is to remove with all those before it."""
        if not asked or held.stage is Stage.PURGED:
            return held
        held = replace(held, body={**held.body, "asked": dict(asked)})
        c.execute(t.forgets.update().where(t.forgets.c.id == held.id).values(body=held.body))
        return held

    def _lend(self, c: sa.Connection, reaches: dict[str, Reach], lending: bool) -> dict[str, tuple[int, str]]:
        """The versions that servers keep for a while, and their digests. Those that are on loan already stay so, or are
        called in where this forget concerns them and lends nothing."""
        loans = {name: loan for name, loan in self._loans(c).items() if name in reaches}
        if lending:
            served = [(name, reach.head.release, reach) for name, reach in reaches.items()]
            new = {name: (v, reach.versions[v].digest) for name, v, reach in served if v in reach.dirty}
            return {name: loans.get(name) or new[name] for name in sorted(loans.keys() | new.keys())}
        concerned = {name for name, (version, _) in loans.items() if version in reaches[name].dirty}
        if concerned:
            self._call_in(c, {held.id for held in self._lending(c) if concerned & held.body["lent"].keys()})
            for name, reach in reaches.items():
                reach.head = self._adapter(c, name, lock=True)
        return {}

    def _heads(self, c: sa.Connection, names: Sequence[str] | None, missing: bool = False) -> dict[str, AdapterRecord]:
        """The heads of these adapters (None: of all), by name. Some may be `missing`: they are left out."""
        if names is None or missing:
            rows = c.execute(sa.select(t.adapters).order_by(t.adapters.c.name))
            return {row.name: adapter_of(row) for row in rows if names is None or row.name in names}
        return {name: self._adapter(c, name, lock=True) for name in sorted(set(names))}

    def _forget_one(
        self,
        c: sa.Connection,
        reach: Reach,
        mentions: set[str],
        about: Mapping[str, Any],
        actor: str,
        reason: str,
    ) -> dict[str, Any]:
        """Erase in an adapter's manifests, then move its head; what purge must remove of it is returned."""
        head, versions = reach.head, reach.versions
        indexes: list[int] = []
        for number in sorted(reach.touched):
            segment, before = self._segment(c, head.name, number), self._manifest(c, head.name, number)
            after = before.erased(mentions)
            pairs = enumerate(zip(before.entries, after.entries, strict=True), start=segment.first)
            indexes += [index for index, (old, new) in pairs if new.tombstone and not old.tombstone]
            s, m = t.segments.c, t.mentions.c
            c.execute(
                t.segments.update().where(s.adapter == head.name, s.number == number).values(manifest=after.pack())
            )
            gone = sorted(before.mentions - after.mentions)
            for chunk in chunks(gone):
                c.execute(t.mentions.delete().where(m.adapter == head.name, m.segment == number, m.mention.in_(chunk)))
        about = {**about, "entries": len(indexes)}
        segments = self._segments(c, head.name)
        change = decisions.decide_forget(head, versions, segments, reach.touched, about, reach.copies)
        self._apply(c, head, change, actor, reason)
        clean = change.adapter.tip
        return {
            "adapter": head.name,
            "segments": sorted(reach.touched),
            "indexes": indexes,
            "entries": len(indexes),
            "versions": list(change.revoked),
            "digests": sorted({versions[v].digest for v in change.revoked}),
            "states": sorted({versions[v].state for v in change.revoked} - {""}),
            "rebuild": [segment.number for segment in change.segments],
            "clean": {"version": clean, "digest": versions[clean].digest if clean else ""},
        }

    def _suppress(self, c: sa.Connection, adapter: str, subject: str) -> None:
        self.db.put(c, t.suppressions, {"adapter": adapter, "subject": subject}, {"since": now()}, replace=False)

    def allow(
        self,
        subject: str,
        adapters: Sequence[str] | None,
        actor: str,
        reason: str = "",
        request: str | None = None,
        ends: Mapping[tuple[str, int], int] | None = None,
        fence: int | None = None,
        asked: Mapping[str, Any] | None = None,
    ) -> list[str]:
        """End suppression: the subject's events from each adapter's present index on may be learned again, but for
        those that lie in Kafka before the `ends` of its log, by (incarnation, partition).

        Where it has been forgotten after the `fence` that these ends were read at, or after the message that `asked`
        (see `forget`), it stays so. Returns the adapters (or `*`) for which the subject was suppressed. A request id
        seen before changes nothing; `Conflict` where that was about somebody else, for some adapters of a subject that
        is suppressed for all, and where all that was to end has been forgotten since.
        """
        s = t.suppressions.c
        with self.db.write() as c:
            self._lock_all(c)
            if request is not None:
                held_for, new = self._remember(c, f"allow:{request}"[:192], subject)
                if not new:
                    if _HASH.fullmatch(held_for) and held_for != subject:  # an older ledger kept a time
                        raise Conflict(
                            f"Request {request[:80]} was about somebody else.", "Use a fresh id for each request."
                        )
                    return []
            held = self._suppressed_in(c, subject)
            if adapters is not None and EVERYWHERE in held:
                raise Conflict(
                    "The subject is suppressed for all adapters.",
                    'Allow it with --all-adapters, or `"all_adapters": true`.',
                )
            wanted = held if adapters is None else held & set(adapters)
            since = self._forgotten_since(c, subject, fence, asked)
            lifted = [] if EVERYWHERE in since else sorted(wanted - since)
            if wanted and not lifted:
                raise Conflict(
                    "The subject was forgotten again after this was asked for.",
                    "Allow it again, if that is wanted still.",
                )
            for chunk in chunks(lifted):
                c.execute(t.suppressions.delete().where(s.subject == subject, s.adapter.in_(chunk)))
            for name in lifted if ends else ():
                places = json.dumps([[*where, end] for where, end in sorted((ends or {}).items())])
                self.db.put(c, t.meta, {"key": f"allowed/{name}/{subject}"}, {"value": places})
            found = self._heads(c, None if EVERYWHERE in lifted else lifted, missing=True)
            heads = [head for name, head in found.items() if name not in since]
            facts = [("allow", {"subject": subject, "index": head.next_index}) for head in heads]
            changes = [(head, Change(head, (fact,))) for head, fact in zip(heads, facts, strict=True)]
            self._apply_all(c, changes, actor, reason)
        return lifted

    def _forgotten_since(
        self, c: sa.Connection, subject: str, fence: int | None, asked: Mapping[str, Any] | None
    ) -> set[str]:
        """The adapters (`*`: all) in which a subject was forgotten after an allow was asked for."""
        rows = c.execute(sa.select(t.forgets).where(t.forgets.c.subject == subject))
        since = [
            held
            for held in map(forget_of, rows)
            if (fence is not None and held.fence > fence) or (asked and _was_sent_later(held, asked))
        ]
        return {name for held in since for name in held.body["named"] or [EVERYWHERE]}

    def suppressed_in(self, subject: str) -> set[str]:
        """The adapters that must not learn from a subject (`*`: all, those to come included)."""
        with self.db.read() as c:
            return self._suppressed_in(c, subject)

    def _suppressed_in(self, c: sa.Connection, subject: str) -> set[str]:
        s = t.suppressions.c
        return set(c.execute(sa.select(s.adapter).where(s.subject == subject)).scalars())

    def suppressed(self, adapter: str) -> frozenset[str]:
        """The keyed hashes of the subjects that an adapter must not learn from."""
        with self.db.read() as c:
            return self._suppressed(c, adapter)

    def forgets(self, unfinished: bool = False, after: int = 0) -> list[Forget]:
        """Forget procedures, oldest first; those with a fence `after` that number."""
        with self.db.read() as c:
            if after and self._last_fence(c) <= after:  # their table is long, and has no index by fence
                return []
            return self._forgets(c, unfinished, after)

    def _forgets(self, c: sa.Connection, unfinished: bool, after: int = 0) -> list[Forget]:
        query = sa.select(t.forgets).where(t.forgets.c.fence > after).order_by(t.forgets.c.fence)
        if unfinished:
            query = query.where(t.forgets.c.stage != Stage.PURGED)
        return [forget_of(row) for row in c.execute(query)]

    def settled(self) -> bool:
        """Whether no forget is under way. What it erases and where is not read: that is long where it is of many."""
        waiting = [stage for stage in Stage if stage is not Stage.PURGED]  # the finished are not looked through
        with self.db.read() as c:
            return not c.execute(sa.select(sa.exists().where(t.forgets.c.stage.in_(waiting)))).scalar()

    def forget_of(self, request: str) -> Forget:
        """One forget procedure."""
        with self.db.read() as c:
            return self._forget_of(c, request)

    def _forget_of(self, c: sa.Connection, request: str, lock: bool = False) -> Forget:
        query = sa.select(t.forgets).where(t.forgets.c.id == request)
        # Every id is printable, and PostgreSQL takes no NUL.
        row = c.execute(query.with_for_update() if lock else query).first() if request.isprintable() else None
        if row is None:
            raise NotFound(
                f"There is no forget {request[:80]}.", "`riverdelta registry list --all` shows those there are."
            )
        return forget_of(row)

    def advance(self, request: str, stage: Stage, body: Mapping[str, Any], actor: str) -> Forget:
        """Record that a procedure has reached a stage; reaching it again changes nothing."""
        with self.db.write() as c:
            forget = self._forget_of(c, request, lock=True)
            if _ORDER.index(stage) <= _ORDER.index(forget.stage):
                return forget
            moved = replace(forget, stage=stage, body={**forget.body, **body})
            c.execute(t.forgets.update().where(t.forgets.c.id == request).values(stage=stage, body=moved.body))
            for name in sorted(part["adapter"] for part in forget.body["doomed"]):  # elsewhere there is nothing to do
                head = self._adapter(c, name, lock=True)
                fact = ("forget_stage", {"request": request, "stage": str(stage)})
                self._apply(c, head, Change(head, (fact,)), actor, "")
        return moved

    def is_rebuilt(self, forget: Forget) -> bool:
        """Whether nothing that the forget set back still awaits its rebuild."""
        return not self.count_rebuild(forget)[1]

    def count_rebuild(self, forget: Forget) -> tuple[int, int]:
        """How many segments the forget set back, and how many of them still await their rebuild."""
        s = t.segments.c
        left = 0
        with self.db.read() as c:
            for part in forget.body["doomed"]:
                for chunk in chunks(part["rebuild"]):
                    waiting = sa.select(sa.func.count()).where(
                        s.adapter == part["adapter"], s.number.in_(chunk), s.outcome == Outcome.AWAITING
                    )
                    left += int(c.execute(waiting).scalar() or 0)
        return sum(len(part["rebuild"]) for part in forget.body["doomed"]), left

    def replace_payload(self, adapter: str, segment: int, payload: str, payload_sha: str, replaces: str) -> None:
        """Point a segment at a payload rewritten without its tombstones' contents; `Conflict` unless it still points
        at the one that `replaces` names."""
        s = t.segments.c
        with self.db.write() as c:
            moved = c.execute(
                t.segments.update()
                .where(s.adapter == adapter, s.number == segment, s.payload == replaces)
                .values(payload=payload, payload_sha=payload_sha)
            )
            if not moved.rowcount:
                raise Conflict(f"The payload of {adapter}'s segment {segment} has been rewritten.", "Read it again.")

    def mark_purged(self, adapter: str, versions: Sequence[int]) -> None:
        """Record that versions' weights and state are gone from the store and from MLflow, and drop what was measured
        of them."""
        v = t.versions.c
        with self.db.write() as c:
            for chunk in chunks(versions):
                c.execute(
                    t.versions.update()
                    .where(v.adapter == adapter, v.number.in_(chunk))
                    .values(purged=True, metrics={}, parts=[], withheld="")
                )

    def named_objects(self, but: Mapping[str, Mapping[str, Collection[int]]] | None = None) -> frozenset[str]:
        """The object store's keys that a segment or a version not yet purged names, and `keys/KEYRING` for each
        segment's keys in the key store; as if, per adapter, `but` these `segments` and `versions`."""
        s, v = t.segments.c, t.versions.c
        with self.db.read() as c:
            segments = list(c.execute(sa.select(s.adapter, s.number, s.payload, s.keyring).where(s.payload != "")))
            rows = list(c.execute(sa.select(v.adapter, v.number, v.digest, v.state).where(v.purged.is_(False))))
        if but:
            none: Mapping[str, Collection[int]] = {"segments": (), "versions": ()}
            segments = [row for row in segments if row.number not in but.get(row.adapter, none)["segments"]]
            rows = [row for row in rows if row.number not in but.get(row.adapter, none)["versions"]]
        return frozenset(
            {row.payload for row in segments}
            | {f"keys/{row.keyring}" for row in segments}
            | {weights_key(row.digest) for row in rows}
            | {state_key(row.state) for row in rows if row.state}
        )

    def delete_unnamed(self, keys: Collection[str], delete: Callable[[str], None], revoked: bool = False) -> None:
        """Delete those of these objects and keys that nothing names, while nothing can come to name them. `revoked`:
        what only revoked versions name goes too, but for weights on loan.

        The ledger is held for some at a time only: leases run out, and fences wait, while it is.
        """
        left = sorted(keys, reverse=True)
        while left:
            with self.db.write() as c:
                if not self.db.sqlite:
                    c.execute(sa.text("LOCK TABLE segments, versions IN SHARE ROW EXCLUSIVE MODE"))
                some = next(chunks(left))
                named, since, done = self._named_of(c, some, revoked), time.monotonic(), 0
                while done < len(some) and time.monotonic() - since < _HOLD_SECONDS:
                    if some[done] not in named:
                        delete(some[done])
                    done += 1
            left = left[done:]
            time.sleep(_YIELD_SECONDS if left else 0.0)

    def _named_of(self, c: sa.Connection, keys: Sequence[str], but_revoked: bool) -> set[str]:
        """Those of these keys that something names, a chunk's. Only they are looked up: the ledger may name very many,
        and is held meanwhile."""
        s, v = t.segments.c, t.versions.c
        kept, stands = s.payload != "", sa.and_(v.purged.is_(False), *([v.revoked.is_(False)] if but_revoked else []))
        named, others = set[str](), set(keys)
        for key_of, column, where in (
            ("keys/{}".format, s.keyring, kept),
            (weights_key, v.digest, stands),
            (state_key, v.state, sa.and_(stands, v.state != "")),
            ("{}".format, s.payload, kept),  # all that is left
        ):
            before, after = key_of("*").split("*")
            mine = {key for key in others if key.startswith(before) and key.endswith(after)}
            others -= mine
            names = [key.removeprefix(before).removesuffix(after) for key in sorted(mine)]
            if names:
                held = c.execute(sa.select(column).where(column.in_(names), where)).scalars()
                named |= {key_of(name) for name in held}
        if but_revoked:
            named |= {weights_key(digest) for _, digest in self._loans(c).values()}.intersection(keys)
        return named

    def in_use(self, digests: Collection[str]) -> frozenset[str]:
        """Those of these weights that a purge leaves: a version that is not revoked has them, or they are on loan."""
        keys, left = {weights_key(digest): digest for digest in digests}, set[str]()
        with self.db.read() as c:
            for chunk in chunks(sorted(keys)):
                left |= self._named_of(c, chunk, but_revoked=True)
        return frozenset(keys[key] for key in left)

    def revoked_digests(self) -> frozenset[str]:
        """Weights digests that only revoked versions have: text that they wrote must not be learned."""
        v = t.versions.c
        with self.db.read() as c:
            revoked = set(c.execute(sa.select(v.digest).where(v.revoked.is_(True))).scalars())
            return frozenset(self._only_revoked(c, revoked))


def _was_sent_later(held: Forget, asked: Mapping[str, Any]) -> bool:
    """Whether a forget was asked for after a message was sent. On one partition the order is sure; else the times are
    compared."""
    mine = held.body.get("asked", {})
    if all(mine.get(each) == asked[each] for each in ("incarnation", "partition")):
        return int(mine["offset"]) > int(asked["offset"])
    return str(mine.get("sent_at") or held.at) > str(asked["sent_at"])


def _the_same(held: Forget, subject: str, adapters: Sequence[str] | None) -> Forget:
    """A procedure that is asked for again; whoever asks for another under its id must not take this one for done."""
    covers = held.everywhere or (adapters is not None and set(adapters) <= set(held.body["named"]))
    if held.subject != subject or not covers:
        raise Conflict(f"Request {held.id[:80]} was about something else.", "Use a fresh id for each request.")
    return held
