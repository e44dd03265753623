"""SHA-256 digests: of bytes, and of JSON values in one canonical form."""

import hashlib
import json
from typing import Any


def sha256(data: bytes | memoryview) -> str:
    """Hex SHA-256 of `data`."""
    return hashlib.sha256(data).hexdigest()


def canonical_json(value: Any) -> bytes:
    """UTF-8 JSON with sorted keys and no spaces, so that equal values have equal bytes.

    >>> canonical_json({"b": 1, "a": [1.5, None]})
    b'{"a":[1.5,null],"b":1}'
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def digest_of(value: Any) -> str:
    """Hex SHA-256 of a JSON value's canonical form."""
    return sha256(canonical_json(value))


def seed_of(*parts: str | int) -> int:
    """A 63-bit seed that is a function of its parts alone: every random draw starts from one of these.

    >>> seed_of("acme", 1) == seed_of("acme", 1) != seed_of("acme", 2)
    True
    """
    return int.from_bytes(hashlib.sha256(canonical_json(list(parts))).digest()[:8], "big") >> 1
