"""A purge that is killed before any one of its effects, and run again, ends where a calm one ends."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from riverdelta.core.settings import Settings
from riverdelta.core.store import ObjectStore
from riverdelta.registry import contents
from riverdelta.registry.keeper import Keeper
from riverdelta.registry.keystore import KeyStore
from riverdelta.registry.ledger.database import Database
from riverdelta.registry.mlflow_store import MlflowStore
from riverdelta.registry.operations import Operations
from riverdelta.registry.purge import manifest_key
from riverdelta.registry.verify import verify
from tests.registry.stack import Stack, two_versions


class Killed(BaseException):
    """The process ended here."""


class Fuse:
    """Lets so many effects happen, then kills at the next one and at every later one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.left: int | None = None
        effects = [
            (ObjectStore, "put_all"),
            (ObjectStore, "delete"),
            (Database, "write"),
            (Database, "scrub"),
            (KeyStore, "change"),
            (KeyStore, "delete"),
            (MlflowStore, "delete_model_version"),
            (MlflowStore, "erase_run"),
            (MlflowStore, "vacuum"),
        ]
        for owner, name in effects:
            monkeypatch.setattr(owner, name, self._burning(getattr(owner, name)))

    def _burning(self, effect: Callable[..., Any]) -> Callable[..., Any]:
        def burn(*given: Any, **named: Any) -> Any:
            if self.left is not None:
                if self.left == 0:
                    raise Killed
                self.left -= 1
            return effect(*given, **named)

        return burn


def purge(stack: Stack) -> None:
    """A keeper that begins with what the ledger says, and ends when nothing is left to do."""
    keeper = Keeper(stack.ledger, stack.settings, stack.store, orphan_seconds=0.0)
    for _ in range(5):
        if not keeper.advance_forgets():
            return
    raise AssertionError("the purge does not end")


def seen(stack: Stack, request: str, first: int) -> dict[str, Any]:
    """The end state of a forget whose segment begins at an index, without what differs from one to the next."""
    manifest = json.loads(stack.store.get(manifest_key(request)))
    [adapter] = manifest["adapters"]
    [revoked], [rebuilt] = adapter["revoked"], adapter["rebuilt"]
    version = stack.ledger.version("acme", revoked["version"])
    return {
        "erased": [(entry["index"] - first, bool(entry["commitment"])) for entry in manifest["erased"]],
        "payloads": len(manifest["payloads"]),
        "rebuilt": rebuilt["version"] - revoked["version"],
        "purged": (version.purged, version.metrics, stack.store.exists(f"weights/{version.digest}.safetensors")),
        "kafka": [(place["topic"], place["removable_at"]) for place in manifest["kafka"]],
        "left in MLflow": manifest["mlflow_gc_needed"],
    }


def test_killed_before_any_effect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(data=tmp_path / "data")
    stack = two_versions(settings)
    projection = Keeper(stack.ledger, settings, stack.store).projection
    fuse = Fuse(monkeypatch)
    calm: dict[str, Any] = {}
    for kill_at in [None, *range(100)]:
        subject = f"subject{kill_at}"
        first = stack.seal("acme", [("bob", f"kept-{subject}"), (subject, f"canary-{subject}")]).first
        stack.train("acme")
        projection.catch_up()
        Operations(stack.ledger, settings, "op").forget(subject, ["acme"], request=f"req{kill_at}")
        stack.train("acme")
        fuse.left = kill_at
        try:
            purge(stack)
            done = kill_at is not None
        except Killed:
            done = False
        fuse.left = None
        purge(stack)
        projection.catch_up()
        calm = calm or seen(stack, f"req{kill_at}", first)
        assert seen(stack, f"req{kill_at}", first) == calm
        assert verify(stack.ledger, stack.store, stack.keys, "acme").problems == ()
        held = [contents.read(stack.ledger, stack.store, stack.keys, each) for each in stack.ledger.segments("acme")]
        said = b"".join(content for segment in held for content in segment if content is not None)
        assert f"kept-{subject}".encode() in said
        assert f"canary-{subject}".encode() not in said
        if done:
            return
    raise AssertionError("a purge has more effects than it should")
