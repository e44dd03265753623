"""The key store: the keys that payloads are encrypted under, apart from the data, so that deleting them erases.

A row holds the keys of one segment, wrapped (AES-256-GCM) under the root key, which a KMS may guard. Backups of the key
store are what keeps erased contents readable: they must expire.
"""

import base64
import os
import secrets
import shlex
import subprocess
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import sqlalchemy as sa
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from riverdelta.core.digests import sha256
from riverdelta.core.errors import BadInput, Corrupt, NotFound, Unavailable
from riverdelta.core.keys import secret_file
from riverdelta.core.settings import Settings

from .ledger.database import Database
from .ledger.journal import chunks

ROOT_KEY, WRAPPED_ROOT_KEY = "contents.key", "contents.key.wrapped"
_NONCE_BYTES = 12
_ROOT_BYTES = 32
_KMS_SECONDS = 60.0

_metadata = sa.MetaData()
_keys = sa.Table(
    "keys",
    _metadata,
    sa.Column("name", sa.String(64), primary_key=True),
    sa.Column("wrapped", sa.LargeBinary, nullable=False),
    sa.Column("at", sa.Float, nullable=False),  # seconds since 1970
)
_ADD = _keys.insert()


class Kms(Protocol):
    """What guards the root key: it never leaves its keeper's process unwrapped but for here."""

    def wrap(self, key: bytes) -> bytes:
        """The key, readable only to `unwrap`."""

    def unwrap(self, wrapped: bytes) -> bytes:
        """The key again."""


class CommandKms:
    """A KMS behind a command of the operator's: `wrap` or `unwrap` as its last argument, base64 in and out."""

    def __init__(self, command: str) -> None:
        self._command = shlex.split(command)

    def wrap(self, key: bytes) -> bytes:
        """As the command wraps it."""
        return self._call("wrap", key)

    def unwrap(self, wrapped: bytes) -> bytes:
        """As the command unwraps it."""
        return self._call("unwrap", wrapped)

    def _call(self, verb: str, data: bytes) -> bytes:
        try:
            done = subprocess.run(
                [*self._command, verb],
                input=base64.b64encode(data),
                capture_output=True,
                timeout=_KMS_SECONDS,
                check=True,
            )
            return base64.b64decode(done.stdout, validate=False)
        except subprocess.CalledProcessError as error:
            said = error.stderr.decode(errors="replace").strip()[-500:]
            raise Unavailable(f"The KMS command cannot {verb} the root key: {said}", "Set registry.kms.") from error
        except (OSError, ValueError, subprocess.TimeoutExpired) as error:
            raise Unavailable(f"The KMS command does not answer: {error}.", "Set registry.kms.") from error


def root_key(folder: Path, kms: Kms | None) -> bytes:
    """The key that all others are wrapped under, made on first use: in the clear, or as the KMS has wrapped it."""
    made = secrets.token_bytes(_ROOT_BYTES)
    if kms is None:
        root = secret_file(folder, ROOT_KEY, lambda: made)
    else:
        root = kms.unwrap(secret_file(folder, WRAPPED_ROOT_KEY, lambda: kms.wrap(made)))
    if len(root) != _ROOT_BYTES:
        raise Corrupt(
            f"The root key has {len(root)} bytes, not {_ROOT_BYTES}.", "Restore the key folder from a backup."
        )
    return root


