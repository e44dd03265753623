"""Merkle trees in the shape of RFC 6962: a root commits to a list of leaves, a path shows that one of them is in it.

A leaf hash is SHA-256 of a zero byte and the leaf's data. Where the data begins with a random salt, the leaf hash is
also a commitment: it tells nothing of the data, and only the data opens it.
"""

from collections.abc import Sequence
from hashlib import sha256

HASH_BYTES = 32


def leaf(data: bytes) -> bytes:
    """A leaf's hash.

    >>> leaf(b"").hex()[:16]
    '6e340b9cffb37a98'
    """
    return sha256(b"\0" + data).digest()


def root(leaves: Sequence[bytes]) -> bytes:
    """The root of a tree over these leaf hashes, in order."""
    if not leaves:
        return sha256(b"").digest()
    level = list(leaves)
    while len(level) > 1:
        level = _parents(level)
    return level[0]


def path(leaves: Sequence[bytes], place: int) -> list[bytes]:
    """The hashes that lead from the leaf at `place` to the root, lowest first (RFC 6962's audit path)."""
    found, level = [], list(leaves)
    while len(level) > 1:
        if place ^ 1 < len(level):
            found.append(level[place ^ 1])
        level, place = _parents(level), place // 2
    return found


def climb(found: bytes, place: int, count: int, hashes: Sequence[bytes]) -> bytes | None:
    """The root that a path leads to from the leaf hash at `place` of `count`; None when the path is too long or too
    short for that place."""
    rest, last = list(hashes), count - 1
    if not 0 <= place <= last:
        return None
    while last:
        if place % 2 or place < last:
            if not rest:
                return None
            beside = rest.pop(0)
            found = _node(beside, found) if place % 2 else _node(found, beside)
        place, last = place // 2, last // 2
    return None if rest else found


def _parents(level: list[bytes]) -> list[bytes]:
    """The next level up. A node without a neighbour moves up as it is: that is RFC 6962's split at a power of two."""
    above = [sha256(b"\1" + left + right).digest() for left, right in zip(level[::2], level[1::2], strict=False)]
    if len(level) % 2:
        above.append(level[-1])
    return above


def _node(left: bytes, right: bytes) -> bytes:
    return sha256(b"\1" + left + right).digest()
