"""Loans: what a forget that serves until rebuilt leaves in servers' hands for a while.

Such a forget does at once all that any forget does, but lets servers answer with the version that they had until the
rebuild is done or a deadline has passed. Then, or when an operator or another forget concerns the same versions, the
loan is called in: the fence that had been left out is made.
"""

from collections.abc import Collection
from typing import Any

import sqlalchemy as sa

from riverdelta.core.times import now

from . import tables as t
from .decisions import Change
from .leases import Leases
from .records import AdapterRecord, Forget, Stage
from .rows import forget_of


class Lending(Leases):
    """Versions that are revoked and served."""

    def call_in(self, requests: Collection[str] = ()) -> None:
        """End the loans of these forgets, and those whose deadline has passed."""

        def due(c: sa.Connection) -> set[str]:
            at = now()
            return {held.id for held in self._lending(c) if held.id in requests or held.body["until"] <= at}

        with self.db.read() as c:
            if not due(c):
                return
        with self.db.write() as c:
            self._lock_all(c)
            self._call_in(c, due(c))

    def _loans(self, c: sa.Connection) -> dict[str, tuple[int, str]]:
        """Per adapter that has one, the version on loan and its digest."""
        found: dict[str, tuple[int, str]] = {}
        for held in self._lending(c):
            for name, (version, digest) in held.body["lent"].items():
                found.setdefault(name, (version, digest))
        return found

    def _lending(self, c: sa.Connection) -> list[Forget]:
        query = sa.select(t.forgets).where(t.forgets.c.stage == Stage.LENDING).order_by(t.forgets.c.fence)
        return [forget_of(row) for row in c.execute(query)]

    def _call_in(self, c: sa.Connection, ending: Collection[str]) -> None:
        """Under `_lock_all`. Forgets that lend the same version end together."""
        held = {forget.id: forget for forget in self._lending(c)}
        ended, names = set[str](), set[str]()
        while more := {each for each, f in held.items() if each in ending or names & f.body["lent"].keys()} - ended:
            ended |= more
            names |= {name for each in more for name in held[each].body["lent"]}
        if not ended:
            return
        digests = {digest for each in ended for _, digest in held[each].body["lent"].values()}
        fence, at = self._last_fence(c) + 1, now()
        c.execute(t.fences.insert().values(number=fence, at=at, digests=sorted(digests)))
        for each in sorted(ended):
            body = {**held[each].body, "fenced_at": at, "began": held[each].fence}
            moved = t.forgets.update().where(t.forgets.c.id == each)
            c.execute(moved.values(stage=Stage.FENCED, fence=fence, body=body))
            for name in sorted(held[each].body["lent"]):
                head = self._adapter(c, name, lock=True)
                self._apply(c, head, Change(head, (_fact(each, head, at),)), "ledger", "")

    def _take_back(self, c: sa.Connection, adapter: str) -> None:
        """What an operator does to an adapter is felt at once."""
        lending = {held.id for held in self._lending(c) if adapter in held.body["lent"]}
        if lending:
            self._lock_all(c)
            self._call_in(c, lending)


def _fact(request: str, head: AdapterRecord, at: str) -> tuple[str, dict[str, Any]]:
    return "forget_stage", {"request": request, "stage": str(Stage.FENCED), "to": head.release, "fenced_at": at}
