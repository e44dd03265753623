"""Belonging: data folder, ledger, base model and keys are of each other, and a process that has others is refused.

With another subject key nobody would be found to be forgotten, with another root key nothing could be read: both are
made on first use, so a folder that was not mounted looks like a new one.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from riverdelta.core.errors import Corrupt, NotFound, Refused, Unavailable
from riverdelta.core.keys import SUBJECT_KEY, SubjectKey
from riverdelta.core.settings import Settings

from .keystore import ROOT_KEY, WRAPPED_ROOT_KEY, KeyStore
from .ledger import Ledger


def has_ledger(settings: Settings) -> bool:
    """Whether the settings' data folder has a ledger, or they name one elsewhere."""
    return bool(settings.registry.ledger) or (settings.data / "ledger.db").is_file()


def open_ledger(settings: Settings, make: bool = False) -> Ledger:
    """The settings' ledger; `NotFound` where there is none, unless it may be made."""
    if not make and not has_ledger(settings):
        raise NotFound(
            f"{settings.data} holds no ledger.",
            "Give --data FOLDER, or begin one with `riverdelta up` or `riverdelta registry create NAME`.",
        )
    return Ledger.open(settings.ledger_url)


def check_base(ledger: Ledger, digest: str) -> None:
    """`Refused` when the ledger's adapters were made for another base model than that with this digest."""
    known = ledger.remember("base", digest)
    if known != digest:
        raise Refused(
            f"This ledger belongs to the base model with digest {known[:12]}, not to the one given ({digest[:12]}).",
            "Give the base model that it was made with, or another --data.",
        )


def subject_key(ledger: Ledger, settings: Settings) -> SubjectKey:
    """The key that subjects are hashed under; `Corrupt` when the ledger was made with another."""
    _check_there(ledger, "subject-key", settings, SUBJECT_KEY)
    with _usable(settings):
        key = SubjectKey.open(settings.keys_dir)
    fingerprint = key.subject("riverdelta:fingerprint")
    if ledger.remember("subject-key", fingerprint) != fingerprint:
        raise Corrupt(
            f"The subject key in {settings.keys_dir} is not the one that this ledger was made with.",
            "Restore the key file, or set `keys` to the folder that holds it: without it nobody can be forgotten.",
        )
    return key


def key_store(ledger: Ledger, settings: Settings) -> KeyStore:
    """The key store that the settings name; `Corrupt` when the ledger was made with another root key."""
    _check_there(ledger, "root-key", settings, WRAPPED_ROOT_KEY if settings.registry.kms else ROOT_KEY)
    with _usable(settings):
        keys = KeyStore.open(settings)
    if ledger.remember("root-key", keys.fingerprint) != keys.fingerprint:
        keys.close()
        raise Corrupt(
            f"The root key in {settings.keys_dir} is not the one that this ledger was made with.",
            "Restore contents.key, or set `keys` to the folder that holds it: without it no content can be read.",
        )
    return keys


def _check_there(ledger: Ledger, fact: str, settings: Settings, name: str) -> None:
    """`Corrupt` where the ledger has a key that is not in its folder: another in its place would be in the way of the
    one that is restored."""
    if ledger.recall(fact) is not None and not (settings.keys_dir / name).exists():
        raise Corrupt(
            f"There is no {name} in {settings.keys_dir}, and this ledger was made with one.",
            "Restore the key folder from its backup, or set `keys` to the folder that holds it.",
        )


@contextmanager
def _usable(settings: Settings) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise Unavailable(
            f"The key folder {settings.keys_dir} cannot be used: {error.strerror}.", "Set `keys` to a folder of yours."
        ) from error


class KeptOpen:
    """A ledger's key store opened when it is first asked for, and then kept: opening one may cost a call of the KMS."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._opening = threading.Lock()
        self._store: KeyStore | None = None

    def __call__(self, ledger: Ledger) -> KeyStore:
        """The key store; `Unavailable` while it cannot be opened: ask again."""
        with self._opening:
            if self._store is None:
                self._store = key_store(ledger, self._settings)
            return self._store

    def close(self) -> None:
        """Close it, if it was opened."""
        with self._opening:
            if self._store is not None:
                self._store.close()
                self._store = None
