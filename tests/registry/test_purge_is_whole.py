"""A purge counts as done only when all of what it promises is gone, whatever lies in the store or was left behind."""

import contextlib
import json
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from riverdelta.core import places
from riverdelta.core.digests import sha256
from riverdelta.core.errors import Unavailable
from riverdelta.core.settings import Settings
from riverdelta.core.store import ObjectStore, weights_key
from riverdelta.registry.certificate import check, check_stored
from riverdelta.registry.keeper import Keeper
from riverdelta.registry.ledger import Stage
from riverdelta.registry.ledger import tables as t
from riverdelta.registry.mlflow_store import MlflowStore
from riverdelta.registry.operations import Operations, forget_json
from riverdelta.registry.purge import PUBLIC_KEY, certificate_key, manifest_key
from riverdelta.registry.signing import key_of, opened
from tests.registry.stack import Stack, two_versions


class Quiet:
    """A projection that shows nothing."""

    def erase(self, *_: object) -> list[str]:
        return []

    def scrub(self) -> None:
        pass


def keeper_of(stack: Stack, orphan_seconds: float = 0.0) -> Keeper:
    """A keeper without MLflow."""
    keeper = Keeper(stack.ledger, stack.settings, stack.store, orphan_seconds)
    quiet: Any = Quiet()
    keeper._projection = quiet
    return keeper


def stages(stack: Stack, keeper: Keeper) -> dict[str, Stage]:
    """How far every forget comes in a few looks."""
    for _ in range(4):
        if not keeper.advance_forgets():
            break
    return {forget.id: forget.stage for forget in stack.ledger.forgets()}


def forget(stack: Stack, subject: str, request: str) -> None:
    """Forget a subject, up to its rebuild."""
    Operations(stack.ledger, stack.settings, "op").forget(subject, ["acme"], request=request)
    stack.train("acme")


def certified(stack: Stack, request: str) -> dict[str, Any]:
    """What the certificate says, which must be in order."""
    data = stack.store.get(stack.ledger.forget_of(request).body["certificate"])
    said = opened(data, key_of(stack.store.get(PUBLIC_KEY)))
    assert check(said).problems == ()
    assert check_stored(stack.ledger, said, sha256(data))[0] == []
    held: dict[str, Any] = said["predicate"]
    assert held["request"] == request
    return held


def test_what_others_write_to_the_store_is_not_signed(tmp_path: Path) -> None:
    stack, rehearsal = (two_versions(Settings(data=tmp_path / name / "data")) for name in ("real", "rehearsal"))
    doomed = stack.ledger.version("acme", 2).digest
    forget(rehearsal, "ann", "r1")
    assert stages(rehearsal, keeper_of(rehearsal)) == {"r1": Stage.PURGED}
    planted = json.loads(rehearsal.store.get(manifest_key("r1"))) | {"kafka": [], "subject": "0" * 64}
    forget(stack, "ann", "r1")
    stack.store.put(manifest_key("r1"), json.dumps(planted).encode())
    assert stages(stack, keeper_of(stack)) == {"r1": Stage.PURGED}
    assert not stack.store.exists(weights_key(doomed))
    held = certified(stack, "r1")
    assert held["kafka"]
    assert held["subject"] == stack.key.subject("ann")
    assert json.loads(stack.store.get(manifest_key("r1"))) == held
    assert sha256(stack.store.get(manifest_key("r1"))) == stack.ledger.forget_of("r1").body["manifest_sha"]


def test_what_a_backup_brought_back_is_forgotten_again_under_the_same_id(tmp_path: Path) -> None:
    settings, backup = Settings(data=tmp_path / "all" / "data"), tmp_path / "backup"
    stack = two_versions(settings)
    doomed = weights_key(stack.ledger.version("acme", 2).digest)
    stack.ledger.close()
    stack.keys.close()
    shutil.copytree(tmp_path / "all", backup)
    stack = Stack(settings)
    forget(stack, "ann", "r1")
    assert stages(stack, keeper_of(stack)) == {"r1": Stage.PURGED}
    first = certified(stack, "r1")
    manifest, certificate = stack.store.get(manifest_key("r1")), stack.store.get(certificate_key("r1"))
    stack.ledger.close()
    stack.keys.close()
    shutil.rmtree(tmp_path / "all")
    shutil.copytree(backup, tmp_path / "all")
    stack = Stack(settings)
    stack.store.put_all({manifest_key("r1"): manifest, certificate_key("r1"): certificate})  # not in the backup
    assert stack.store.exists(doomed)
    forget(stack, "ann", "r1")
    assert stages(stack, keeper_of(stack)) == {"r1": Stage.PURGED}
    assert not stack.store.exists(doomed)
    again = certified(stack, "r1")
    assert again["fenced_at"] > first["purged_at"]
    assert again["purged_at"] >= again["fenced_at"]


def test_every_request_has_a_place_of_its_own(tmp_path: Path) -> None:
    stack = two_versions(Settings(data=tmp_path / "data"))
    ids = ["req-7", "req-7.dsse", "req 7", sha256(b"req 7"), "certificates.pub", "../../x", "é"]
    for number, request in enumerate(ids):
        stack.seal("acme", [(f"subject{number}", f"said {number}")])
        stack.train("acme")
        forget(stack, f"subject{number}", request)
        assert stages(stack, keeper_of(stack))[request] is Stage.PURGED
        place = f"forgets/{sha256(request.encode())}"
        done = forget_json(stack.ledger.forget_of(request))
        assert (manifest_key(request), done["certificate"]) == (
            f"{place}/manifest.json",
            f"{place}/certificate.dsse.json",
        )
    for number, request in enumerate(ids):
        assert certified(stack, request)["subject"] == stack.key.subject(f"subject{number}")


