"""The ledger on a real PostgreSQL: the same machine of random acts, and writers that race."""

import threading
from collections.abc import Iterator
from typing import ClassVar

import pytest
from hypothesis import HealthCheck
from hypothesis import settings as limits
from hypothesis.stateful import run_state_machine_as_test

from riverdelta.core.errors import Conflict, Corrupt, NotFound
from riverdelta.core.recipe import Recipe
from riverdelta.registry.keystore import KeyStore
from riverdelta.registry.ledger import Ledger
from tests.postgres import Postgres, fresh
from tests.registry.test_ledger_machine import LedgerMachine
from tests.registry.test_races import race


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A PostgreSQL of its own on the loopback interface: its SQLAlchemy URL, without a database name."""
    held = Postgres()
    try:
        yield held.url
    finally:
        held.remove()


def test_random_acts_keep_every_invariant(server: str) -> None:
    class OnPostgres(LedgerMachine):
        where: ClassVar[str] = server

        def url(self) -> str:
            return fresh(self.where)

    run_state_machine_as_test(
        OnPostgres,
        settings=limits(
            max_examples=5,
            stateful_step_count=20,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_an_allow_with_an_id_acts_once(server: str) -> None:
    ledger = Ledger.open(fresh(server))
    ledger.create("acme", Recipe(), "op")
    ann, bob = "a" * 64, "b" * 64
    for number, who in enumerate((ann, bob)):
        ledger.forget(f"r{number}", who, ["acme"], "op")
    assert ledger.allow(ann, ["acme"], "op", request="x") == ["acme"]
    assert ledger.allow(ann, ["acme"], "op", request="x") == []
    assert ledger.suppressed("acme") == {bob}
    ledger.close()


def test_racing_writers_serialise(server: str) -> None:
    """Sixteen threads on as many connections make one adapter, and move it: one history comes out."""
    url = fresh(server)
    Ledger.open(url).close()
    made: list[str] = []
    refused: list[str] = []

    def work(number: int) -> None:
        ledger = Ledger.open(url)
        try:
            ledger.create("acme", Recipe(), f"writer-{number}")
            made.append(f"writer-{number}")
        except Conflict:
            refused.append(f"writer-{number}")
        for each in range(3):
            ledger.forget(f"{number}-{each}", f"{number:064x}", ["acme"], "op")
        ledger.close()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    ledger = Ledger.open(url)
    assert (len(made), len(refused)) == (1, 15)
    assert ledger.adapter("acme").epoch == 48
    assert [fact.seq for fact in ledger.facts("acme")] == list(range(1, 50))
    assert [fence.number for fence in ledger.fences(0)] == list(range(1, 49))
    ledger.close()


def test_writers_of_every_kind_serialise(server: str) -> None:
    race(fresh(server))


def test_the_key_store_keeps_changes_and_deletes(server: str) -> None:
    """Two that forget at once each delete their own keys of one segment, and neither brings the other's back."""
    url = fresh(server)
    stores = [KeyStore(url, bytes(32)) for _ in range(2)]
    stores[0].add({"one": b"a" * 32 + b"b" * 32, "two": b"c" * 32})
    stores[1].add({"one": bytes(64)})

    def erase(number: int) -> None:
        first, last = 32 * number, 32 * number + 32
        for _ in range(20):
            stores[number].change({"one": lambda keys: keys[:first] + bytes(32) + keys[last:]})

    threads = [threading.Thread(target=erase, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert stores[0].get("one") == bytes(64)
    stores[1].delete(["two"])
    assert stores[0].known(["one", "two"]) == {"one"}
    with pytest.raises(NotFound):
        stores[0].get("two")
    with pytest.raises(Corrupt):
        KeyStore(url, b"k" * 32).get("one")
    for store in stores:
        store.scrub()
        store.close()


def test_one_process_at_a_time_is_exclusive(server: str) -> None:
    one = Ledger.open(fresh(server))
    other = Ledger.open(one.db.url)
    with one.db.exclusive("keeper") as alone, other.db.exclusive("keeper") as too:
        assert (alone, too) == (True, False)
    with other.db.exclusive("keeper") as alone:
        assert alone
    one.close()
    other.close()
