"""The checkpoints of work that a forget has overtaken: the copies in the store, and what lies in trainers' folders.

A trainer that runs deletes its own before it acknowledges a fence. What one that is gone has left on this machine is
deleted here, under the lock of its place; on another machine by the next trainer that starts there.
"""

import shutil
from collections.abc import Collection
from pathlib import Path

from riverdelta.core import places
from riverdelta.core.errors import Unavailable
from riverdelta.core.store import ObjectStore


def delete(store: ObjectStore, root: Path, adapters: Collection[str], since: float) -> list[str]:
    """Delete all that is left of these adapters' checkpoints, in the store and below the trainers' folder `root`; where
    a trainer holds some that it has not written to since a time: it may hang, and hold what has been overtaken."""
    for adapter in adapters:
        for key in store.keys(f"checkpoints/{adapter}/"):
            store.delete(key)
    if not root.is_dir():
        return []
    held = []
    try:
        for place, free in places.each(root):
            for folder in sorted(place.iterdir()):
                if folder.name.partition(".")[0] not in adapters:
                    continue
                if free:
                    shutil.rmtree(folder)
                elif _newest(folder) < since:
                    held.append(str(folder))
    except OSError as error:
        raise Unavailable(
            f"Cannot delete the checkpoints in {root}: {error.strerror}.", "Is the disk read-only?"
        ) from error
    return held


def _newest(folder: Path) -> float:
    """When a folder was last written to; infinite where its trainer has just removed it."""
    try:
        return max(path.stat().st_mtime for path in [folder, *folder.iterdir()])
    except FileNotFoundError:
        return float("inf")
