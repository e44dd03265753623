"""What `up` checks before it starts anything: each failure is one line that says what to do."""

import fcntl
import os
from pathlib import Path
from typing import IO

from riverdelta.core import base
from riverdelta.core.errors import BadInput, Conflict, Corrupt, Refused, Unavailable
from riverdelta.core.settings import Settings

from . import broker

_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def lock_data_folder(folder: Path) -> IO[str]:
    """The data folder's lock, held until the file is closed; `Conflict` when another `up` runs on it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "up.lock").open("a+")
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


def check_base(settings: Settings) -> str:
    """The digest of the base model, which every part of the data folder was made with; `Refused` for another."""
    from riverdelta.registry.ledger import Ledger

    digest = base.digest(base.resolve(settings.base))
    ledger = Ledger.open(settings.ledger_url)
    try:
        known = ledger.remember("base", digest)
    finally:
        ledger.close()
    if known != digest:
        raise Refused(
            f"{settings.data} belongs to the base model with digest {known[:12]}, not to {settings.base} "
            f"({digest[:12]}).",
            "Give the base model that it was made with, or another --data.",
        )
    return digest


def check_store(settings: Settings) -> None:
    """`Unavailable` or `BadInput` when the object store cannot be written."""
    from riverdelta.core.store import ObjectStore

    store = ObjectStore(settings.store_url)
    store.put("up.probe", b"riverdelta up was here")
    store.delete("up.probe")


def check_keys(settings: Settings) -> None:
    """`BadInput` when the secrets would lie inside the data folder, `Corrupt` when they are damaged or missing."""
    from riverdelta.core.keys import SubjectKey
    from riverdelta.registry.keystore import KeyStore
    from riverdelta.registry.ledger import Ledger

    try:
        SubjectKey.open(settings.keys_dir)
        keys = KeyStore.open(settings)
    except OSError as error:
        raise Unavailable(
            f"The key folder {settings.keys_dir} cannot be used: {error.strerror}.", "Set `keys` to a folder of yours."
        ) from error
    fingerprint = SubjectKey.open(settings.keys_dir).subject("riverdelta:fingerprint")
    ledger = Ledger.open(settings.ledger_url)
    try:
        known = ledger.remember("subject-key", fingerprint)
        root = ledger.remember("root-key", keys.fingerprint)
    finally:
        ledger.close()
    if known != fingerprint:
        raise Corrupt(
            f"The subject key in {settings.keys_dir} is not the one that {settings.data} was made with.",
            "Restore the key file, or set `keys` to the folder that holds it: without it nobody can be forgotten.",
        )
    if root != keys.fingerprint:
        raise Corrupt(
            f"The root key in {settings.keys_dir} is not the one that {settings.data} was made with.",
            "Restore contents.key, or set `keys` to the folder that holds it: without it no content can be read.",
        )


def check_serving_port(settings: Settings) -> None:
    """`Conflict` when the port is taken, `BadInput` when keys are missing for an address beyond loopback."""
    host, port = settings.serving.host, settings.serving.port
    if host not in _LOOPBACK and not settings.serving.api_keys:
        raise BadInput(
            f"Serving on {host} needs API keys.", "Set serving.api_keys to a file of keys, or serve on 127.0.0.1."
        )
    if not broker.is_free(host, port):
        raise Conflict(
            f"Port {port} on {host} is taken.", "Stop what listens there, or choose another with --port (0: any)."
        )


def check_cluster(settings: Settings) -> None:
    """`Unavailable` when the Kafka cluster does not answer, `Refused` when it does not let this client in."""
    from riverdelta.streams.access import check_access

    if not any(broker.listens(server.strip(), 3) for server in settings.kafka.bootstrap.split(",")):
        raise Unavailable(
            f"No Kafka broker answers at {settings.kafka.bootstrap}.",
            "Start it or correct --kafka; without a cluster, `up` runs an embedded broker.",
        )
    check_access(settings.kafka)
