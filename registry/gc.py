"""Collect what nothing names: payloads, keys and weights that a crash or a refused commit left in the stores, or that
a recipe keeps no longer."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial

from riverdelta.core.store import ObjectStore

from .contents import home
from .keystore import KeyStore
from .ledger import Ledger

FOLDERS = ("segments/", "weights/", "states/")


@dataclass(frozen=True)
class Collected:
    """Keys deleted (or that would be), keys that nothing names but that are too young to be sure of, and per adapter
    the versions whose files, and the segments whose contents, its recipe keeps no longer."""

    deleted: list[str]
    young: list[str]
    dropped: dict[str, dict[str, list[int]]]


def unnamed(
    ledger: Ledger, store: ObjectStore, keys: KeyStore, but: Mapping[str, Mapping[str, list[int]]] | None = None
) -> dict[str, datetime]:
    """The objects and keys (`keys/NAME`) that no segment and no unpurged version names, each with the time of its
    writing; as if, per adapter, `but` these `segments` and `versions`. Not what may stand in for a named payload that
    is gone."""
    written = {key: at for folder in FOLDERS for key, at in store.written(folder).items()}
    written |= {f"keys/{name}": datetime.fromtimestamp(at, UTC) for name, at in keys.written().items()}
    named = ledger.named_objects(but)  # read after listing: what was committed meanwhile is named by now
    lost = {home(key) for key in named - written.keys() if key.startswith("segments/")}
    return {key: at for key, at in written.items() if key not in named and home(key) not in lost}


def delete(store: ObjectStore, keys: KeyStore, name: str) -> None:
    """Delete an object, or keys by the name that `unnamed` gives them."""
    if name.startswith("keys/"):
        keys.delete([name.removeprefix("keys/")])
    else:
        store.delete(name)


def collect(ledger: Ledger, store: ObjectStore, keys: KeyStore, grace: float, dry: bool = False) -> Collected:
    """Let go of what adapters' recipes keep no longer, and delete what nothing names and is older than `grace` seconds.

    What a segment or an unpurged version names is never touched: releases, rollback targets, pending forgets and
    rebuilds need nothing else. Writers look again after `written.SURE_SECONDS`: with less grace, stop them first.
    """
    changes = {name: ledger.retain(name, "gc", dry) for name in sorted(ledger.heads())}
    dropped = {name: change.facts[0][1] for name, change in changes.items() if change is not None}
    limit = datetime.now(UTC).timestamp() - grace
    found = unnamed(ledger, store, keys, dropped)  # a dry run has let go of nothing
    deleted = sorted(key for key, at in found.items() if at.timestamp() <= limit)
    if not dry:
        ledger.delete_unnamed(deleted, partial(delete, store, keys))
        store.drop_drafts(grace)
    return Collected(deleted, sorted(found.keys() - set(deleted)), dropped)
