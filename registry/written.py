"""Written: objects that lie in the store before the transaction that names them, and are still there when it ends.

What nothing names is collected, by a purge or `gc`, and a writer that was paused may come back long after. Collecting
and naming both hold the ledger: objects are deleted under its lock, once nothing names them, and the transaction that
names them looks last, under the same lock, whether they are there.
"""

import time
from collections.abc import Mapping

from riverdelta.core.errors import Unavailable
from riverdelta.core.store import ObjectStore

from .keystore import KeyStore

# How long an object that nothing names is watched before it counts as left over.
ORPHAN_SECONDS = 30.0
# Until then a writer of its own keys need not look.
SURE_SECONDS = ORPHAN_SECONDS / 3


class Written:
    """Objects just written, and before them what they are encrypted under. Others may write and remove the same ones
    where there are no keys."""

    def __init__(
        self,
        store: ObjectStore,
        objects: Mapping[str, bytes],
        keys: KeyStore | None = None,
        keyrings: Mapping[str, bytes] | None = None,
    ) -> None:
        self._began = time.monotonic()  # before the write: nobody has seen them longer
        self._store, self._objects = store, tuple(objects)
        self._keys, self._keyrings = keys, tuple(keyrings or ())
        if keys is not None:
            keys.add(keyrings or {})
        store.put_all(objects)

    def look(self) -> None:
        """The last act of the transaction that names them: `Unavailable` when one is gone, so write all again."""
        if self._keys is not None and time.monotonic() - self._began < SURE_SECONDS:
            return
        if self._keys is not None and (gone := set(self._keyrings) - self._keys.known(self._keyrings)):
            raise Unavailable(f"{len(gone)} keys were collected before the ledger named them.", "They are added again.")
        for key in self._objects:
            if not self._store.exists(key):
                raise Unavailable(f"{key} was collected before the ledger named it.", "It is written again.")
