"""Segment payloads: what the entries of a segment say, encrypted so that a deleted key erases it.

Every subject that a segment's entries are about, and every version that wrote one, has a key of its own in that segment
(AES-256-GCM). What is about the same ones lies in one box, under a key made from all of theirs, so that it takes
each of them to open it. The keys are not in the payload: they are kept by the key store, where forgetting deletes them.
Before each content lies a salt; the SHA-256 of both is the entry's commitment, the leaf of a Merkle tree.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from . import merkle
from .digests import sha256
from .errors import Corrupt, NotFound

KEY_BYTES = 32
SALT_BYTES = 16
_NONCE_BYTES = 12
_MAGIC = b"RDSEG2\n"
_ERASED = bytes(KEY_BYTES)

Mentions = tuple[str, ...]  # whom an entry is about and who wrote it; ("",) for nobody


class _Box(msgspec.Struct, array_like=True):
    number: int
    places: list[int]
    sealed: bytes


class _Payload(msgspec.Struct, array_like=True):
    nonce: bytes
    count: int
    boxes: list[_Box]


@dataclass(frozen=True)
class Encoded:
    """A payload's bytes and their SHA-256, the keys of its mentions, and the leaf hash of every entry, joined."""

    data: bytes
    digest: str
    keys: bytes
    leaves: bytes


def slots(mentions: Iterable[Mentions]) -> dict[str, int]:
    """Which key of a segment is whose: in the order in which its entries name them.

    >>> slots([("ann",), ("bob", "ann"), ("",)])
    {'ann': 0, 'bob': 1, '': 2}
    """
    found: dict[str, int] = {}
    for names in mentions:
        for name in names:
            if name not in found:
                found[name] = len(found)
    return found


def encode(name: str, mentions: Sequence[Mentions], contents: Sequence[bytes | None]) -> Encoded:
    """Encrypt the contents of a segment's entries, None for tombstones, under new keys.

    `name` names those keys, and is never used again: it is bound to the boxes. A content is an entry's JSON, as
    `events.content_of` gives it.

    >>> made = encode("k", [("ann",), ("bob",)], [b'{"text":"hi"}', None])
    >>> found = decode(made.data, made.digest, "k", [("ann",), ("bob",)], [True, False], made.keys, made.leaves)
    >>> [opening and opening[SALT_BYTES:] for opening in found]
    [b'{"text":"hi"}', None]
    """
    slot_of = slots(mentions)
    random = os.urandom(_NONCE_BYTES + KEY_BYTES * len(slot_of) + SALT_BYTES * len(contents))
    nonce, keys = random[:_NONCE_BYTES], random[_NONCE_BYTES : _NONCE_BYTES + KEY_BYTES * len(slot_of)]
    salt = _NONCE_BYTES + len(keys)
    groups: dict[Mentions, list[int]] = {}
    openings: list[bytes] = []
    for place, (names, content) in enumerate(zip(mentions, contents, strict=True)):
        if content is None:
            openings.append(b"")
        else:
            openings.append(random[salt : salt + SALT_BYTES] + content)
            groups.setdefault(names, []).append(place)
        salt += SALT_BYTES
    if None in contents:  # a name that only tombstones mention gets no key
        keys = without_keys(keys, mentions, [content is not None for content in contents])
    boxes = []
    about = name.encode()
    for number, (names, places) in enumerate(groups.items()):
        inside = msgspec.msgpack.encode([openings[place] for place in places])
        boxes.append(_Box(number, places, _lock(names, slot_of, keys).encrypt(_nonce(nonce, number), inside, about)))
    data = _MAGIC + msgspec.msgpack.encode(_Payload(nonce, len(contents), boxes))
    return Encoded(data, sha256(data), keys, b"".join(map(merkle.leaf, openings)))


