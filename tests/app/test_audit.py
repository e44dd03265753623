"""The audit trains again what stands in the place of the revoked, shard by shard where there are shards."""

import threading
from pathlib import Path
from typing import Any

import pytest

from riverdelta.app.audit import audit
from riverdelta.app.counterfactual import plan
from riverdelta.core.errors import Gone, Refused
from riverdelta.core.recipe import Recipe
from riverdelta.core.settings import Settings
from riverdelta.registry.gc import collect
from riverdelta.registry.ledger import Hand
from riverdelta.registry.ledger import tables as t
from riverdelta.trainer.base import Base
from riverdelta.trainer.metrics import Metrics
from riverdelta.trainer.worker import Worker
from tests.registry.stack import Stack


class Deployment:
    """An adapter that a trainer of its own keeps up with."""

    def __init__(self, folder: Path, tiny_base: Path, recipe: dict[str, Any]) -> None:
        self.settings = Settings(data=folder / "data", base=str(tiny_base))
        self.stack, trainer, self.folder = Stack(self.settings), self.settings.trainer, folder / "t"
        self.base = Base.load(tiny_base, trainer.device, trainer.dtype, trainer.threads)
        self.stack.ledger.create("acme", Recipe.from_dict(recipe), "test")

    def settle(self) -> None:
        """Learn whatever awaits."""
        stack = self.stack
        worker = Worker(
            stack.ledger, stack.store, stack.keys, self.base, self.folder, "t0", threading.Event(), str, Metrics()
        )
        while worker.turn():
            pass
        worker.close()

    def forget(self, who: str) -> None:
        """Fence and rebuild."""
        self.stack.ledger.forget(f"r-{who}", self.stack.key.subject(who), ["acme"], "test")
        self.settle()

    def audit(self, number: int = 0) -> list[dict[str, object]]:
        """Of a certificate that names a version, or the tip."""
        ledger = self.stack.ledger
        number = number or ledger.adapter("acme").tip
        tip = {"version": number, "digest": ledger.version("acme", number).digest}
        return audit(self.settings, ledger, {"predicate": {"adapters": [{"adapter": "acme", "tip": tip}]}})


@pytest.mark.parametrize("shards", [1, 2])
def test_an_auditor_comes_to_the_same_bits(tmp_path: Path, tiny_base: Path, shards: int) -> None:
    shape: dict[str, Any] = {
        "lora": {"rank": 4},
        "training": {"passes": 2},
        "shards": {"count": shards},
        "curate": {"alike": 0.5},
    }
    held = Deployment(tmp_path, tiny_base, shape)
    for number in range(2):
        said = [(who, f"{who} says {number} and more") for who in ("ann", "bob", "cy", "di", "ed")]
        held.stack.seal("acme", [*said, ("ann", f"ann says {number} and more, again")])
    held.settle()
    held.forget("bob")
    (found,) = held.audit()
    assert found["same_environment"]
    assert found["since"] == 0
    assert found["equal"]


@pytest.mark.parametrize("later", [Hand.ACCEPT, Hand.DISCARD])
def test_what_is_said_of_a_segment_later_changes_no_certificate(tmp_path: Path, tiny_base: Path, later: Hand) -> None:
    held = Deployment(tmp_path, tiny_base, {"lora": {"rank": 4}, "training": {"passes": 2}})
    ledger = held.stack.ledger
    for who in ("bob", "cy", "ann"):
        held.stack.seal("acme", [(who, f"{who} says something"), ("hal", f"hal says it too, of {who}")])
    if later is Hand.ACCEPT:
        ledger.decide_by_hand("acme", 2, Hand.DISCARD, "op")
    held.settle()
    held.forget("ann")
    certified = ledger.adapter("acme").tip
    planned = plan(ledger, "acme", certified)
    ledger.decide_by_hand("acme", 2, later, "op")
    held.settle()
    assert ledger.adapter("acme").tip != certified
    (found,) = held.audit(certified)
    assert found["equal"]
    assert plan(ledger, "acme", certified) == planned
    (now,) = held.audit()
    assert now["equal"]


@pytest.mark.parametrize("shards", [1, 2])
def test_beyond_the_horizon_an_auditor_begins_with_what_is_kept(tmp_path: Path, tiny_base: Path, shards: int) -> None:
    shape: dict[str, Any] = {
        "lora": {"rank": 4},
        "training": {"passes": 1, "rehearse": 1, "max_length": 32},
        "shards": {"count": shards},
        "retain": {"horizon": 1, "targets": 1},
        "gate": {"sample": 2, "tolerance": 5.0},
    }
    held = Deployment(tmp_path, tiny_base, shape)
    stack = held.stack
    for number, who in enumerate(["ann", "bob", "cy", "di", "fay"]):
        stack.seal("acme", [(each, f"{each} says {number}") for each in (who, "hal")])
        held.settle()
        collect(stack.ledger, stack.store, stack.keys, 0.0)
    assert any(each.dropped for each in stack.ledger.segments("acme"))
    held.forget("fay")
    (found,) = held.audit()
    assert found["since"]
    assert found["equal"]
    changed = stack.ledger.version("acme", int(str(found["since"]))).digest
    assert changed != found["replayed"], "something was trained again"

    with stack.ledger.db.write() as c:  # nothing that is kept is old enough
        c.execute(t.versions.update().where(t.versions.c.number < stack.ledger.adapter("acme").tip).values(purged=True))
    with pytest.raises(Gone, match="beyond the forget horizon"):
        held.audit()


def test_what_was_imported_is_refused_with_a_way_out(tmp_path: Path) -> None:
    settings = Settings(data=tmp_path / "data")
    ledger = Stack(settings).ledger
    ledger.import_adapter("acme", Recipe(), "1" * 64, {}, "test")
    tip = {"adapter": "acme", "tip": {"version": 1, "digest": "1" * 64}}
    with pytest.raises(Refused, match="was imported") as refused:
        audit(settings, ledger, {"predicate": {"adapters": [tip]}})
    assert "without `--replay`" in refused.value.hint


def test_what_is_superseded_while_it_is_trained_again_is_left_out(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Deployment(tmp_path, tiny_base, {"lora": {"rank": 4}, "training": {"passes": 1, "steps": 1}})
    for number in range(2):
        held.stack.seal("acme", [(who, f"{who} says {number} and more") for who in ("ann", "bob", "cy")])
    held.settle()
    load = Base.load

    def slow(*given: Any) -> Base:
        held.stack.ledger.forget("late", held.stack.key.subject("cy"), ["acme"], "test")
        return load(*given)

    monkeypatch.setattr(Base, "load", slow)
    assert held.audit() == []
