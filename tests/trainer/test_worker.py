"""The worker on a real ledger: work becomes versions, and what a forget or a rollback overtakes is refused."""

import sqlite3
import time
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

import pytest

from riverdelta.core.recipe import Recipe
from riverdelta.core.store import state_key, weights_key
from riverdelta.registry.ledger import Cause, Outcome
from riverdelta.trainer import claims
from riverdelta.trainer.base import Base
from riverdelta.trainer.increment import step
from riverdelta.trainer.worker import Worker
from tests.trainer.samples import contents, fact, recipe
from tests.trainer.stack import Stack


@pytest.fixture
def stack(tmp_path: Path) -> Stack:
    return Stack(tmp_path)


def worker(stack: Stack, base: Base, **options: int) -> Worker:
    released: list[str] = []
    made = stack.worker(base, "trainer-test", released.append, **options)
    made.released = released  # type: ignore[attr-defined]
    return made


def settle(work: Worker) -> None:
    for _ in range(1000):
        if not work.turn():
            return
    raise AssertionError("the worker does not come to rest")


def test_every_segment_becomes_a_version_whose_files_lie_in_the_store(stack: Stack, base: Base) -> None:
    stack.create("acme", recipe())
    for number in range(3):
        stack.seal("acme", [fact(number * 10 + i) for i in range(4)], ["ann", "bob", "cy", "di"])
    trainer = worker(stack, base)
    settle(trainer)
    versions = stack.ledger.versions("acme")
    assert [(v.number, v.parent, v.segment, v.saw) for v in versions.values()] == [
        (1, 0, 1, (1,)),
        (2, 1, 2, (1, 2)),
        (3, 2, 3, (1, 2, 3)),
    ]
    for version in versions.values():
        assert stack.store.exists(weights_key(version.digest))
        assert stack.store.exists(state_key(version.state))
        assert version.fingerprint["base"] == base.digest
        assert version.metrics["steps"] == 4
    assert trainer.released == ["acme"] * 3  # type: ignore[attr-defined]
    trainer.close()
    assert stack.ledger.leases() == []


@pytest.mark.parametrize("shards", [1, 2])
def test_masked_near_duplicates_are_counted(stack: Stack, base: Base, shards: int) -> None:
    like = {**recipe().to_dict(), "curate": {"alike": 0.7}, "shards": {"count": shards}}
    stack.create("acme", Recipe.from_dict(like))
    text = b'{"type":"example","text":"The hotline of Acme is open until nine."}'
    stack.seal("acme", [text, text, fact(1), text, None], ["ann", "ann", "ann", "bob", "bob"])
    trainer = worker(stack, base)
    settle(trainer)
    found = stack.ledger.version("acme", 1).metrics
    assert (found["masked"], found["entries"]) == (1, 3)
    assert trainer._metrics.masked._value.get() == 1
    trainer.close()


def test_who_has_waited_longest_is_served_first(stack: Stack, base: Base) -> None:
    for name in ("zoe", "abe", "kim"):
        stack.create(name, recipe(passes=1))
        stack.seal(name, [fact(1)], ["ann"])
    trainer = worker(stack, base)
    settle(trainer)
    assert trainer.released == ["zoe", "abe", "kim"]  # type: ignore[attr-defined]


def test_an_increment_is_dropped_when_a_forget_comes_between(stack: Stack, base: Base) -> None:
    stack.create("acme", recipe())
    stack.seal("acme", [fact(1), fact(2), fact(3), fact(4)], ["ann", "bob", "ann", "cy"])
    trainer = worker(stack, base)
    trainer.turn()
    assert not trainer.idle
    stack.forget("acme", "ann")
    settle(trainer)
    (version,) = stack.ledger.versions("acme").values()
    assert version.epoch == 1
    assert version.metrics["entries"] == 2


