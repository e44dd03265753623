"""Written: objects that lie in the store before the transaction that names them, and are still there when it ends.

What nothing names is collected, by a purge or `gc`, and a writer that was paused may come back long after. Collecting
and naming both hold the ledger: objects are deleted under its lock, once nothing names them, and the transaction that
names them looks last, under the same lock, whether they are there.
"""

import time
from collections.abc import Mapping

from riverdelta.core.errors import Unavailable
from riverdelta.core.store import ObjectStore

# How long an object that nothing names is watched before it counts as left over.
ORPHAN_SECONDS = 30.0
# Until then a writer of its own keys need not look.
SURE_SECONDS = ORPHAN_SECONDS / 3


class Written:
    """Objects just written. Others may write and remove the same keys where `shared`."""

    def __init__(self, store: ObjectStore, objects: Mapping[str, bytes], shared: bool = False) -> None:
        self._began = time.monotonic()  # before the write: nobody has seen them longer
        self._store, self._keys, self._shared = store, tuple(objects), shared
        store.put_all(objects)

    def look(self) -> None:
        """The last act of the transaction that names them: `Unavailable` when one is gone, so write all again."""
        if not self._shared and time.monotonic() - self._began < SURE_SECONDS:
            return
        for key in self._keys:
            if not self._store.exists(key):
                raise Unavailable(f"{key} was collected before the ledger named it.", "It is written again.")
