"""Writers that race on one adapter come to one history."""

import contextlib
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from riverdelta.core.errors import Conflict, Unavailable
from riverdelta.core.recipe import Recipe
from riverdelta.registry.ledger import Ledger, database
from riverdelta.registry.verify import check_chain
from tests.registry.histories import World, check_adapter, keyed


def race(url: str, rounds: int = 25) -> None:
    """A dataflow worker, two trainers, an operator and forgets, each on connections of its own."""
    ledger = Ledger.open(url)
    ledger.create("acme", Recipe(), "test")
    contents: dict[tuple[str, int], str] = {}
    broken: list[BaseException] = []

    def loop(times: int, act: Callable[[World, int], object]) -> None:
        world = World(Ledger.open(url), contents)
        try:
            for number in range(times):
                with contextlib.suppress(Conflict):  # refused, as it must be when another was faster
                    act(world, number)
        except BaseException as error:
            broken.append(error)
        finally:
            world.ledger.close()

    def operate(world: World, number: int) -> None:
        if number % 2:
            world.ledger.release("acme", 0, "op")
        elif world.ledger.adapter("acme").held is None:
            world.ledger.rollback("acme", 0, "op")
        else:
            world.ledger.resume("acme", "tip", "op")

    acts: list[tuple[int, Callable[[World, int], object]]] = [
        (2 * rounds, lambda world, number: world.seal("acme", [([f"s{number % 7}"], "")])),
        (2 * rounds, lambda world, _: world.train("acme")),
        (2 * rounds, lambda world, _: world.train("acme")),
        (rounds, operate),
        (4, lambda world, number: world.ledger.forget(f"r{number}", keyed(f"s{number}"), ["acme"], "op")),
    ]
    threads = [threading.Thread(target=loop, args=act) for act in acts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert broken == []
    check_chain(ledger.facts("acme"))
    check_adapter(World(ledger, contents), "acme")
    assert ledger.adapter("acme").epoch == 4
    assert ledger.pulse()[1] == ledger.adapter("acme").head == len(ledger.facts("acme"))
    ledger.close()


def test_writers_serialise(tmp_path: Path) -> None:
    race(f"sqlite:///{tmp_path}/ledger.db")


def test_a_writer_waits_for_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = Ledger.open(url := f"sqlite:///{tmp_path / 'ledger.db'}"), Ledger.open(url)
    one.remember("known", "first")
    waiting = threading.Thread(target=lambda: other.remember("new", "second"))
    with one.db.write():
        waiting.start()
        waiting.join(0.05)
        assert waiting.is_alive()
        assert other.remember("known", "another") == "first"  # to read what is known, nobody waits
    waiting.join(30)
    assert one.remember("new", "late") == "second"
    monkeypatch.setattr(database, "_BUSY_SECONDS", 0.0)
    with one.db.write(), pytest.raises(Unavailable, match="locked"):
        other.remember("newer", "third")
    assert other.remember("newer", "third") == "third"
    one.close()
    other.close()


def test_who_watches_sees_what_others_write(tmp_path: Path) -> None:
    one, other = Ledger.open(url := f"sqlite:///{tmp_path / 'ledger.db'}"), Ledger.open(url)
    look = one.watch_pulse()
    assert look is not None
    assert look() == (0, 0)
    assert look() is None
    other.create("acme", Recipe(), "test")
    assert look() == other.pulse() == (0, 1)
    other.forget("req", keyed("ann"), ["acme"], "test")
    assert look() == other.pulse()
    assert look() is None
    one.close()
    other.close()
