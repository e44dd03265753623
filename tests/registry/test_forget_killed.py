"""Processes killed by SIGKILL before any effect of a forget, from fence to certificate, and others that go on."""

import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from riverdelta.core.settings import Settings
from riverdelta.core.store import ObjectStore
from riverdelta.registry import contents
from riverdelta.registry.keeper import Keeper
from riverdelta.registry.keystore import KeyStore
from riverdelta.registry.ledger import Ledger, Stage
from riverdelta.registry.ledger.database import Database
from riverdelta.registry.operations import Operations
from riverdelta.registry.purge import certificate_key
from riverdelta.registry.verify import verify
from tests.registry.stack import Stack, two_versions

# Every write that lasts. MLflow's are those of `test_purge`: here nothing is shown, so that a process is quick.
EFFECTS = [(ObjectStore, "put_all"), (ObjectStore, "delete"), (Database, "write"), (Database, "scrub")]
FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload([__name__])


class Quiet:
    """A projection that shows nothing."""

    def erase(self, *_: object) -> list[str]:
        return []

    def scrub(self) -> None:
        pass


def fused(left: int) -> None:
    """Kill this process before the effect after so many."""

    def burning(effect: Callable[..., Any]) -> Callable[..., Any]:
        def burn(*given: Any, **named: Any) -> Any:
            nonlocal left
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
            return effect(*given, **named)

        return burn

    for owner, name in EFFECTS:
        setattr(owner, name, burning(getattr(owner, name)))


def procedure(given: dict[str, Any], kill_at: int) -> None:
    """All of a forget, by whoever would be asked: an operator, a trainer, a keeper. It may have been begun."""
    settings = Settings.model_validate(given)
    stack = Stack(settings)
    if kill_at >= 0:
        fused(kill_at)
    Operations(stack.ledger, settings, "op").forget("ann", ["acme"], request="req")
    keeper = Keeper(stack.ledger, settings, stack.store, orphan_seconds=0.0)
    quiet: Any = Quiet()
    keeper._projection = quiet
    for _ in range(4):
        stack.train("acme")
        if not keeper.advance_forgets():
            return
    os._exit(3)


def run(settings: Settings, kill_at: int = -1) -> int | None:
    process = FORKED.Process(target=procedure, args=(settings.model_dump(mode="json"), kill_at))
    process.start()
    process.join(120)
    return process.exitcode


def begun(folder: Path) -> Settings:
    """`acme` with two versions, of which the second saw ann."""
    settings = Settings(data=folder / "data")
    stack = two_versions(settings)
    stack.ledger.close()
    stack.keys.close()
    return settings


def state(settings: Settings) -> dict[str, Any]:
    """What must be the same however often somebody was killed."""
    ledger, store, keys = Ledger.open(settings.ledger_url), ObjectStore(settings.store_url), KeyStore.open(settings)
    head, versions = ledger.adapter("acme"), ledger.versions("acme")
    [forget] = ledger.forgets()
    said = [contents.read(ledger, store, keys, segment) for segment in ledger.segments("acme")]
    clean = versions[head.release].digest
    found = {
        "stage": forget.stage,
        "certified": store.exists(certificate_key("req")),
        "said": said,
        "release": clean,
        "weights": sorted(key for key in store.keys("weights/")),
        "epoch": head.epoch,
        "stages": [fact.body["stage"] for fact in ledger.facts("acme") if fact.kind == "forget_stage"],
        "problems": verify(ledger, store, keys, "acme").problems,
        "objects": len(list(store.keys(""))),
    }
    ledger.close()
    keys.close()
    return found


def killed_before(folder: Path, effect: int) -> tuple[int | None, dict[str, Any]]:
    settings = begun(folder)
    died = run(settings, effect)
    assert run(settings) == 0
    return died, state(settings)


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    settings = begun(tmp_path_factory.mktemp("calm"))
    assert run(settings) == 0
    held = state(settings)
    assert held["stage"] is Stage.PURGED
    assert held["stages"] == ["acknowledged", "rebuilt", "purged"]
    assert held["problems"] == ()
    assert b"canary-ann-secret" not in b"".join(said for some in held["said"] for said in some if said)
    return held


@pytest.mark.parametrize("effect", range(0, 24, 3))
def test_killed_before_some_effects(tmp_path: Path, calm: dict[str, Any], effect: int) -> None:
    assert killed_before(tmp_path, effect)[1] == calm


@pytest.mark.soak
def test_killed_before_every_effect(tmp_path: Path, calm: dict[str, Any]) -> None:
    for effect in range(100):
        died, held = killed_before(tmp_path / str(effect), effect)
        assert held == calm, effect
        if died == 0:
            assert effect > 15, "that is every effect"
            return
        assert died == -signal.SIGKILL
    raise AssertionError("a forget has more effects than it should")
