"""Claims in the ledger: which trainer works on which adapter now."""

from collections.abc import Mapping, Sequence

import sqlalchemy as sa

from . import tables as t
from .claiming import Claim, check_token, decide_claim, decide_end, decide_renewal
from .journal import Journal, chunks


class Claims(Journal):
    """Taking, renewing and giving up claims, on the ledger's own clock."""

    def claim(self, adapters: Sequence[str], holder: str, seconds: float, most: int) -> dict[str, int]:
        """Claim the first `most` of these adapters that nobody else holds; the token of each."""
        with self.db.write() as c:
            self._lock(c, adapters)
            held, now = self._claims(c, adapters), self._clock(c)
            taken: dict[str, int] = {}
            for name in adapters:
                if len(taken) == most:
                    break
                if (claim := decide_claim(held.get(name), name, holder, now, seconds)) is not None:
                    self._keep(c, claim)
                    taken[name] = claim.token
        return taken

    def renew_claims(self, tokens: Mapping[str, int], holder: str, seconds: float) -> set[str]:
        """Another term for claims, by adapter and token; those that are lost."""
        lost = set()
        with self.db.write(durable=False) as c:  # a term that a crash of the machine undoes is a term lost, no more
            self._lock(c, list(tokens))
            held, now = self._claims(c, list(tokens)), self._clock(c)
            for name, token in tokens.items():
                claim = decide_renewal(held.get(name), holder, token, now, seconds)
                if claim is None:
                    lost.add(name)
                else:
                    self._keep(c, claim)
        return lost

    def end_claims(self, tokens: Mapping[str, int], holder: str) -> None:
        """Give claims up, those that are still the holder's."""
        with self.db.write(durable=False) as c:
            self._lock(c, list(tokens))
            held = self._claims(c, list(tokens))
            for name, token in tokens.items():
                if (claim := decide_end(held.get(name), holder, token)) is not None:
                    self._keep(c, claim)

    def claims(self) -> list[Claim]:
        """Every adapter's last claim, by name."""
        with self.db.read() as c:
            return [Claim(*row) for row in c.execute(sa.select(t.claims).order_by(t.claims.c.adapter))]

    def unclaimed(self, adapters: Sequence[str]) -> list[str]:
        """Those of these adapters that nobody holds now, in the order given."""
        with self.db.read() as c:
            held, now = self._claims(c, adapters), self._clock(c)
        return [name for name in adapters if name not in held or not held[name].holder or held[name].expires <= now]

    def _check_claim(self, c: sa.Connection, adapter: str, token: int, holder: str) -> None:
        """Under the adapter's lock: that the holder did the work under the adapter's last claim."""
        check_token(self._claims(c, [adapter]).get(adapter), adapter, token, holder)

    def _claims(self, c: sa.Connection, adapters: Sequence[str]) -> dict[str, Claim]:
        found = {}
        for names in chunks(adapters):
            rows = c.execute(sa.select(t.claims).where(t.claims.c.adapter.in_(names)))
            found.update({row.adapter: Claim(*row) for row in rows})
        return found

    def _keep(self, c: sa.Connection, claim: Claim) -> None:
        values = {"holder": claim.holder, "token": claim.token, "expires": claim.expires}
        self.db.put(c, t.claims, {"adapter": claim.adapter}, values)

    def _lock(self, c: sa.Connection, adapters: Sequence[str]) -> None:
        """Adapters by name, as every transaction does, so that a claim and an outcome come one after the other."""
        if not self.db.sqlite:
            a = t.adapters.c.name
            for names in chunks(sorted(adapters)):
                c.execute(sa.select(a).where(a.in_(names)).order_by(a).with_for_update())

    def _clock(self, c: sa.Connection) -> float:
        """The ledger's clock, seconds since 1970."""
        said = "(julianday('now') - 2440587.5) * 86400.0" if self.db.sqlite else "extract(epoch from clock_timestamp())"
        return float(c.execute(sa.text(f"SELECT {said}")).scalar_one())
