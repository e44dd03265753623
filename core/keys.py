"""The secret under which subjects and event ids are hashed, kept outside the data folder.

Whoever holds only the data folder cannot test a guess at who is in it.
"""

import hashlib
import hmac
import os
import secrets
from collections.abc import Callable
from pathlib import Path

from .errors import BadInput, Corrupt
from .names import subject_name

SUBJECT_KEY = "subjects.key"


def secret_file(folder: Path, name: str, make: Callable[[], bytes]) -> bytes:
    """What a secret file holds, made on first use (mode 0600)."""
    path = folder / name
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not path.exists():
        draft = folder / f".{name}.{os.getpid()}.{secrets.token_hex(4)}"
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(make())
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(draft, path)  # whoever links first has made it; the others read that
        except FileExistsError:
            pass
        finally:
            draft.unlink()
    return path.read_bytes()


class SubjectKey:
    """Keyed hashes (HMAC-SHA-256) of subjects and event ids."""

    def __init__(self, secret: bytes) -> None:
        if len(secret) != 32:
            raise Corrupt(f"The subject key has {len(secret)} bytes, not 32.", "Restore the key file from a backup.")
        self._keyed = hmac.new(secret, digestmod=hashlib.sha256)  # copied for each hash: keying costs more than hashing
        self._source = ("", b"")

    @classmethod
    def open(cls, folder: Path) -> "SubjectKey":
        """The key in `folder`, made on first use."""
        return cls(secret_file(folder, SUBJECT_KEY, lambda: secrets.token_bytes(32)))

    def subject(self, name: str) -> str:
        """A subject's keyed hash, 64 hex digits: the only form in which a subject is stored."""
        try:
            return self._hash(b"subject\0" + subject_name(name).encode()).hex()
        except UnicodeEncodeError as error:  # of an argument's bytes
            raise BadInput("A subject's name is not UTF-8.", "Name it as the events do.") from error

    def request(self, name: str) -> str:
        """A request's id, where its own name would tell of its subject: 64 hex digits."""
        return self._hash(b"request\0" + name.encode()).hex()

    def event(self, source: str, event_id: str) -> bytes:
        """A producer's event id, 20 bytes: 12 of the id and 8 of the source."""
        known, share = self._source
        if known != source or not share:
            share = self._hash(b"source\0" + source.encode())[:8]
            self._source = (source, share)
        return self._hash(b"id\0" + event_id.encode())[:12] + share

    def _hash(self, data: bytes) -> bytes:
        keyed = self._keyed.copy()
        keyed.update(data)
        return keyed.digest()
