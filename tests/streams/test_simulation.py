"""The dataflow under seeded schedules of crashes, zombies, lost acknowledgements, forgets and topics made again."""

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from riverdelta.core.store import ObjectStore
from riverdelta.registry.ledger import Ledger

from . import test_admission
from .planted import PLANTED
from .simulation import World, Wrong, check, simulate

FOUND = (11881, 15629, 18914, 28391, 39517)  # schedules that once lost an event


def hold(seed: int) -> None:
    """One schedule, which names itself when it fails."""
    try:
        check(simulate(seed))
    except BaseException as wrong:
        wrong.add_note(f"again: python -m tests.streams.simulation {seed}")
        raise


def test_every_event_is_one_entry_whatever_dies() -> None:
    for seed in (*FOUND, *range(250)):
        hold(seed)


@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_ten_thousand_schedules() -> None:
    for seed in range(10_000, 20_000):
        hold(seed)


RARE = {  # what a schedule seldom meets, and the test of admission that meets it at once
    "pairs_decided_by_the_last": test_admission.test_a_pair_takes_the_identity_of_its_undecided_event,
    "cut_across_disorder": test_admission.test_entries_out_of_order_are_cut_together,
    "duplicates_decided_at_once": test_admission.test_a_duplicate_stays_undecided_while_its_first_is_open,
}


@pytest.mark.parametrize("bug", RARE)
def test_a_rare_planted_bug_is_caught(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    PLANTED[bug](monkeypatch)
    with pytest.raises((AssertionError, ValueError)):
        RARE[bug]()


@pytest.mark.parametrize("bug", sorted(PLANTED.keys() - RARE.keys()))
def test_a_planted_bug_is_caught(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    PLANTED[bug](monkeypatch)
    for seed in range(500):
        try:
            check(simulate(seed))
        except (Wrong, AssertionError, KeyError):
            return
    pytest.fail("500 schedules did not catch it")


class RealLedger:
    """The real ledger, with what the simulation asks of the one in memory."""

    revoked: frozenset[str] = frozenset()

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._requests = 0
        self.held = SimpleNamespace(clear=self._give_up)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ledger, name)

    @property
    def heads(self) -> dict[str, Any]:
        return {adapter.name: adapter for adapter in self._ledger.adapters()}

    def forget(self, subject: str, adapters: Any, digests: Any) -> None:
        self._requests += 1
        self._ledger.forget(f"request-{self._requests}", subject, [*self.heads] or None, "test")

    def allow(self, subject: str, adapters: Any, ends: Any) -> None:
        self._ledger.allow(subject, None, "test", ends=ends)

    def _give_up(self) -> None:
        for lease in self._ledger.leases():
            self._ledger.drop_lease(lease.holder)


class FolderStore(ObjectStore):
    """A folder that can list itself."""

    @property
    def objects(self) -> list[str]:
        return list(self.keys(""))


@pytest.mark.parametrize("seed", range(6))
def test_the_same_on_the_real_ledger_and_store(seed: int, tmp_path: Path) -> None:
    ledger = Ledger.open(f"sqlite:///{tmp_path}/ledger.db")
    world = World(random.Random(), RealLedger(ledger), FolderStore(f"file://{tmp_path}/store"))
    check(simulate(seed, world=world))
    ledger.close()
