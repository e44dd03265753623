"""Contents: the one way to write, read and erase what a segment's entries say, over payload and keys."""

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import msgspec

from riverdelta.core import merkle, payload
from riverdelta.core.digests import sha256
from riverdelta.core.errors import Corrupt, NotFound
from riverdelta.core.store import ObjectStore

from .keystore import KeyStore
from .ledger import Forget, Ledger, Manifest, SegmentRecord
from .ledger.journal import chunks


@dataclass(frozen=True)
class Encrypted:
    """A segment's encrypted contents, to be stored under `keys` and put into the manifest and the ledger."""

    data: bytes
    digest: str
    keys: bytes
    manifest: Manifest
    root: str


def encrypt(name: str, manifest: Manifest, contents: Sequence[bytes | None]) -> Encrypted:
    """A segment's payload with the manifest that commits to it; `name` is what its keys will be known by."""
    made = payload.encode(name, [entry.mentions for entry in manifest.entries], contents)
    committed = msgspec.structs.replace(manifest, leaves=made.leaves)
    return Encrypted(made.data, made.digest, made.keys, committed, merkle.root(committed.commitments).hex())


def read(ledger: Ledger, store: ObjectStore, keys: KeyStore, segment: SegmentRecord) -> list[bytes | None]:
    """A segment's contents in index order; what the ledger calls a tombstone is None.

    `NotFound` where the payload or a live entry's key is gone: a forget that the caller has not seen yet, or a loss.
    """
    return [
        None if opening is None else opening[payload.SALT_BYTES :]
        for opening in read_openings(store, keys, segment, ledger.manifest(segment.adapter, segment.number))
    ]


def read_openings(store: ObjectStore, keys: KeyStore, segment: SegmentRecord, manifest: Manifest) -> list[bytes | None]:
    """The same, each content behind its salt: what opens the commitment that the manifest holds."""
    if segment.dropped:
        raise NotFound(
            f"Segment {segment.number} of {segment.adapter} lies beyond the forget horizon: its contents are gone.",
            "The recipe's `retain.horizon` says how far back they are kept.",
        )
    if len(manifest.entries) != segment.count:
        raise Corrupt(
            f"Segment {segment.number} of {segment.adapter} has {segment.count} entries, its manifest "
            f"{len(manifest.entries)}.",
            "Restore the ledger from a backup.",
        )
    _, data, digest = find_payload(store, keys, segment, manifest)
    return _decode(data, digest, keys, segment, manifest)


def _decode(data: bytes, digest: str, keys: KeyStore, segment: SegmentRecord, manifest: Manifest) -> list[bytes | None]:
    return payload.decode(
        data,
        digest,
        segment.keyring,
        [entry.mentions for entry in manifest.entries],
        [not entry.tombstone for entry in manifest.entries],
        keys.get(segment.keyring),
        manifest.leaves,
    )


def find_payload(
    store: ObjectStore, keys: KeyStore, segment: SegmentRecord, manifest: Manifest
) -> tuple[str, bytes, str]:
    """The key, bytes and SHA-256 of a segment's payload. Where the one that the ledger names is gone, as the ledger was
    restored from before the purge that replaced it: another of the segment's that says what all live entries commit
    to."""
    try:
        return segment.payload, store.get(segment.payload), segment.payload_sha
    except NotFound as error:
        for key in store.keys(home(segment.payload)):
            try:
                data = store.get(key)
                _decode(data, sha256(data), keys, segment, manifest)
            except (Corrupt, NotFound):
                continue
            return key, data, sha256(data)
        raise NotFound(
            error.message,
            "If the ledger is from a backup, repeat the forgets made since; else restore the store.",
        ) from error


def home(payload_key: str) -> str:
    """The folder of the payloads that take the place of a segment's first one, which lies beside it.

    >>> home("segments/acme/0a.seg"), home("segments/acme/0a/1b.seg")
    ('segments/acme/0a', 'segments/acme/0a')
    """
    return "/".join(payload_key.split("/")[:3]).removesuffix(".seg")


def new_key(segment: SegmentRecord) -> str:
    """A new key for a payload that takes the place of a segment's."""
    return f"{home(segment.payload)}/{uuid.uuid4().hex}.seg"


def erase(ledger: Ledger, keys: KeyStore, *forgets: Forget) -> None:
    """Delete the keys that no live entry of what forgets have reached needs any more: from here on nobody can read what
    was forgotten. To be repeated at will. What is damaged is `Corrupt`, once all else is done."""
    parts = [part for forget in forgets for part in forget.body["doomed"]]
    reached = {(part["adapter"], number) for part in parts for number in part["segments"]}
    damaged = None
    for chunk in chunks(sorted(reached)):
        changes = {}
        for adapter, number in chunk:
            try:
                segment, manifest = ledger.segment(adapter, number), ledger.manifest(adapter, number)
            except Corrupt as error:
                damaged = error
                continue
            changes[segment.keyring] = partial(
                payload.without_keys,
                mentions=[entry.mentions for entry in manifest.entries],
                live=[not entry.tombstone for entry in manifest.entries],
            )
        try:
            keys.change(changes)
        except Corrupt as error:
            damaged = error
    if damaged is not None:
        raise damaged
