"""The object store: segment payloads, weights and trainer state, on a folder, S3, GCS or Azure (through obstore)."""

import contextlib
import re
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any

from . import durable
from .errors import BadInput, NotFound, Unavailable

_TOGETHER = 8  # from so many files on they wait for the disk together


class ObjectStore:
    """Named immutable bytes. Keys are slash-separated paths below the store's root."""

    def __init__(self, url: str) -> None:
        """`url` is `file:///folder`, `s3://bucket/prefix`, `gs://…` or `az://…`."""
        import obstore.store

        self.url = url
        self._folder: Path | None = None
        self._flushes = False
        self._threads: ThreadPoolExecutor | None = None
        try:
            if url.startswith("file://"):
                self._folder = Path(url.removeprefix("file://"))
                self._folder.mkdir(parents=True, exist_ok=True)
                self._flushes = durable.can_flush(self._folder)
                self._store: Any = obstore.store.LocalStore(self._folder, automatic_cleanup=True)
            else:
                self._store = obstore.store.from_url(url)
        except (OSError, ValueError, obstore.exceptions.BaseError) as error:
            raise BadInput(
                f"Cannot open the object store {url}: {error}.", "Correct registry.store in the settings."
            ) from error

    def put(self, key: str, data: bytes) -> None:
        """Write `data` under a key that nothing else uses; repeating the same write is harmless. Durable on return."""
        self.put_all({key: data})

    def put_all(self, objects: Mapping[str, bytes]) -> None:
        """Write several objects at once; all are durable on return."""
        write = self._put_in_folder if self._folder is not None else self._put_remote
        if self._flushes and len(objects) >= _TOGETHER:
            self._put_together(objects)
        elif len(objects) == 1:
            write(*next(iter(objects.items())))
        else:
            if self._threads is None:  # they wait for the disk or the network, each on its own
                self._threads = ThreadPoolExecutor(8, "store")
            list(self._threads.map(write, objects.keys(), objects.values()))

    def _put_remote(self, key: str, data: bytes) -> None:
        self._call("write", key, lambda obs: obs.put(self._store, key, data))

    def _put_in_folder(self, key: str, data: bytes) -> None:
        """obstore leaves a folder's files to the kernel's leisure; a ledger must not name what a power cut takes."""
        assert self._folder is not None
        path = self._folder / key
        self._call("write", key, lambda _: durable.write(path, data))

    def _put_together(self, objects: Mapping[str, bytes]) -> None:
        assert self._folder is not None
        root, files = self._folder, {self._folder / _checked(key): data for key, data in objects.items()}
        self._call("write", f"{len(files)} objects", lambda _: durable.write_together(root, files))

    def get(self, key: str) -> bytes:
        """The bytes under a key; `NotFound` when there are none."""
        return self._call("read", key, lambda obs: bytes(obs.get(self._store, key).bytes()))  # type: ignore[no-any-return]

    def where(self, key: str) -> str:
        """Where an object lies: its path, if the store is a folder, or its URL."""
        return str(self._folder / key) if self._folder is not None else f"{self.url.rstrip('/')}/{key}"

    def exists(self, key: str) -> bool:
        """Whether there is something under the key."""
        try:
            self._call("look up", key, lambda obs: obs.head(self._store, key))
        except NotFound:
            return False
        return True

    def delete(self, key: str) -> None:
        """Remove what is under the key, if anything."""
        with contextlib.suppress(NotFound):
            self._call("delete", key, lambda obs: obs.delete(self._store, key))

    def drop_drafts(self, age: float) -> None:
        """Delete what writers that were killed left half written more than `age` seconds ago (folders only)."""
        limit = time.time() - age
        for path in map(Path, self.drafts()):
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_mtime <= limit:
                    path.unlink()  # a writer that lives after all begins again

    def drafts(self) -> set[str]:
        """The files of what is being written, or was when a writer was killed (folders only)."""
        found = self._folder.rglob("*#*") if self._folder is not None else ()
        return {str(path) for path in found if re.fullmatch(r".+#\d+", path.name)}

    def keys(self, prefix: str) -> Iterator[str]:
        """The keys below a folder, sorted."""
        yield from sorted(self.written(prefix))

    def written(self, prefix: str) -> dict[str, datetime]:
        """The keys below a folder, each with the time of its last writing, on the store's clock."""
        found: list[Any] = self._call(
            "list", prefix, lambda obs: [meta for batch in obs.list(self._store, prefix) for meta in batch]
        )
        return {meta["path"]: meta["last_modified"] for meta in found}

    def _call(self, verb: str, key: str, action: Any) -> Any:
        import obstore
        from obstore.exceptions import BaseError

        _checked(key)
        try:
            return action(obstore)
        except FileNotFoundError as error:  # obstore's NotFoundError is one
            raise NotFound(f"The store {self.url} holds no {key}.", "Was it collected or purged?") from error
        except (OSError, BaseError) as error:
            raise Unavailable(
                f"Cannot {verb} {key} in {self.url}: {error}.", "Is the store reachable and not full?"
            ) from error


def _checked(key: str) -> str:
    if ".." in key.split("/") or key.startswith("/"):
        raise BadInput(f"{key!r} is not a key.", "Keys are relative paths without '..'.")
    return key


def weights_key(digest: str) -> str:
    """Where a version's weights lie."""
    return f"weights/{digest}.safetensors"


def state_key(digest: str) -> str:
    """Where a version's optimiser state lies."""
    return f"states/{digest}.safetensors"
