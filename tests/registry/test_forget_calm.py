"""Forgets that come in the middle of everything end where the same requests, made calmly, end."""

import contextlib
import threading
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from riverdelta.core.errors import Conflict, StaleEpoch
from riverdelta.core.recipe import Recipe
from riverdelta.registry.ledger import Forget, Ledger, ManifestEntry
from tests.registry.histories import World, check_adapter, keyed

ADAPTERS = ("one", "two")
SUBJECTS = ("ann", "bob", "cleo", "nobody")  # the last is in no event
Request = tuple[str, tuple[str, ...] | None]
requests = st.lists(
    st.tuples(st.sampled_from(SUBJECTS), st.sampled_from([None, ("one",), ("two",), ADAPTERS])), min_size=1, max_size=5
)


def begun(folder: Path) -> World:
    """Two adapters that have learned: events of one subject and of several, and what a version of either wrote."""
    world = World(Ledger.open(f"sqlite:///{folder}/{uuid.uuid4().hex}.db"))
    for name in ADAPTERS:
        world.ledger.create(name, Recipe(), "test")
        world.seal(name, [(["bob"], ""), ([], "")])
        world.seal(name, [(["ann"], ""), (["ann", "cleo"], "")])
        while world.train(name):
            pass
    for name, other in (ADAPTERS, ADAPTERS[::-1]):
        wrote = [
            world.ledger.version(other, number).digest for number in (1, 2) if world.ledger.versions(other).get(number)
        ]
        world.seal(name, [(["dan"], writer) for writer in wrote] + [(["cleo"], "")])
        while world.train(name):
            pass
        world.seal(name, [(["bob", "dan"], "")])  # awaits
    return world


def state(world: World) -> list[object]:
    """What two ledgers must agree in: weights, tombstones, who is suppressed."""
    found: list[object] = []
    for name in ADAPTERS:
        while world.train(name):
            pass
        check_adapter(world, name)
        head, versions = world.ledger.adapter(name), world.ledger.versions(name)
        manifests = [manifest for _, manifest in world.ledger.manifests(name)]
        dead = [[entry.tombstone for entry in manifest.entries] for manifest in manifests]
        tip = versions[head.tip].digest if head.tip else ""
        found.append((tip, dead, sorted(world.ledger.suppressed(name)), head.held, head.release == head.tip))
    assert all(world.ledger.is_rebuilt(forget) for forget in world.ledger.forgets())
    return found


def forget(ledger: Ledger, number: int, request: Request) -> Forget:
    return ledger.forget(f"r{number}", keyed(request[0]), request[1], "test")


def calm(folder: Path, asked: Sequence[Request]) -> list[object]:
    world = begun(folder)
    for number, request in enumerate(asked):
        forget(world.ledger, number, request)
        state(world)
    held = state(world)
    world.ledger.close()
    return held


limited = settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@limited
@given(asked=requests, draws=st.randoms(use_true_random=False))
def test_in_the_middle_of_increments_and_seals(tmp_path: Path, asked: list[Request], draws: Any) -> None:
    """Each request comes while a trainer has work in hand and a dataflow a segment, and now and then twice."""
    world = begun(tmp_path)
    for number, request in enumerate(asked):
        name = draws.choice(ADAPTERS)
        work = world.ledger.work(name)
        taken = None if work is None else (work, world.live(name, work.segment.number))
        epoch = world.ledger.adapter(name).epoch
        forget(world.ledger, number, request)
        if draws.random() < 0.4:
            assert forget(world.ledger, number, request).subject == keyed(request[0]), "a repeated id is the first"
            with pytest.raises(Conflict):
                forget(world.ledger, number, ("somebody else", None))
        if taken is not None:
            with contextlib.suppress(Conflict):
                world.finish(*taken)
        if world.ledger.adapter(name).epoch != epoch:
            assert isinstance(world.append(name, [ManifestEntry(0, 0, 99, b"", (keyed("ann"),))], epoch), StaleEpoch)
        if draws.random() < 0.5:
            world.train(draws.choice(ADAPTERS))
    assert state(world) == calm(tmp_path, asked)
    world.ledger.close()


@limited
@given(asked=requests)
def test_all_at_once(tmp_path: Path, asked: list[Request]) -> None:
    """Each request on a connection of its own, and trainers beside them."""
    world = begun(tmp_path)
    broken: list[BaseException] = []

    def act(number: int) -> None:
        mine = World(Ledger.open(world.ledger.db.url), world.contents)
        try:
            if number < len(asked):
                forget(mine.ledger, number, asked[number])
            for name in ADAPTERS:
                with contextlib.suppress(Conflict):
                    mine.train(name)
        except BaseException as error:
            broken.append(error)
        finally:
            mine.ledger.close()

    threads = [threading.Thread(target=act, args=(number,)) for number in range(len(asked) + 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert broken == []
    assert state(world) == calm(tmp_path, asked)
    world.ledger.close()


def test_text_of_another_adapters_version_that_is_revoked_meanwhile_is_not_sealed(tmp_path: Path) -> None:
    """The adapter has nothing of that version's yet, so its epoch stays when the version is revoked."""
    world = begun(tmp_path)
    digest = world.ledger.version("one", 3).digest
    world.ledger.create("three", Recipe(), "test")
    entry = ManifestEntry(0, 0, 0, b"", (keyed("dan"),), False, digest)
    world.contents["three", 0] = "said"
    world.ledger.forget("r", keyed("ann"), ["one"], "test")
    assert world.ledger.adapter("three").epoch == 0
    assert isinstance(world.append("three", [entry]), StaleEpoch)
    assert not isinstance(world.seal("three", [(["dan"], digest)]), Exception), "as a tombstone it is"
    assert world.ledger.manifest("three", 1).entries[0].tombstone
    world.ledger.close()
