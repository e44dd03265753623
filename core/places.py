"""Places: numbered folders below one, of which each process claims its own by a file lock that dies with it."""

import fcntl
import os
from collections.abc import Iterator
from pathlib import Path


def claim(root: Path) -> tuple[int, Path]:
    """The first place that nobody holds, made where there is none, and the descriptor that holds it until closed."""
    number = 0
    while (lock := _try_lock(root / f"{number}.lock")) is None:
        number += 1
    place = root / str(number)
    place.mkdir(exist_ok=True, mode=0o700)
    return lock, place


def each(root: Path) -> Iterator[tuple[Path, bool]]:
    """Every place, and whether it was free; one that was is held until the next is asked for."""
    for place in sorted(root.iterdir()):
        if not place.is_dir():
            continue
        lock = _try_lock(place.with_suffix(".lock"))
        try:
            yield place, lock is not None
        finally:
            if lock is not None:
                os.close(lock)


def _try_lock(path: Path) -> int | None:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor
