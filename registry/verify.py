"""Verify: is what the ledger and the store hold what was written?"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from riverdelta.core import merkle, payload
from riverdelta.core.digests import canonical_json, sha256
from riverdelta.core.errors import Corrupt, NotFound, Unsupported
from riverdelta.core.store import ObjectStore, state_key, weights_key

from . import contents
from .keystore import KeyStore
from .ledger import Fact, Ledger, Line, Manifest, Outcome, SegmentRecord, Stage, VersionRecord
from .ledger.journal import EVERYWHERE, chained
from .ledger.view import View
from .told import check_head

Said = TypeVar("Said")


@dataclass(frozen=True)
class Verified:
    """What was checked of an adapter, and every problem found, each naming what is wrong."""

    adapter: str
    facts: int
    segments: int
    versions: int
    problems: tuple[str, ...]


def verify(ledger: Ledger, store: ObjectStore, keys: KeyStore, adapter: str) -> Verified:
    """Check an adapter's journal, and by it head, versions, suppressions and manifests; payloads, keys and the files of
    versions that may be released.

    Others may write meanwhile. What the ledger says is read as of one moment. What the stores hold is compared with
    what the ledger says now, and is wrong only if the ledger, asked again, still says the same.
    """
    with ledger.view(adapter) as seen:
        problems, damaged, segments = check_ledger(seen)
    for number in segments:
        if number not in damaged:
            problems += _check_contents(ledger, store, keys, adapter, number)
    versions = [version.number for version in seen.versions.values() if version.usable]
    for number in versions:
        problems += _check_files(ledger, store, adapter, number)
    return Verified(adapter, len(seen.facts), len(segments), len(versions), tuple(problems))


def check_ledger(seen: View) -> tuple[list[str], set[int], list[int]]:
    """What does not go together of what the ledger says, the segments that are concerned, and all that there are."""
    head, facts, known = seen.head, seen.facts, seen.versions
    problems, damaged, segments = list[str](), set[int](), list[int]()
    try:
        check_chain(facts)
    except Corrupt as error:
        problems.append(error.message)
    if len(facts) != head.head:
        problems.append(f"The journal has {len(facts)} facts; the head says {head.head}.")
    for what, number in (("release", head.release), ("tip", head.tip)):
        if number and (number not in known or known[number].revoked):
            problems.append(f"The {what} is version {number}, which is revoked or not there.")
    problems += [*check_head(head, facts), *_check_versions(known, facts), *_check_suppressions(seen)]
    problems += _check_forgets(seen)
    # A parent that the journal does not give might lead round in a circle.
    trained = Line.of(known, head.tip).trained if not problems else None
    sealed = {fact.body["segment"]: fact.body for fact in facts if fact.kind == "sealed"}
    following = tombstones = 0
    for segment, packed in seen.segments:
        segments.append(segment.number)
        if segment.first != following:
            problems.append(f"Segment {segment.number} begins at index {segment.first}, not {following}.")
        following = segment.first + segment.count
        told_by = sealed.get(segment.number, {})
        problems += _check_segment(segment, told_by, trained)
        try:
            manifest = _check_manifest(segment, packed, told_by)
            tombstones += sum(entry.tombstone for entry in manifest.entries)
            if unfound := manifest.mentions - seen.finds(segment.number, manifest.mentions):
                problems.append(f"Segment {segment.number}: a forget would not find it by {_listed(unfound)}.")
        except Corrupt as error:
            problems.append(f"Segment {segment.number}: {error.message}")
            damaged.add(segment.number)
    problems += [f"Segment {number} is not there." for number in sorted(sealed.keys() - set(segments))]
    told = sum(body["tombstones"] for body in sealed.values())
    told += sum(fact.body["entries"] for fact in facts if fact.kind == "forget")
    if not problems and tombstones != told:
        problems.append(f"The manifests have {tombstones} tombstones; the journal says {told}.")
    return problems, damaged, segments


def _listed(hashes: Iterable[str]) -> str:
    return ", ".join(f"{each[:12]}…" for each in sorted(hashes))


def _check_segment(segment: SegmentRecord, sealed: Mapping[str, Any], trained: Mapping[int, int] | None) -> list[str]:
    """What the ledger says of a segment otherwise than the line that sealed it, or than the tip's line has learned."""
    problems = [
        f"Segment {segment.number} has the {what} {held}; the journal says {sealed[what]}."
        for what, held in (("first", segment.first), ("count", segment.count), ("trigger", segment.trigger))
        if what in sealed and sealed[what] != held
    ]
    if trained is not None:
        learned = segment.version if segment.outcome is Outcome.TRAINED else None
        if learned != (by := trained.get(segment.number)):
            problems.append(f"Segment {segment.number} is learned by version {learned}; in the tip's line, by {by}.")
    return problems


def _check_forgets(seen: View) -> list[str]:
    """The forgets that the journal tells of otherwise than their procedures are."""
    reached = {fact.body["request"]: fact.body["stage"] for fact in seen.facts if fact.kind == "forget_stage"}
    problems = []
    for fact in seen.facts:
        if fact.kind != "forget":
            continue
        said, asked = fact.body, seen.forgets.get(fact.body["request"])
        if asked is None:
            problems.append(f"The forget {said['request']} is not there; fact {fact.seq} of the journal tells of it.")
            continue
        # Where it has nothing to erase, the journal does not tell how far it has come.
        stages = {reached.get(said["request"], Stage.FENCED)} if said["segments"] or said["revoked"] else set(Stage)
        if said["request"] not in reached:
            stages.add(Stage.LENDING)
        drawn_in = said["epoch"] if asked.everywhere else asked.epoch
        if (asked.subject, drawn_in) != (said["subject"], said["epoch"]) or asked.stage not in stages:
            problems.append(
                f"The forget {said['request']} is not what fact {fact.seq} of the journal and those since say."
            )
    return problems


