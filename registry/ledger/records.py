"""The ledger's nouns: adapters, segments and their manifests, versions, facts, forgets, gaps, leases."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

import msgspec

from riverdelta.core.digests import sha256
from riverdelta.core.errors import Corrupt
from riverdelta.core.merkle import HASH_BYTES

Where = tuple[str, int]  # (incarnation, partition)
Place = tuple[Where, int]  # and an offset in it
Ends = Mapping[Where, int]  # offsets, by where


def is_before(places: Iterable[Place], ends: Ends) -> bool:
    """Whether any of these places lies before the end there."""
    return any(offset < ends.get(where, 0) for where, offset in places)


class Outcome(StrEnum):
    """What became of a segment. Every sealed segment has exactly one."""

    AWAITING = "awaiting"
    TRAINED = "trained"
    SET_ASIDE = "set_aside"


class Cause(StrEnum):
    """Why a segment is set aside."""

    NONE = ""
    HOLD = "hold"  # sealed while the release was held
    ROLLBACK = "rollback"  # trained or awaiting when the release moved behind it
    LEFT = "left"  # still set aside when the hold ended
    GATE = "gate"  # its candidate was rejected
    ERROR = "error"  # it could not be trained


class Hand(StrEnum):
    """What a person decided about a segment; it stands whatever the gate says, at a rebuild too."""

    NONE = ""
    ACCEPT = "accept"
    DISCARD = "discard"


class ManifestEntry(msgspec.Struct, array_like=True, frozen=True):
    """One entry as the ledger knows it: where it came from and whose it is, never what it says.

    `run` indexes the manifest's topic incarnations; (run, partition, offset) is the entry's identity.
    `event` is the keyed hash of the producer's source and id, empty when it gave none. `subjects` are keyed
    hashes. `written_by` is the weights digest that generated its text, empty for people's.
    """

    run: int
    partition: int
    offset: int
    event: bytes = b""
    subjects: tuple[str, ...] = ()
    tombstone: bool = False
    written_by: str = ""

    @property
    def mentions(self) -> tuple[str, ...]:
        """Whose keys its content is encrypted under; the empty name's when it is about nobody."""
        return (*self.subjects, self.written_by) if self.written_by else self.subjects or ("",)


class Manifest(msgspec.Struct, frozen=True, omit_defaults=True):
    """The entries of a segment in index order, and the topic incarnations that they came from.

    `leaves` joins the entries' commitments, 32 bytes each: leaf hashes of the segment's Merkle tree. `partners` gives,
    by an entry's place in the segment, where the other event lies that it was made of: run, partition, offset.
    """

    incarnations: tuple[str, ...]
    entries: tuple[ManifestEntry, ...]
    leaves: bytes = b""
    partners: dict[int, tuple[int, int, int]] = {}

    def pack(self) -> bytes:
        """MessagePack bytes, as stored."""
        return msgspec.msgpack.encode(self)

    @classmethod
    def unpack(cls, data: bytes) -> "Manifest":
        """The manifest in stored bytes."""
        try:
            return msgspec.msgpack.decode(data, type=cls)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise Corrupt(f"A manifest is damaged: {error}.", "Restore the ledger from a backup.") from error

    @property
    def mentions(self) -> set[str]:
        """Subjects and writers of the live entries: what a later forget finds the segment by."""
        live = [entry for entry in self.entries if not entry.tombstone]
        return {subject for entry in live for subject in entry.subjects} | {
            entry.written_by for entry in live if entry.written_by
        }

    @property
    def texts(self) -> dict[str, list[Place]]:
        """Per version that wrote live entries, where the events lie that they were made of."""
        found: dict[str, list[Place]] = {}
        for index, entry in enumerate(self.entries):
            if entry.written_by and not entry.tombstone:
                own = (entry.run, entry.partition, entry.offset)
                for run, partition, offset in (own, self.partners.get(index, own)):
                    found.setdefault(entry.written_by, []).append(((self.incarnations[run], partition), offset))
        return found

    @property
    def digest(self) -> str:
        """SHA-256 of what never changes of it: everything but which entries are tombstones."""
        return self.digest_as(self.pack())

    def digest_as(self, packed: bytes) -> str:
        """The same, of one that is packed already."""
        if not any(entry.tombstone for entry in self.entries):
            return sha256(packed)
        born = tuple(msgspec.structs.replace(entry, tombstone=False) for entry in self.entries)
        return sha256(msgspec.structs.replace(self, entries=born).pack())

    @property
    def commitments(self) -> list[bytes]:
        """The entries' commitments, in index order."""
        return [self.leaves[start : start + HASH_BYTES] for start in range(0, len(self.leaves), HASH_BYTES)]

    def erased(self, mentions: set[str]) -> "Manifest":
        """The same entries, tombstones where they mention any of these."""
        return msgspec.structs.replace(
            self,
            entries=tuple(
                msgspec.structs.replace(entry, tombstone=True)
                if not entry.tombstone and (entry.written_by in mentions or not mentions.isdisjoint(entry.subjects))
                else entry
                for entry in self.entries
            ),
        )


@dataclass(frozen=True)
class AdapterRecord:
    """An adapter's head: the state that every transaction about it checks and moves.

    `release` is the version served now and `tip` the one that the next increment builds on; 0 is the base.
    `held` is the version that a rollback holds the release at, and `held_tip` the tip before it.
    """

    name: str
    recipe: dict[str, Any]
    recipe_digest: str
    seed: int
    created_at: str
    epoch: int = 0
    head: int = 0
    next_index: int = 0
    next_segment: int = 1
    next_version: int = 1
    release: int = 0
    tip: int = 0
    held: int | None = None
    held_tip: int | None = None


