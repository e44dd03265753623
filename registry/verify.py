"""Verify: is what the ledger and the store hold what was written?"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from riverdelta.core import merkle, payload
from riverdelta.core.digests import canonical_json, sha256
from riverdelta.core.errors import Corrupt, NotFound, Unsupported
from riverdelta.core.store import ObjectStore, state_key, weights_key

from . import contents
from .keystore import KeyStore
from .ledger import Fact, Ledger, SegmentRecord
from .ledger.journal import chained


@dataclass(frozen=True)
class Verified:
    """What was checked of an adapter, and every problem found, each naming what is wrong."""

    adapter: str
    facts: int
    segments: int
    versions: int
    problems: tuple[str, ...]


def verify(ledger: Ledger, store: ObjectStore, keys: KeyStore, adapter: str) -> Verified:
    """Check an adapter's journal and head, manifests, payloads, keys and unpurged versions."""
    head, known = ledger.adapter(adapter), ledger.versions(adapter)
    facts = [fact for fact in ledger.facts(adapter) if fact.seq <= head.head]  # others may be writing meanwhile
    segments = ledger.segments(adapter)
    versions = [version for version in known.values() if not version.purged]
    problems = []
    try:
        check_chain(facts)
    except Corrupt as error:
        problems.append(error.message)
    if len(facts) != head.head:
        problems.append(f"The journal has {len(facts)} facts; the head says {head.head}.")
    for what, number in (("release", head.release), ("tip", head.tip)):
        if number and (number not in known or known[number].revoked):
            problems.append(f"The {what} is version {number}, which is revoked or not there.")
    sealed = {fact.body["segment"]: fact.body for fact in facts if fact.kind == "sealed"}
    settled = not ledger.forgets(unfinished=True)
    following = tombstones = 0
    for segment in segments:
        if segment.first != following:
            problems.append(f"Segment {segment.number} begins at index {segment.first}, not {following}.")
        following = segment.first + segment.count
        try:
            tombstones += _check_segment(ledger, store, keys, segment, sealed.get(segment.number, {}), settled)
        except (Corrupt, NotFound, Unsupported) as error:
            problems.append(f"Segment {segment.number}: {error.message}")
    told = sum(body["tombstones"] for body in sealed.values())
    told += sum(fact.body["entries"] for fact in facts if fact.kind == "forget")
    if settled and not problems and tombstones != told:
        problems.append(f"The manifests have {tombstones} tombstones; the journal says {told}.")
    for version in versions:
        for key, digest in ((weights_key(version.digest), version.digest), (state_key(version.state), version.state)):
            if digest:
                problems += [f"Version {version.number}: {problem}" for problem in _check_object(store, key, digest)]
    return Verified(adapter, len(facts), len(segments), len(versions), tuple(problems))


def _check_segment(
    ledger: Ledger, store: ObjectStore, keys: KeyStore, segment: SegmentRecord, sealed: dict[str, Any], settled: bool
) -> int:
    """How many tombstones a segment has; `Corrupt` names what is not as the journal says it was sealed."""
    manifest = ledger.manifest(segment.adapter, segment.number)
    if manifest.digest != sealed.get("manifest"):
        raise Corrupt("its manifest is not what was sealed.")
    if merkle.root(manifest.commitments).hex() != segment.root or segment.root != sealed.get("root"):
        raise Corrupt("its root is not that of its entries' commitments.")
    live = [not entry.tombstone for entry in manifest.entries]
    if segment.dropped:
        return live.count(False)
    contents.read_openings(store, keys, segment, manifest)
    held = keys.get(segment.keyring)
    if settled and payload.without_keys(held, [entry.mentions for entry in manifest.entries], live) != held:
        raise Corrupt("the key store still holds a key that only erased entries had.")
    return live.count(False)


def _check_object(store: ObjectStore, key: str, digest: str) -> list[str]:
    try:
        held = sha256(store.get(key))
    except NotFound as error:
        return [error.message]
    return [] if held == digest else [f"{key} has the SHA-256 {held}."]


def check_chain(facts: Iterable[Fact]) -> None:
    """Each fact of an adapter follows the one before it, under a chain of digests; `Corrupt` names the first that
    does not."""
    chain = ""
    for number, fact in enumerate(facts, start=1):
        chain = chained(chain, sha256(canonical_json(fact.line)))
        if fact.seq != number or fact.chain != chain:
            raise Corrupt(
                f"Fact {number} of {fact.adapter} is not what was written.", "Restore the ledger from a backup."
            )
