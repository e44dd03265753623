"""The folder of one trainer process: its checkpoint logs, and none that the ledger has moved past.

Several trainers may share a data folder: each claims a numbered place by a file lock, which dies with the process.
"""

import logging
import os
from collections.abc import Callable
from pathlib import Path

from riverdelta.core import places
from riverdelta.core.errors import Unavailable
from riverdelta.core.store import ObjectStore

from . import checkpoints
from .checkpoints import CheckpointLog, Shipped

log = logging.getLogger(__name__)

Wanted = Callable[[str], str | None]
"""The key of the increment that an adapter's next work would be, None when it has none."""


class TrainerFolder:
    """Checkpoint logs by adapter, below `root`, with copies in the store for a trainer on another machine."""

    def __init__(self, root: Path, store: ObjectStore) -> None:
        self._store = store
        try:
            root.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._lock, self._path = places.claim(root)
        except OSError as error:
            raise Unavailable(
                f"Cannot write to {root}: {error.strerror}.", "Is the disk full, or read-only?"
            ) from error
        self._root = root

    def open(self, adapter: str, key: str, share: int = 0) -> CheckpointLog:
        """The log of a share of an adapter's increment."""
        named = f"{key}.{share}" if share else key
        return CheckpointLog(
            self._path / (f"{adapter}.{share}" if share else adapter), named, Shipped(self._store, adapter, named)
        )

    def sweep(self, wanted: Wanted, but: frozenset[str] = frozenset()) -> None:
        """Delete every log that is not of its adapter's next work, here and where dead trainers left them; `but`
        names adapters whose logs are in use."""
        for place, free in places.each(self._root):
            if place == self._path:
                _sweep(place, wanted, but)
            elif free:
                _sweep(place, wanted, frozenset())
        for name in list(self._store.keys(checkpoints.SHIPPED)):
            adapter, _, key = name.removeprefix(checkpoints.SHIPPED).partition("/")
            if wanted(adapter) != key.partition(".")[0]:
                self._store.delete(name)

    def close(self) -> None:
        """Let another process have the place."""
        os.close(self._lock)


def _sweep(place: Path, wanted: Wanted, but: frozenset[str]) -> None:
    for folder in sorted(place.iterdir()):
        adapter = folder.name.partition(".")[0]
        if adapter in but:
            continue
        key = wanted(adapter)
        if key is None or key != (checkpoints.key_in(folder) or "").partition(".")[0]:
            log.info("Removing the checkpoints of %s: the ledger has moved on", adapter)
            checkpoints.delete(folder)
