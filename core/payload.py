"""Segment payloads: what the entries of a segment say, in index order, None for tombstones."""

from collections.abc import Sequence

import msgspec

from .digests import sha256
from .errors import Corrupt

_MAGIC = b"RDSEG1\n"


def encode(contents: Sequence[bytes | None]) -> tuple[bytes, str]:
    """The payload's bytes and their SHA-256. A content is an entry's JSON, as `events.content_of` gives it.

    >>> data, digest = encode([b'{"text":"hi"}', None])
    >>> decode(data, digest)
    [b'{"text":"hi"}', None]
    """
    data = _MAGIC + msgspec.msgpack.encode(list(contents))
    return data, sha256(data)


def decode(data: bytes, digest: str) -> list[bytes | None]:
    """The contents; `Corrupt` when the bytes are not those that `digest` names."""
    if sha256(data) != digest or not data.startswith(_MAGIC):
        raise Corrupt(f"A payload's bytes are not those of {digest[:12]}.", "Restore the object store from a backup.")
    try:
        return msgspec.msgpack.decode(data[len(_MAGIC) :], type=list[bytes | None])
    except msgspec.DecodeError as error:
        raise Corrupt(f"{digest[:12]} is not a payload: {error}.", "Restore the object store from a backup.") from error