def test_a_candidate_finished_after_a_forget_is_refused_and_removed(
    stack: Stack, base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    stack.create("acme", recipe())
    stack.seal("acme", [fact(1), fact(2)], ["ann", "bob"])
    trainer = worker(stack, base)
    put = stack.store.put_all

    def forget_first(files: Mapping[str, bytes]) -> None:
        if not stack.ledger.forgets():
            stack.forget("acme", "ann")
        put(files)

    monkeypatch.setattr(stack.store, "put_all", forget_first)
    while not stack.ledger.forgets():
        trainer.turn()
    assert stack.ledger.versions("acme") == {}
    assert list(stack.store.keys("weights")) == []
    assert list(stack.store.keys("states")) == []
    settle(trainer)
    (version,) = stack.ledger.versions("acme").values()
    assert (version.epoch, version.metrics["entries"]) == (1, 1)


def test_a_rollback_in_the_middle_ends_the_increment(stack: Stack, base: Base) -> None:
    stack.create("acme", recipe())
    for number in range(2):
        stack.seal("acme", [fact(number)], ["ann"])
    trainer = worker(stack, base)
    settle(trainer)
    stack.seal("acme", contents(4), ["ann", "bob", "cy", "di"])
    trainer.turn()
    stack.ledger.rollback("acme", 1, "test")
    settle(trainer)
    head = stack.ledger.adapter("acme")
    assert (head.release, head.next_version) == (1, 3)
    assert stack.ledger.segment("acme", 3).cause is Cause.ROLLBACK


def test_a_segment_that_cannot_be_learned_is_set_aside_with_the_reason(stack: Stack, base: Base) -> None:
    wild = recipe()
    wild = type(wild).from_dict({**wild.to_dict(), "optimiser": {"learning_rate": 1e30}})
    stack.create("acme", wild)
    stack.create("bob", recipe())
    stack.seal("acme", [fact(1), fact(2)], ["ann", "bob"])
    stack.seal("bob", [fact(1)], ["ann"])
    trainer = worker(stack, base)
    settle(trainer)
    segment = stack.ledger.segment("acme", 1)
    assert (segment.outcome, segment.cause) == (Outcome.SET_ASIDE, Cause.ERROR)
    assert "learning_rate" in segment.note
    assert stack.ledger.adapter("bob").release == 1


def test_a_damaged_payload_stalls_its_adapter_alone(stack: Stack, base: Base) -> None:
    stack.create("acme", recipe())
    stack.create("bob", recipe())
    segment = stack.seal("acme", [fact(1)], ["ann"])
    stack.seal("bob", [fact(1)], ["ann"])
    stack.store.put(segment.payload, b"RDSEG1\nwrong")
    trainer = worker(stack, base)
    settle(trainer)
    assert stack.ledger.segment("acme", 1).outcome is Outcome.AWAITING
    assert stack.ledger.adapter("bob").release == 1


def test_a_fence_is_acknowledged_only_after_what_it_touches_is_dropped(stack: Stack, base: Base) -> None:
    stack.create("acme", recipe())
    stack.seal("acme", [fact(1), fact(2)], ["ann", "bob"])
    trainer = worker(stack, base)
    trainer.turn()
    fence = stack.forget("acme", "ann").fence
    assert [lease.holder for lease in stack.ledger.unacknowledged(fence, ("trainer",))] == ["trainer-test"]
    trainer._lease._due = 0.0
    trainer.turn()
    assert stack.ledger.unacknowledged(fence, ("trainer",)) == []


def test_an_outcome_under_a_lost_claim_is_refused(stack: Stack, base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "SECONDS", 0.0)
    monkeypatch.setattr(claims, "_BEAT_SECONDS", 3600.0)  # asleep: it does not hear that it has lost it
    stack.create("acme", recipe())
    stack.create("bob", recipe())
    stack.seal("acme", [fact(1), fact(2)], ["ann", "bob"])
    stack.seal("bob", [fact(1), fact(2)], ["ann", "bob"])
    trainer = worker(stack, base)
    trainer.turn()
    assert stack.ledger.claim(["acme"], "another", 3600.0, 1) == {"acme": 2}
    settle(trainer)
    assert stack.ledger.versions("acme") == {}
    assert [stack.store.exists(weights_key(v.digest)) for v in stack.ledger.versions("bob").values()] == [True]
    assert len(list(stack.store.keys("weights"))) == 1
    stack.ledger.end_claims({"acme": 2}, "another")
    settle(trainer)
    assert [v.segment for v in stack.ledger.versions("acme").values()] == [1]
    trainer.close()


def test_a_trainer_under_which_an_older_ledger_is_restored_begins_anew(
    stack: Stack, base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fences that it has carried out, and tokens that it holds, come again and mean others."""
    monkeypatch.setattr(claims, "_BEAT_SECONDS", 3600.0)
    stack.create("acme", recipe())
    stack.create("other", recipe())
    stack.seal("acme", [fact(1), fact(2)], ["ann", "bob"])
    trainer = worker(stack, base)
    backup(tmp_path / "ledger.db", tmp_path / "backup")
    stack.forget("other", "cy")
    trainer._lease._due = 0.0
    trainer.turn()
    assert not trainer.idle
    backup(tmp_path / "backup", tmp_path / "ledger.db")
    taken = stack.ledger.claim(["acme"], "trainer-other", 3600.0, 1)
    assert taken == {"acme": trainer._active["acme"].work.token}
    fence = stack.forget("acme", "ann").fence
    assert fence == trainer._lease._acked
    assert [lease.holder for lease in stack.ledger.unacknowledged(fence, ("trainer",))] == ["trainer-test"]
    settle(trainer)
    assert trainer.idle
    assert stack.ledger.versions("acme") == {}, "another has the claim of that number"
    trainer._lease._due = 0.0
    trainer.turn()
    assert stack.ledger.unacknowledged(fence, ("trainer",)) == []
    stack.ledger.end_claims(taken, "trainer-other")
    settle(trainer)
    assert [entry.tombstone for entry in stack.ledger.manifest("acme", 1).entries] == [True, False]
    assert stack.ledger.version("acme", 1).epoch == 1
    trainer.close()


def backup(source: Path, target: Path) -> None:
    """What `.backup` does, into a database that others may have open too."""
    with closing(sqlite3.connect(source)) as held, closing(sqlite3.connect(target)) as made:
        held.backup(made)


def test_a_step_that_takes_long_loses_no_claim(stack: Stack, base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "SECONDS", 1.0)
    monkeypatch.setattr(claims, "_BEAT_SECONDS", 0.1)
    stack.create("acme", recipe())
    stack.seal("acme", [fact(1), fact(2)], ["ann", "bob"])
    trainer = worker(stack, base)
    taken: list[dict[str, int]] = []

    def slow(*given: object) -> None:
        time.sleep(2.0)
        taken.append(stack.ledger.claim(["acme"], "another", 3600.0, 1))
        step(*given)  # type: ignore[arg-type]

    monkeypatch.setattr("riverdelta.trainer.worker.step", slow)
    trainer.turn()
    assert taken == [{}]
    trainer.close()
    assert stack.ledger.claim(["acme"], "another", 3600.0, 1) == {"acme": 2}


def test_trainers_share_what_waits(stack: Stack, base: Base) -> None:
    names = [f"a{number}" for number in range(6)]
    for name in names:
        stack.create(name, recipe())
        stack.seal(name, [fact(1), fact(2)], ["ann", "bob"])
    one, other = (stack.worker(base, f"trainer-{each}") for each in "ab")
    one.turn()
    other.turn()
    holders = {claim.adapter: claim.holder for claim in stack.ledger.claims()}
    assert holders == {name: f"trainer-{'a' if place < 3 else 'b'}" for place, name in enumerate(names)}
    settle(one)
    settle(other)
    assert [stack.ledger.adapter(name).release for name in names] == [1] * 6
    one.close()
    other.close()