def decode(
    data: bytes,
    digest: str,
    name: str,
    mentions: Sequence[Mentions],
    live: Sequence[bool],
    keys: bytes,
    leaves: bytes,
) -> list[bytes | None]:
    """What the live entries say, each content behind its salt (both together open the commitment), None for the others.

    `Corrupt` when the bytes are not what was written, `NotFound` when a live entry's key has been deleted.
    """
    held = _read(data, digest)
    slot_of = slots(mentions)
    if not held.count == len(live) == len(mentions) == len(leaves) // merkle.HASH_BYTES:
        raise Corrupt(f"{digest[:12]} has {held.count} entries, its manifest {len(mentions)}.", _RESTORE)
    if len(keys) != KEY_BYTES * len(slot_of):
        raise Corrupt(f"The key store has not the keys of {digest[:12]}.", "Restore the key store from a backup.")
    found: list[bytes | None] = [None] * held.count
    for box in held.boxes:
        if not any(live[place] for place in box.places):
            continue
        try:
            opener = _lock(mentions[box.places[0]], slot_of, keys)
            inside = opener.decrypt(_nonce(held.nonce, box.number), box.sealed, name.encode())
            openings = msgspec.msgpack.decode(inside, type=list[bytes])
        except InvalidTag as error:
            raise Corrupt(f"A key of {digest[:12]} is not the one that it was written with.", _RESTORE_KEYS) from error
        for place, opening in zip(box.places, openings, strict=True):
            if merkle.leaf(opening) != leaves[place * merkle.HASH_BYTES :][: merkle.HASH_BYTES]:
                raise Corrupt(f"Entry {place} of {digest[:12]} is not what its manifest commits to.", _RESTORE)
            found[place] = opening
    for place, is_live in enumerate(live):
        if not is_live:
            found[place] = None
        elif found[place] is None:
            raise Corrupt(f"Entry {place} of {digest[:12]} is live and has no content.", _RESTORE)
    return found


def without(data: bytes, digest: str, live: Sequence[bool]) -> tuple[bytes, str]:
    """A payload without the boxes that no live entry is in; the same bytes when there are none."""
    held = _read(data, digest)
    held.boxes = [box for box in held.boxes if any(live[place] for place in box.places)]
    kept = _MAGIC + msgspec.msgpack.encode(held)
    return kept, sha256(kept)


def without_keys(keys: bytes, mentions: Sequence[Mentions], live: Sequence[bool]) -> bytes:
    """The keys that live entries need, zeros in the place of the others."""
    slot_of = slots(mentions)
    needed = {slot_of[name] for names, alive in zip(mentions, live, strict=True) if alive for name in names}
    if len(keys) != KEY_BYTES * len(slot_of):
        raise Corrupt("The key store has not the keys of a segment.", _RESTORE_KEYS)
    return b"".join(
        keys[slot * KEY_BYTES : (slot + 1) * KEY_BYTES] if slot in needed else _ERASED for slot in range(len(slot_of))
    )


_RESTORE = "Restore the object store from a backup."
_RESTORE_KEYS = "Restore the key store from a backup."


def _read(data: bytes, digest: str) -> _Payload:
    if sha256(data) != digest:
        raise Corrupt(f"A payload's bytes are not those of {digest[:12]}.", _RESTORE)
    if not data.startswith(_MAGIC):
        raise Corrupt(f"{digest[:12]} is not a payload.", _RESTORE)
    try:
        return msgspec.msgpack.decode(data[len(_MAGIC) :], type=_Payload)
    except msgspec.DecodeError as error:
        raise Corrupt(f"{digest[:12]} is not a payload: {error}.", _RESTORE) from error


def _lock(names: Mentions, slot_of: dict[str, int], keys: bytes) -> AESGCM:
    """The cipher of a box: the one mention's key, or the hash of all of theirs."""
    if len(names) == 1:  # nearly always
        at = slot_of[names[0]] * KEY_BYTES
        key = keys[at : at + KEY_BYTES]
        if key != _ERASED:
            return AESGCM(key)
    held = [keys[slot * KEY_BYTES : (slot + 1) * KEY_BYTES] for slot in map(slot_of.__getitem__, names)]
    if _ERASED in held:
        raise NotFound("The key of an entry has been deleted.", "It was forgotten; the ledger says so by now.")
    return AESGCM(held[0] if len(held) == 1 else bytes.fromhex(sha256(b"riverdelta box\0" + b"".join(held))))


def _nonce(first: bytes, number: int) -> bytes:
    """A box's nonce: the payload's random one, and the box's number in its last bytes (as in TLS 1.3)."""
    return first[:-4] + (int.from_bytes(first[-4:], "big") ^ number).to_bytes(4, "big")