def test_checkpoints_that_dead_trainers_left_go_before_it_is_purged(tmp_path: Path) -> None:
    stack = two_versions(Settings(data=tmp_path / "data"))
    trainers = stack.settings.data / "trainer"
    dead, hung, living = (trainers / str(number) for number in range(3))
    trainers.mkdir()
    locks = [places.claim(trainers)[0] for _ in range(3)]
    os.close(locks[0])
    for folder in (dead / "acme", dead / "acme.1", dead / "acme-two", hung / "acme", living / "acme"):
        folder.mkdir()
        (folder / "state-0").write_bytes(b"weights")
    forget(stack, "ann", "r1")
    os.utime(living / "acme" / "state-0", (time.time() + 60, time.time() + 60))  # of its work since the fence
    keeper = keeper_of(stack)
    assert stages(stack, keeper) == {"r1": Stage.REBUILT}
    assert [path.name for path in dead.iterdir()] == ["acme-two"]
    os.close(locks[1])
    assert stages(stack, keeper) == {"r1": Stage.PURGED}
    assert list(hung.iterdir()) == []
    assert (living / "acme" / "state-0").exists()
    [adapter] = certified(stack, "r1")["adapters"]
    assert "other machines" in adapter["residual"]["elsewhere"][0]
    os.close(locks[2])


def test_what_a_killed_writer_left_half_written_goes_before_it_is_purged(tmp_path: Path) -> None:
    stack = two_versions(Settings(data=tmp_path / "data"))
    doomed = weights_key(stack.ledger.version("acme", 2).digest)
    draft = stack.settings.data / "store" / f"{doomed}#17"
    draft.write_bytes(stack.store.get(doomed))
    forget(stack, "ann", "r1")
    keeper = keeper_of(stack, orphan_seconds=30.0)
    assert stages(stack, keeper) == {"r1": Stage.REBUILT}
    later = draft.with_name(f"{'0' * 64}.safetensors#18")  # of work that has begun since
    later.write_bytes(b"other weights")
    os.utime(draft, (time.time() - 60, time.time() - 60))
    assert stages(stack, keeper) == {"r1": Stage.PURGED}
    assert not draft.exists()
    assert later.exists()


def test_what_a_killed_keeper_had_on_its_way_to_mlflow_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stack = two_versions(Settings(data=tmp_path / "data"))
    weights = stack.store.get(weights_key(stack.ledger.version("acme", 2).digest))
    outside = tmp_path / "temporary"
    outside.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(outside))
    folder = stack.settings.data / "mlflow-drafts"
    log_folder, seen = MlflowStore.log_folder, list[Path]()

    def killed(store: MlflowStore, run: Any, local: Path, name: str) -> None:
        seen.extend(local.iterdir())
        shutil.copytree(local, tmp_path / "left")  # as a killed process leaves it
        log_folder(store, run, local, name)

    monkeypatch.setattr(MlflowStore, "log_folder", killed)
    keeper = Keeper(stack.ledger, stack.settings, stack.store, orphan_seconds=0.0)
    with contextlib.suppress(FileExistsError):  # the second of the two
        keeper.projection.catch_up()
    assert seen
    assert {path.parent for path in seen} == {folder}
    assert not folder.exists()
    shutil.copytree(tmp_path / "left", folder)
    monkeypatch.setattr(MlflowStore, "log_folder", log_folder)
    assert Keeper(stack.ledger, stack.settings, stack.store).projection
    assert not folder.exists(), "by the keeper that starts"
    forget(stack, "ann", "r1")
    shutil.copytree(tmp_path / "left", folder)
    (folder / "adapter_model.safetensors").write_bytes(weights)
    assert stages(stack, keeper) == {"r1": Stage.PURGED}
    assert not folder.exists(), "before it is purged"
    assert list(outside.iterdir()) == []


def test_a_segment_that_retention_drops_meanwhile_keeps_no_purge_waiting(tmp_path: Path) -> None:
    stack = two_versions(Settings(data=tmp_path / "data"))
    forget(stack, "ann", "r1")
    payload, s = stack.ledger.segment("acme", 2).payload, t.segments.c
    with stack.ledger.db.write() as c:
        c.execute(t.segments.update().where(s.adapter == "acme", s.number == 2).values(payload=""))
    stack.store.delete(payload)
    assert stages(stack, keeper_of(stack)) == {"r1": Stage.PURGED}
    held = certified(stack, "r1")
    assert (held["payloads"], [each["segment"] for each in held["segments"]]) == ([], [2])


def test_a_forget_that_is_stuck_keeps_no_other_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stack = two_versions(Settings(data=tmp_path / "data"))
    stack.seal("acme", [("cat", "said")])
    stack.train("acme")
    forget(stack, "ann", "r1")
    forget(stack, "cat", "r2")
    stuck, get = stack.ledger.segment("acme", 2).payload, ObjectStore.get

    def away(store: ObjectStore, key: str) -> bytes:
        if key == stuck:
            raise Unavailable("This part of the store is away.")
        return get(store, key)

    with monkeypatch.context() as patch:
        patch.setattr(ObjectStore, "get", away)
        keeper = keeper_of(stack)
        assert stages(stack, keeper) == {"r1": Stage.REBUILT, "r2": Stage.PURGED}
    assert stages(stack, keeper) == {"r1": Stage.PURGED, "r2": Stage.PURGED}
