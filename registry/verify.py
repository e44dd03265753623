"""Verify: is what the ledger and the store hold what was written?"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from riverdelta.core import merkle, payload
from riverdelta.core.digests import canonical_json, sha256
from riverdelta.core.errors import Corrupt, NotFound, Unsupported
from riverdelta.core.store import ObjectStore, state_key, weights_key

from . import contents
from .keystore import KeyStore
from .ledger import AdapterRecord, Fact, Ledger, SegmentRecord, VersionRecord
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
    """Check an adapter's journal, and by it head, versions, suppressions and manifests; payloads, keys and unpurged
    versions."""
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
    problems += _check_release(head, facts)
    problems += _check_versions(head, known, facts)
    problems += _check_suppressions(ledger, head, facts)
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


def _check_release(head: AdapterRecord, facts: Sequence[Fact]) -> list[str]:
    release = next((fact.body["to"] for fact in reversed(facts) if "to" in fact.body), 0)
    return [] if release == head.release else [f"The release is {head.release}; the journal says {release}."]


def _check_versions(head: AdapterRecord, known: Mapping[int, VersionRecord], facts: Sequence[Fact]) -> list[str]:
    """What the ledger says of versions otherwise than the lines that made and revoked them."""
    made = {fact.body["version"]: fact.body for fact in facts if fact.kind in ("increment", "imported")}
    revoked = {number for fact in facts if fact.kind == "forget" for number in fact.body["revoked"]}
    problems = []
    for number in sorted(made.keys() | {number for number in known if number < head.next_version}):
        version, said = known.get(number), made.get(number)
        if version is None or said is None:
            problems.append(f"Version {number} is {'not there' if version is None else 'not in the journal'}.")
            continue
        parts = said.get("parts", []) if not version.purged else []
        for what, held, told in (
            ("weights", version.digest, said["digest"]),
            ("a parent", version.parent, said.get("parent", 0)),
            ("a segment", version.segment, said.get("segment")),
            ("parts", [part.digest for part in version.parts] if not version.purged else [], parts),
        ):
            if held != told:
                problems.append(f"Version {number} has {what} that the journal does not give it: {held}, not {told}.")
        if number in revoked and not version.revoked:
            problems.append(f"Version {number} is not revoked; the journal says it is.")
    return problems


def _check_suppressions(ledger: Ledger, head: AdapterRecord, facts: Sequence[Fact]) -> list[str]:
    """The subjects that the journal says are forgotten, and that would be learned from again."""
    since: dict[str, int] = {}
    suppressed = ledger.suppressed(head.name)
    for fact in [*facts, *ledger.facts(head.name, after=head.head)]:  # what was allowed meanwhile is suppressed no more
        if fact.kind == "allow":
            since.pop(fact.body["subject"], None)
        elif fact.kind == "forget" and fact.seq <= head.head and not fact.body.get("drawn_in"):
            since.setdefault(fact.body["subject"], fact.seq)
    return [
        f"The subject {subject[:12]}… is not suppressed; fact {seq} of the journal says it is."
        for subject, seq in since.items()
        if subject not in suppressed
    ]


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
