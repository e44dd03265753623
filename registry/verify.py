"""Verify: is what the ledger and the store hold what was written?"""

from collections.abc import Iterable

from riverdelta.core.digests import canonical_json, sha256
from riverdelta.core.errors import Corrupt

from .ledger import Fact


def check_chain(facts: Iterable[Fact]) -> None:
    """Each fact of an adapter follows the one before it, under a chain of digests; `Corrupt` names the first that
    does not."""
    chain = ""
    for number, fact in enumerate(facts, start=1):
        line = [fact.adapter, fact.seq, fact.kind, fact.body, fact.at, fact.actor, fact.reason]
        chain = sha256(chain.encode() + canonical_json(line))
        if fact.seq != number or fact.chain != chain:
            raise Corrupt(
                f"Fact {number} of {fact.adapter} is not what was written.", "Restore the ledger from a backup."
            )
