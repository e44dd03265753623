"""Leases: which processes may act on what they have read, and how far each has carried out the fences.

A lease is extended only for a holder that has carried out every fence there is. So once a fence is durable, each
holder either acknowledges it or, after its lease's length on its own clock, stops by itself; whoever waits needs no
clock but its own (the rule of Gray and Cheriton's leases, 1989, with the holder's clock started before it asks).

A ledger that was restored from a backup counts fences from an earlier one again, so their numbers mean nothing to a
holder from before: its lease is not renewed where the row is another than it wrote itself.
"""

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass

import sqlalchemy as sa

from riverdelta.core.errors import NotFound
from riverdelta.core.times import later, now

from . import tables as t
from .database import Database
from .journal import Journal
from .records import Lease
from .rows import lease_of

_GLANCE_SECONDS = 0.002  # between two looks at whether somebody has acknowledged
_GLANCES = 25  # before a full look, which also finds leases that ran out
# The last fence, and a sum that rises with every fact. Not the highest fact id: on PostgreSQL a lower one may commit
# later.
_PULSE = sa.select(
    sa.func.coalesce(sa.select(sa.func.max(t.fences.c.number)).scalar_subquery(), 0),
    sa.func.coalesce(sa.func.sum(t.adapters.c.head), 0),
)


@dataclass(frozen=True)
class Fence:
    """The point after which no weights with these digests may produce a token."""

    number: int
    at: str
    digests: frozenset[str]


class Leases(Journal):
    """Leases and fences."""

    def __init__(self, db: Database) -> None:
        super().__init__(db)
        # By holder, what its row may say of its last renewal: an answer can be lost on its way back.
        self._terms: dict[str, set[str]] = {}

    def take_lease(self, holder: str, kind: str, ttl: float) -> int:
        """Take a lease of `ttl` seconds before reading anything; the last fence's number, all of which the
        holder has nothing left to do for. `kind` is `server`, `stream`, `trainer` or `registry`."""
        with self.db.write() as c:
            if not self.db.sqlite:
                c.execute(sa.text("LOCK TABLE fences IN EXCLUSIVE MODE"))  # no fence may pass between look and lease
            fence, at = self._last_fence(c), now()
            c.execute(t.leases.delete().where(t.leases.c.holder == holder))
            c.execute(t.leases.insert().values(holder=holder, kind=kind, ttl=ttl, acked=fence, renewed_at=at))
        self._terms[holder] = {at}
        return fence

    def renew_lease(self, holder: str, acked: int) -> int:
        """Acknowledge the fences up to `acked` and ask for another term: the number of the last fence.

        The term is granted only when the two are equal; otherwise carry out `fences(acked)` and ask again.
        `NotFound` when the lease was given up for lost, or this is no longer the ledger that it was taken in: drop
        everything, then take a new one. Until then the row stays, so that a forget waits for the holder.
        """
        h, at, terms = t.leases.c, now(), self._terms.get(holder, set())
        # An acknowledgement that a crash of the machine undoes only makes whoever waits for it wait longer.
        with self.db.write(durable=False) as c:
            fence = self._last_fence(c)
            row = c.execute(sa.select(h.renewed_at).where(h.holder == holder).with_for_update()).first()
            if row is None or acked > fence or (terms and row.renewed_at not in terms):
                raise NotFound(f"{holder} holds no lease.", "Drop what was read under it and take a new one.")
            values: dict[str, int | str] = {"acked": acked}
            if acked == fence:
                self._terms[holder] = {row.renewed_at, at}
                values["renewed_at"] = at
            c.execute(t.leases.update().where(h.holder == holder).values(values))
        return fence

    def drop_lease(self, holder: str) -> None:
        """Give a lease up; its holder has stopped."""
        self._terms.pop(holder, None)
        with self.db.write() as c:
            c.execute(t.leases.delete().where(t.leases.c.holder == holder))

    def leases(self, kinds: Collection[str] = ()) -> list[Lease]:
        """The leases of these kinds (default: all), lost ones that nobody waited for included."""
        query = sa.select(t.leases).order_by(t.leases.c.holder)
        with self.db.read() as c:
            return [lease_of(row) for row in c.execute(query.where(t.leases.c.kind.in_(kinds)) if kinds else query)]

    def count_live(self, kind: str) -> int:
        """How many holders of a kind have renewed lately, by those that have."""
        leases = self.leases((kind,))
        newest = max((lease.renewed_at for lease in leases), default="")
        return sum(later(lease.renewed_at, 2 * lease.ttl) >= newest for lease in leases)

    def fences(self, after: int) -> list[Fence]:
        """The fences after a number, in order."""
        query = sa.select(t.fences).where(t.fences.c.number > after).order_by(t.fences.c.number)
        with self.db.read() as c:
            return [Fence(row.number, row.at, frozenset(row.digests)) for row in c.execute(query)]

    def pulse(self) -> tuple[int, int]:
        """The number of the last fence, and one that rises with every fact of any adapter; cheap to read often."""
        with self.db.read() as c:
            fence, clock = c.execute(_PULSE).one()
        return int(fence), int(clock)

    def watch_pulse(self) -> Callable[[], tuple[int, int] | None] | None:
        """What gives the pulse if others have written since it last did, where that can be seen at once; belongs to
        the thread that made it."""
        return self.db.watch(_PULSE)

    def last_fence(self) -> int:
        """The number of the last fence, 0 when there is none."""
        with self.db.read() as c:
            return self._last_fence(c)

    def unacknowledged(self, fence: int, kinds: Collection[str]) -> list[Lease]:
        """The leases that have not carried out a fence."""
        return [lease for lease in self.leases(kinds) if lease.acked < fence]

    def await_fence(
        self,
        fence: int,
        kinds: Collection[str],
        progress: Callable[[list[Lease]], None] | None = None,
    ) -> list[str]:
        """Wait until every lease of these kinds has acknowledged a durable fence or has run out.

        Returns the holders whose leases ran out; they are given up for lost.
        """
        start = time.monotonic()
        lost: list[str] = []
        waits = sa.select(sa.func.count()).where(t.leases.c.kind.in_(kinds), t.leases.c.acked < fence)
        look = self.db.watch(waits)
        while True:
            open_leases, given_up = self.settle_fence(fence, kinds, time.monotonic() - start)
            lost += given_up
            if not open_leases:
                return lost
            if progress is not None:
                progress(open_leases)
            for _ in range(_GLANCES):
                time.sleep(_GLANCE_SECONDS)
                if look is None or look() == (0,):
                    break

    def settle_fence(self, fence: int, kinds: Collection[str], waited: float) -> tuple[list[Lease], list[str]]:
        """The leases that a fence still waits for, and the holders given up for lost now: those whose lease has run
        out, as `waited` seconds have passed on the caller's clock since it first saw the fence."""
        left, lost = [], []
        for lease in self.unacknowledged(fence, kinds):
            if waited > lease.ttl * 1.1 + 0.1 and self._give_up(lease, fence):  # clocks differ by less than a tenth
                lost.append(lease.holder)
            else:
                left.append(lease)
        return left, lost

    def _give_up(self, lease: Lease, fence: int) -> bool:
        held = (t.leases.c.holder == lease.holder, t.leases.c.acked < fence)
        with self.db.write() as c:
            return c.execute(t.leases.delete().where(*held)).rowcount > 0

    def _last_fence(self, c: sa.Connection) -> int:
        return int(c.execute(sa.select(sa.func.max(t.fences.c.number))).scalar() or 0)
