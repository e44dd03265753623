"""The object store: segment payloads, weights and trainer state, on a folder, S3, GCS or Azure (through obstore)."""

import contextlib
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from .errors import BadInput, NotFound, Unavailable


class ObjectStore:
    """Named immutable bytes. Keys are slash-separated paths below the store's root."""

    def __init__(self, url: str) -> None:
        """`url` is `file:///folder`, `s3://bucket/prefix`, `gs://…` or `az://…`."""
        import obstore.store

        self.url = url
        try:
            if url.startswith("file://"):
                folder = Path(url.removeprefix("file://"))
                folder.mkdir(parents=True, exist_ok=True)
                self._store: Any = obstore.store.LocalStore(folder, automatic_cleanup=True)
            else:
                self._store = obstore.store.from_url(url)
        except (OSError, ValueError, obstore.exceptions.BaseError) as error:
            raise BadInput(
                f"Cannot open the object store {url}: {error}.", "Check [store] url in the settings."
            ) from error

    def put(self, key: str, data: bytes) -> None:
        """Write `data` under a key that nothing else uses; repeating the same write is harmless."""
        self._call("write", key, lambda obs: obs.put(self._store, key, data))

    def create(self, key: str, data: bytes) -> bool:
        """Write `data` only if the key is new: False when somebody else has written it."""
        from obstore.exceptions import AlreadyExistsError

        try:
            self._call("create", key, lambda obs: obs.put(self._store, key, data, mode="create"))
        except AlreadyExistsError:
            return False
        return True

    def get(self, key: str) -> bytes:
        """The bytes under a key; `NotFound` when there are none."""
        return self._call("read", key, lambda obs: bytes(obs.get(self._store, key).bytes()))  # type: ignore[no-any-return]

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
        from obstore.exceptions import AlreadyExistsError, BaseError

        if ".." in key.split("/") or key.startswith("/"):
            raise BadInput(f"{key!r} is not a key.", "Keys are relative paths without '..'.")
        try:
            return action(obstore)
        except FileNotFoundError as error:  # obstore's NotFoundError is one
            raise NotFound(f"The store {self.url} holds no {key}.", "Was it collected or purged?") from error
        except AlreadyExistsError:
            raise
        except (OSError, BaseError) as error:
            raise Unavailable(
                f"Cannot {verb} {key} in {self.url}: {error}.", "Is the store reachable and not full?"
            ) from error


def weights_key(digest: str) -> str:
    """Where a version's weights lie."""
    return f"weights/{digest}.safetensors"


def state_key(digest: str) -> str:
    """Where a version's optimiser state lies."""
    return f"states/{digest}.safetensors"
