"""Verify of a ledger at work: whatever happens between two of its reads, nothing sound is called corrupt, and damage
is."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, event

from riverdelta.core.settings import Settings
from riverdelta.core.store import weights_key
from riverdelta.registry.keeper import Keeper
from riverdelta.registry.ledger import Stage
from riverdelta.registry.operations import Operations
from riverdelta.registry.verify import Verified, verify
from tests.registry.stack import Stack, two_versions


class Watched:
    """What verify reads from, with something done before each read."""

    def __init__(self, held: Any, tick: Callable[[], None]) -> None:
        self._held, self._tick = held, tick

    def __getattr__(self, name: str) -> Any:
        self._tick()
        return getattr(self._held, name)


def verified(stack: Stack, tick: Callable[[], None]) -> Verified:
    ledger, store, keys = (Watched(held, tick) for held in (stack.ledger, stack.store, stack.keys))
    return verify(ledger, store, keys, "acme")  # type: ignore[arg-type]


@pytest.fixture
def stack(tmp_path: Path) -> Stack:
    return two_versions(Settings(data=tmp_path / "data"))


def keeper(stack: Stack, orphan_seconds: float = 0.0) -> Keeper:
    return Keeper(stack.ledger, stack.settings, stack.store, orphan_seconds=orphan_seconds)


@pytest.mark.parametrize("seed", range(12))
def test_nothing_sound_is_called_corrupt(stack: Stack, seed: int) -> None:
    """A forget from fence to purge, and segments sealed and learned, at any of its reads."""
    draw, of = random.Random(seed), stack.key.subject("ann")
    acts = Operations(stack.ledger, stack.settings, "op")
    keeps = keeper(stack)
    following: list[Callable[[], object]] = [
        lambda: stack.seal("acme", [("ann", "canary-ann-more"), ("cy", "canary-cy")]),
        lambda: stack.train("acme"),
        lambda: stack.ledger.forget("r1", of, ["acme"], "op"),
        lambda: stack.seal("acme", [("ann", "canary-ann-late"), ("bob", "canary-bob-late")]),
        lambda: acts.forget("ann", ["acme"], request="r1"),
        lambda: stack.train("acme"),
        *[keeps.advance_forgets] * 3,
        lambda: acts.allow("ann", ["acme"]),
        lambda: stack.seal("acme", [("ann", "canary-ann-again")]),
    ]
    busy = draw.choice((0.1, 0.3, 0.9))

    def tick() -> None:
        if following and draw.random() < busy:
            following.pop(0)()

    while following:
        assert verified(stack, tick).problems == ()
    assert stack.ledger.forget_of("r1").stage is Stage.PURGED
    assert verified(stack, tick).problems == ()


def test_while_a_purge_waits_what_it_has_deleted_is_not_missed(stack: Stack) -> None:
    stack.store.put(weights_key("a" * 64), b"left by a killed trainer")  # the purge waits until this is an orphan
    Operations(stack.ledger, stack.settings, "op").forget("ann", ["acme"], request="r1")
    stack.train("acme")
    gone = weights_key(stack.ledger.version("acme", 2).digest)
    keeper(stack, orphan_seconds=30.0).advance_forgets()
    assert not stack.store.exists(gone)
    assert not stack.ledger.version("acme", 2).purged
    assert verified(stack, lambda: None).problems == ()


def test_of_a_forget_under_way_no_more_is_read_than_that_it_is(stack: Stack) -> None:
    """It may be of every adapter, and verify asks at each segment."""
    Operations(stack.ledger, stack.settings, "op").forget("ann", ["acme"], request="r1")
    asked = list[str]()

    def note(c: Any, cursor: Any, statement: str, *_: Any) -> None:
        asked.append(statement)

    for settled in (False, True):
        assert stack.ledger.settled() is settled
        event.listen(Engine, "before_cursor_execute", note)
        assert verify(stack.ledger, stack.store, stack.keys, "acme").problems == ()
        event.remove(Engine, "before_cursor_execute", note)
        assert any("forgets" in statement for statement in asked)
        assert not [statement for statement in asked if "forgets.body" in statement]
        stack.train("acme")
        keeper(stack).advance_forgets()


@pytest.mark.parametrize("what", ["payload", "weights"])
def test_damage_is_told_whoever_writes(stack: Stack, what: str) -> None:
    key = {
        "payload": stack.ledger.segment("acme", 1).payload,
        "weights": weights_key(stack.ledger.version("acme", 1).digest),
    }[what]
    stack.store.put(key, b"something else" + stack.store.get(key)[14:])
    reads = iter(range(10**6))

    def tick() -> None:
        if next(reads) % 3 == 0:
            stack.seal("acme", [("cy", "canary-cy")])

    [problem] = verified(stack, tick).problems
    assert problem.startswith({"payload": "Segment 1: ", "weights": "Version 1: "}[what])


def test_a_tombstone_that_no_fact_tells_of_is_told_of_whoever_writes(stack: Stack) -> None:
    import sqlalchemy as sa

    from riverdelta.registry.ledger import tables as t

    erased = stack.ledger.manifest("acme", 2).erased({stack.key.subject("ann")})
    where = sa.and_(t.segments.c.adapter == "acme", t.segments.c.number == 2)
    with stack.ledger.db.write() as c:
        c.execute(t.segments.update().where(where).values(manifest=erased.pack()))
    Operations(stack.ledger, stack.settings, "op").forget("bob", ["acme"], request="r1")
    told = verified(stack, lambda: stack.seal("acme", [("bob", "canary-bob-late")]) and None)
    assert any("tombstones; the journal says" in problem for problem in told.problems)