def _check_versions(known: Mapping[int, VersionRecord], facts: Sequence[Fact]) -> list[str]:
    """What the ledger says of versions otherwise than the lines that made and revoked them."""
    made = {fact.body["version"]: fact.body for fact in facts if fact.kind in ("increment", "imported")}
    revoked = {number for fact in facts if fact.kind == "forget" for number in fact.body["revoked"]}
    dropped = {number for fact in facts if fact.kind == "dropped" for number in fact.body["versions"]}
    problems = []
    for number in sorted(made.keys() | known.keys()):
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
        saw = said.get("saw", version.saw)  # an older ledger's journal does not say
        if list(version.saw) != list(saw) or version.segment not in (None, *version.saw):
            problems.append(f"Version {number} saw other segments than the journal says.")
        if version.revoked != (number in revoked):
            held, told = ("is", "is not") if version.revoked else ("is not", "is")
            problems.append(f"Version {number} {held} revoked; the journal says it {told}.")
        if version.purged and number not in revoked | dropped:
            problems.append(f"Version {number} has no files; the journal says that they are kept.")
        if number in dropped and not version.purged:
            problems.append(f"Version {number} has its files; the journal says that they are not kept.")
    return problems


def _check_suppressions(seen: View) -> list[str]:
    """The subjects that the journal says are forgotten, and that would be learned from again."""
    since: dict[str, int] = {}
    for fact in seen.facts:
        if fact.kind == "allow":
            since.pop(fact.body["subject"], None)
        elif fact.kind == "forget" and not fact.body.get("drawn_in"):
            since.setdefault(fact.body["subject"], fact.seq)
    return [
        f"The subject {subject[:12]}… is not suppressed; fact {seq} of the journal says it is."
        for subject, seq in since.items()
        if subject not in seen.suppressed
    ]


def _check_manifest(segment: SegmentRecord, packed: bytes, sealed: Mapping[str, Any]) -> Manifest:
    """A segment's manifest; `Corrupt` names what is not as the journal says it was sealed."""
    manifest = Manifest.unpack(packed)
    if manifest.digest != sealed.get("manifest"):
        raise Corrupt("its manifest is not what was sealed.")
    if merkle.root(manifest.commitments).hex() != segment.root or segment.root != sealed.get("root"):
        raise Corrupt("its root is not that of its entries' commitments.")
    return manifest


def _check_contents(ledger: Ledger, store: ObjectStore, keys: KeyStore, adapter: str, number: int) -> list[str]:
    """What is wrong with a segment's payload and keys."""

    def now() -> tuple[SegmentRecord, Manifest, bool]:
        # Keys go a little after the fence: as long as a forget is under way they may be there still.
        settled = ledger.settled()
        return ledger.segment(adapter, number), ledger.manifest(adapter, number), settled

    def check(segment: SegmentRecord, manifest: Manifest, settled: bool) -> list[str]:
        if segment.dropped:
            return []
        try:
            contents.read_openings(store, keys, segment, manifest)
            held = keys.get(segment.keyring)
            live = [not entry.tombstone for entry in manifest.entries]
            if settled and payload.without_keys(held, [entry.mentions for entry in manifest.entries], live) != held:
                raise Corrupt("the key store still holds a key that only erased entries had.")
        except (Corrupt, NotFound, Unsupported) as error:
            return [f"Segment {number}: {error.message}"]
        return []

    return lasting(now, lambda said: check(*said))


def _check_files(ledger: Ledger, store: ObjectStore, adapter: str, number: int) -> list[str]:
    """What is wrong with the files of a version. Once it is revoked they may go at any time."""

    def check(version: VersionRecord) -> list[str]:
        if not version.usable:
            return []
        named = ((weights_key(version.digest), version.digest), (state_key(version.state), version.state))
        problems = [problem for key, digest in named if digest for problem in _check_object(store, key, digest)]
        return [f"Version {number}: {problem}" for problem in problems]

    return lasting(lambda: ledger.version(adapter, number), check)


def lasting(now: Callable[[], Said], check: Callable[[Said], list[str]]) -> list[str]:
    """The problems that are found with what the ledger says, and says still once they have been found."""
    said = now()
    while (problems := check(said)) and (still := now()) != said:
        said = still
    return problems


def _check_object(store: ObjectStore, key: str, digest: str) -> list[str]:
    try:
        held = sha256(store.get(key))
    except NotFound as error:
        return [error.message]
    return [] if held == digest else [f"{key} has the SHA-256 {held}."]


def check_issued(ledger: Ledger, store: ObjectStore, adapter: str = "") -> dict[str, list[str]]:
    """The certificates and manifests of finished forgets (of those that concern an adapter) that are not what was
    issued, or not there: by the adapters that the forget erased in, or the first that it named, whether or not it is
    there yet (`*`: it named none, and there was none)."""
    found: dict[str, list[str]] = {}
    for forget in ledger.forgets():
        concerned = [part["adapter"] for part in forget.body["doomed"]] or sorted(forget.adapters)[:1] or [EVERYWHERE]
        if "certificate" not in forget.body or adapter not in ("", *concerned):
            continue
        for what in ("certificate", "manifest"):
            if _check_object(store, forget.body[what], forget.body[f"{what}_sha"]):
                for name in concerned:
                    told = f"The {what} of the forget {forget.id} is not the one that was issued."
                    found.setdefault(name, []).append(told)
    return found


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