@dataclass(frozen=True)
class SegmentRecord:
    """A sealed run of entries [first, first + count). `version` made its outcome: the one that trained it, or the
    parent that a rejected candidate built on. `keyring` names its keys in the key store; `root` is the Merkle root of
    its entries' commitments. `metrics` are those of a rejected candidate; `payload` is empty once it has been
    dropped."""

    adapter: str
    number: int
    first: int
    count: int
    trigger: str
    payload: str
    payload_sha: str
    sealed_at: str
    outcome: Outcome = Outcome.AWAITING
    version: int | None = None
    cause: Cause = Cause.NONE
    note: str = ""
    hand: Hand = Hand.NONE
    metrics: dict[str, Any] = field(default_factory=dict)
    keyring: str = ""
    root: str = ""

    @property
    def dropped(self) -> bool:
        """Whether its contents lie beyond the forget horizon, and are gone."""
        return not self.payload

    def outcome_as(
        self,
        outcome: Outcome,
        version: int | None = None,
        cause: Cause = Cause.NONE,
        note: str = "",
        metrics: Mapping[str, Any] | None = None,
    ) -> "SegmentRecord":
        """The segment with another outcome; nothing of the one before stays."""
        return replace(self, outcome=outcome, version=version, cause=cause, note=note, metrics=dict(metrics or {}))


class PartRecord(msgspec.Struct, frozen=True, omit_defaults=True):
    """What one shard of an adapter has come to in a version.

    `key` names everything that it has learned from; `digest` and `state` are of the files that it alone would have.
    `refused` is the key that its share of the version's segment would have led to, had it been learned, and `note` why
    it was not. `metrics` are those of the part that the version's own increment made.
    """

    key: str = ""
    digest: str = ""
    state: str = ""
    refused: str = ""
    note: str = ""
    metrics: dict[str, Any] = {}


@dataclass(frozen=True)
class VersionRecord:
    """Immutable weights and their lineage. `saw` names the segments that this increment itself used; `parts` are the
    shards', none for an adapter of one. `withheld` says why the gate did not release it."""

    adapter: str
    number: int
    digest: str
    state: str
    parent: int
    segment: int | None
    epoch: int
    recipe_digest: str
    saw: tuple[int, ...]
    fingerprint: dict[str, Any]
    metrics: dict[str, Any]
    made_at: str
    revoked: bool = False
    purged: bool = False
    parts: tuple[PartRecord, ...] = ()
    withheld: str = ""

    @property
    def usable(self) -> bool:
        """Whether it may be released and built on: not revoked, and its files are kept."""
        return not (self.revoked or self.purged)

    @property
    def partial(self) -> bool:
        """Whether a gate kept a part of the segment from being learned, or the version from being released."""
        return bool(self.withheld) or any(part.refused for part in self.parts)


@dataclass(frozen=True)
class Fact:
    """One line of an adapter's journal. `chain` is the SHA-256 of the previous line's chain and this line's."""

    id: int
    adapter: str
    seq: int
    kind: str
    body: dict[str, Any]
    at: str
    actor: str
    reason: str
    chain: str

    @property
    def line(self) -> list[Any]:
        """What is chained."""
        return [self.adapter, self.seq, self.kind, self.body, self.at, self.actor, self.reason]


class Stage(StrEnum):
    """How far a forget has come; each stage is entered once everything before it is durable."""

    LENDING = "lending"  # all but the fence is done: servers go on until rebuilt, or a deadline
    FENCED = "fenced"
    ACKNOWLEDGED = "acknowledged"
    REBUILT = "rebuilt"
    PURGED = "purged"


@dataclass(frozen=True)
class Forget:
    """A forget procedure: resumable, visible, idempotent by its request id.

    `adapters` maps each adapter to the epoch that the forget gave it; `fence` is the fence number that servers,
    dataflow workers and trainers acknowledge; `doomed` lists what purge must remove.
    """

    id: str
    subject: str
    everywhere: bool
    adapters: dict[str, int]
    fence: int
    stage: Stage
    at: str
    actor: str
    reason: str
    body: dict[str, Any] = field(default_factory=dict)

    @property
    def began(self) -> int:
        """The fence number at which the subject was suppressed: an earlier one where a loan has been called in."""
        return int(self.body.get("began", self.fence))

    def names(self, adapter: str) -> bool:
        """Whether the subject is forgotten in an adapter; in others that it reached it is not."""
        return self.everywhere or adapter in self.body["named"]


@dataclass(frozen=True, order=True)
class Gap:
    """Offsets [first, to) of a partition that retention removed before they were read."""

    incarnation: str
    partition: int
    first: int
    to: int
    at: str = ""

    @classmethod
    def of(cls, key: str, body: Mapping[str, Any]) -> "Gap":
        """The gap that is kept under a key."""
        _, incarnation, partition, first = key.rsplit("/", 3)
        return cls(incarnation, int(partition), int(first), body["to"], body["at"])


@dataclass(frozen=True)
class Lease:
    """A process's right to act on what it has read. `acked` is the last fence that it has carried out."""

    holder: str
    kind: str
    ttl: float
    acked: int
    renewed_at: str
