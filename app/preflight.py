"""What `up` checks before it starts anything: each failure is one line that says what to do."""

import fcntl
import os
from pathlib import Path
from typing import IO

from riverdelta.core import base
from riverdelta.core.errors import BadInput, Conflict, Unavailable
from riverdelta.core.settings import Settings

from . import broker


def lock_data_folder(folder: Path) -> IO[str]:
    """The data folder's lock, held until the file is closed.

    `Conflict` when another `up` runs on it, `BadInput` when it is no folder.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "up.lock").open("a+")
    except (FileExistsError, NotADirectoryError) as error:
        raise BadInput(f"The data folder {folder} is no folder.", "Give another with --data.") from error
    except OSError as error:
        raise Unavailable(
            f"The data folder {folder} cannot be used: {error.strerror}.", "Give another with --data."
        ) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.seek(0)
        owner = lock.read().strip() or "unknown"
        lock.close()
        raise Conflict(
            f"Another riverdelta up (process {owner}) runs on {folder}.", "Stop it, or give another --data."
        ) from error
    lock.truncate(0)
    lock.write(str(os.getpid()))
    lock.flush()
    return lock


def check_ledger(settings: Settings) -> None:
    """`Refused` when the ledger is of another base model, `Corrupt` when it was made with other keys."""
    from riverdelta.registry.belonging import check_base, key_store, subject_key
    from riverdelta.registry.ledger import Ledger

    ledger = Ledger.open(settings.ledger_url)
    try:
        subject_key(ledger, settings)
        key_store(ledger, settings).close()
        check_base(ledger, base.digest(base.resolve(settings.base)))
    finally:
        ledger.close()


def check_store(settings: Settings) -> None:
    """`Unavailable` or `BadInput` when the object store cannot be written."""
    from riverdelta.core.store import ObjectStore

    store = ObjectStore(settings.store_url)
    store.put("up.probe", b"riverdelta up was here")
    store.delete("up.probe")


def check_serving_port(settings: Settings) -> None:
    """`Conflict` when the port is taken, `BadInput` when keys are missing for an address beyond loopback."""
    from riverdelta.serving.listening import bind, check_address

    check_address(settings.serving)
    bind(settings.serving.host, settings.serving.port).close()


def check_cluster(settings: Settings) -> None:
    """`Unavailable` when the Kafka cluster does not answer, `Refused` when it does not let this client in."""
    from riverdelta.streams.access import check_access

    if not any(broker.listens(server.strip(), 3) for server in settings.kafka.bootstrap.split(",")):
        raise Unavailable(
            f"No Kafka broker answers at {settings.kafka.bootstrap}.",
            "Start it or correct --kafka; without a cluster, `up` runs an embedded broker.",
        )
    check_access(settings.kafka)