class KeyStore:
    """Keys by the name that their segment knows them by."""

    def __init__(self, url: str, root: bytes) -> None:
        """`url` is SQLAlchemy's; the table is made on first use."""
        self._root = AESGCM(root)
        self.fingerprint = sha256(b"riverdelta root key\0" + root)  # tells root keys apart, and nothing of them
        self._db = Database(url, "key store")
        with self._db.write() as c:
            if not self._db.sqlite:
                c.execute(sa.select(sa.func.pg_advisory_xact_lock(sa.func.hashtext("keys"))))
            _metadata.create_all(c)

    @classmethod
    def open(cls, settings: Settings) -> "KeyStore":
        """The key store that the settings name."""
        if settings.keys_url == settings.ledger_url:
            raise BadInput("The key store lies in the ledger.", "Set registry.keys to a database of its own.")
        kms = CommandKms(settings.registry.kms) if settings.registry.kms else None
        return cls(settings.keys_url, root_key(settings.keys_dir, kms))

    def close(self) -> None:
        """Close every connection."""
        self._db.close()

    def add(self, keys: Mapping[str, bytes]) -> None:
        """Keep new keys; durable on return. Adding the same again changes nothing."""
        now = time.time()
        rows = [{"name": name, "wrapped": self._wrap(name, held), "at": now} for name, held in keys.items()]
        with self._db.write() as c:
            known = _known(c, list(keys))
            if fresh := [row for row in rows if row["name"] not in known]:
                c.execute(_ADD, fresh)

    def get(self, name: str) -> bytes:
        """A segment's keys, one after the other; those deleted are zeros."""
        with self._db.read() as c:
            held = c.execute(sa.select(_keys.c.wrapped).where(_keys.c.name == name)).scalar()
        return self._unwrap(name, held)

    def known(self, names: Collection[str]) -> set[str]:
        """Those of the names that there are keys by."""
        with self._db.read() as c:
            return _known(c, sorted(names))

    def change(self, changes: Mapping[str, Callable[[bytes], bytes]]) -> None:
        """Put what the function makes of each of these segments' keys in their place, if there are any. A row that is
        damaged is `Corrupt`, once all others are changed."""
        damaged = None
        with self._db.write() as c:
            for name, change in changes.items():
                query = sa.select(_keys.c.wrapped).where(_keys.c.name == name).with_for_update()
                wrapped = c.execute(query).scalar()
                if wrapped is None:
                    continue
                try:
                    held = self._unwrap(name, wrapped)
                    kept = change(held)
                except Corrupt as error:
                    damaged = error
                    continue
                if kept != held:
                    c.execute(_keys.update().where(_keys.c.name == name).values(wrapped=self._wrap(name, kept)))
        if damaged is not None:
            raise damaged

    def delete(self, names: Collection[str]) -> None:
        """Delete the keys of segments that were never sealed, or whose contents are kept no longer."""
        with self._db.write() as c:
            for chunk in chunks(sorted(names)):
                c.execute(_keys.delete().where(_keys.c.name.in_(chunk)))

    def written(self) -> dict[str, float]:
        """Every name, with the time of its writing in seconds since 1970."""
        with self._db.read() as c:
            return {row.name: row.at for row in c.execute(sa.select(_keys.c.name, _keys.c.at))}

    def scrub(self) -> None:
        """Let nothing that was deleted outlive it in SQLite's write-ahead log, or in PostgreSQL's table."""
        self._db.scrub(_keys.name)

    def _wrap(self, name: str, keys: bytes) -> bytes:
        nonce = os.urandom(_NONCE_BYTES)
        return nonce + self._root.encrypt(nonce, keys, name.encode())

    def _unwrap(self, name: str, wrapped: bytes | None) -> bytes:
        if wrapped is None:
            raise NotFound(f"The key store holds no {name}.", "Restore it from a backup, if it was not forgotten.")
        try:
            return self._root.decrypt(wrapped[:_NONCE_BYTES], wrapped[_NONCE_BYTES:], name.encode())
        except InvalidTag as error:
            raise Corrupt(
                f"The key store's {name} is not what was written, or the root key is another one.",
                "Restore the key folder from a backup.",
            ) from error


def _known(c: sa.Connection, names: Sequence[str]) -> set[str]:
    query = sa.select(_keys.c.name)
    return {name for chunk in chunks(names) for name in c.execute(query.where(_keys.c.name.in_(chunk))).scalars()}
