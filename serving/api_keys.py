"""API keys: who calls, which adapters they may know of, and whether they may act on the registry."""

import hashlib
import hmac
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from riverdelta.core.errors import BadInput, NotFound
from riverdelta.core.names import check_adapter

_SHOWN = "docs/http.md shows a keys file."


@dataclass(frozen=True)
class Caller:
    """Whoever made a request. `adapters` None means all of them; `name` stands in logs and in the ledger."""

    name: str
    adapters: frozenset[str] | None
    base: bool
    admin: bool

    def sees(self, adapter: str | None) -> bool:
        """Whether the adapter (None: the base) exists for this caller."""
        if adapter is None:
            return self.base
        return self.adapters is None or adapter in self.adapters

    @property
    def namespace(self) -> str:
        """What the ids of its requests begin with in the ledger, so that nobody meets another tenant's by its id."""
        return "" if self.everything else f"{self.name}/"

    @property
    def everything(self) -> bool:
        """Whether it may act on, and know of, every adapter, those to come included."""
        return self.admin and self.adapters is None


# On the loopback interface without keys, who reaches the server may do everything.
LOCAL = Caller("local", None, base=True, admin=True)


class _Key(Struct, frozen=True, forbid_unknown_fields=True):
    name: Annotated[str, Meta(min_length=1, max_length=64, pattern="^[^/]*$")]
    key: str = ""
    hash: str = ""
    adapters: tuple[str, ...] | Literal["*"] = ()
    role: Literal["user", "admin"] = "user"
    base: bool = True


class _File(Struct, frozen=True, forbid_unknown_fields=True):
    key: tuple[_Key, ...]


class Keys:
    """The keys of a server; `None` in place of a file makes every caller `LOCAL`."""

    def __init__(self, held: tuple[tuple[bytes, Caller], ...] | None) -> None:
        self._held = held

    @classmethod
    def load(cls, path: str) -> "Keys":
        """Read a TOML file of `[[key]]` tables (`path` empty: no keys); `BadInput` says what does not fit."""
        if not path:
            return cls(None)
        try:
            file = msgspec.convert(tomllib.loads(Path(path).read_text()), _File)
        except OSError as error:
            raise NotFound(f"The keys file {path} cannot be read: {error.strerror}.", _SHOWN) from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError, msgspec.ValidationError) as error:
            raise BadInput(f"The keys file {path} does not fit: {error}.", _SHOWN) from error
        if not file.key:
            raise BadInput(f"The keys file {path} holds no key.", _SHOWN)
        held = tuple(_read(key, path) for key in file.key)
        for what, values in (("name", [caller.name for _, caller in held]), ("key", [digest for digest, _ in held])):
            if len(set(values)) < len(values):
                raise BadInput(f"Two keys in {path} have the same {what}.", "Give each tenant its own.")
        return cls(held)

    @property
    def required(self) -> bool:
        """Whether requests need a key."""
        return self._held is not None

    def caller(self, authorization: str) -> Caller | None:
        """Whose key an `Authorization: Bearer` header carries; None when nobody's."""
        if self._held is None:
            return LOCAL
        scheme, _, given = authorization.partition(" ")
        digest = hashlib.sha256(given.strip().encode()).digest()
        found = None
        for known, caller in self._held:  # all of them, so that time tells nothing
            if hmac.compare_digest(known, digest):
                found = caller
        return found if scheme.lower() == "bearer" else None


def _read(key: _Key, path: str) -> tuple[bytes, Caller]:
    if bool(key.key) == bool(key.hash):
        raise BadInput(f"Key {key.name!r} in {path} needs `key` or `hash`, one of them.", _SHOWN)
    if key.hash:
        try:
            digest = bytes.fromhex(key.hash)
        except ValueError:
            digest = b""
        if len(digest) != 32:
            raise BadInput(f"The hash of key {key.name!r} in {path} is no SHA-256.", "Give 64 hex digits.")
    else:
        if len(key.key) < 16:
            raise BadInput(f"Key {key.name!r} in {path} is short.", "Use 16 characters or more, drawn at random.")
        digest = hashlib.sha256(key.key.encode()).digest()
    adapters = None if key.adapters == "*" else frozenset(check_adapter(name) for name in key.adapters)
    return digest, Caller(key.name, adapters, base=key.base, admin=key.role == "admin")
