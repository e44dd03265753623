"""Collect what nothing names: payloads, keys and weights that a crash or a refused commit left in the stores."""

from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial

from riverdelta.core.store import ObjectStore

from .keystore import KeyStore
from .ledger import Ledger

FOLDERS = ("segments/", "weights/", "states/")


@dataclass(frozen=True)
class Collected:
    """Keys deleted, and keys that nothing names but that are too young to be sure of."""

    deleted: list[str]
    young: list[str]


def unnamed(ledger: Ledger, store: ObjectStore, keys: KeyStore) -> dict[str, datetime]:
    """The objects and keys (`keys/NAME`) that no segment and no unpurged version names, each with the time of its
    writing."""
    written = {key: at for folder in FOLDERS for key, at in store.written(folder).items()}
    written |= {f"keys/{name}": datetime.fromtimestamp(at, UTC) for name, at in keys.written().items()}
    named = ledger.named_objects()  # read after listing: what was committed meanwhile is named by now
    return {key: at for key, at in written.items() if key not in named}


def delete(store: ObjectStore, keys: KeyStore, name: str) -> None:
    """Delete an object, or keys by the name that `unnamed` gives them."""
    if name.startswith("keys/"):
        keys.delete([name.removeprefix("keys/")])
    else:
        store.delete(name)


def collect(ledger: Ledger, store: ObjectStore, keys: KeyStore, grace: float, dry: bool = False) -> Collected:
    """Delete what nothing names and is older than `grace` seconds.

    What a segment or an unpurged version names is never touched: releases, rollback targets, pending forgets and
    rebuilds need nothing else. Writers look again after `written.SURE_SECONDS`: with less grace, stop them first.
    """
    limit = datetime.now(UTC).timestamp() - grace
    found = unnamed(ledger, store, keys)
    deleted = sorted(key for key, at in found.items() if at.timestamp() <= limit)
    if not dry:
        ledger.delete_unnamed(deleted, partial(delete, store, keys))
        store.drop_drafts(grace)
    return Collected(deleted, sorted(found.keys() - set(deleted)))
