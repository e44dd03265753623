"""Verify compares what the ledger's tables say of an adapter with its journal, and names what differs."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
import torch

from riverdelta.core import weights
from riverdelta.core.recipe import Recipe
from riverdelta.core.settings import Settings
from riverdelta.core.store import weights_key
from riverdelta.registry.ledger import decisions
from riverdelta.registry.ledger import tables as t
from riverdelta.registry.ledger.decisions import Change
from riverdelta.registry.operations import Operations
from riverdelta.registry.verify import verify
from tests.registry.stack import PREFIX, Stack, two_versions


@pytest.fixture
def stack(tmp_path: Path) -> Stack:
    """`acme` with two versions and one rebuilt, as ann was forgotten."""
    stack = two_versions(Settings(data=tmp_path / "data"))
    Operations(stack.ledger, stack.settings, "op").forget("ann", ["acme"], request="r1")
    stack.train("acme")
    assert problems(stack) == ()
    return stack


def problems(stack: Stack, adapter: str = "acme") -> tuple[str, ...]:
    return verify(stack.ledger, stack.store, stack.keys, adapter).problems


def change(stack: Stack, statement: Any) -> None:
    with stack.ledger.db.write() as c:
        assert c.execute(statement).rowcount


def version(number: int, **values: Any) -> sa.Update:
    return t.versions.update().where(t.versions.c.adapter == "acme", t.versions.c.number == number).values(**values)


def test_weights_swapped_with_their_digest_are_found(stack: Stack) -> None:
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    data, digest = weights.encode(config, {f"{PREFIX}A.weight": torch.ones(2, 64)})
    stack.store.put(weights_key(digest), data)
    was = stack.ledger.version("acme", 3).digest
    change(stack, version(3, digest=digest))
    assert problems(stack) == (f"Version 3 has weights that the journal does not give it: {digest}, not {was}.",)


def test_what_is_served_and_revoked_is_as_the_journal_says(stack: Stack) -> None:
    change(stack, t.adapters.update().where(t.adapters.c.name == "acme").values(release=0))
    assert problems(stack) == ("The release is 0; the journal says 3.",)
    change(stack, t.adapters.update().where(t.adapters.c.name == "acme").values(release=3))
    change(stack, version(2, revoked=False))
    assert problems(stack) == ("Version 2 is not revoked; the journal says it is.",)
    change(stack, version(2, revoked=True, parent=0))
    assert problems(stack) == ("Version 2 has a parent that the journal does not give it: 0, not 1.",)
    change(stack, t.versions.delete().where(t.versions.c.number == 2))
    assert problems(stack) == ("Version 2 is not there.",)


def of(table: sa.Table, *where: Any) -> Any:
    return table.update().where(*where)


A, S, V, F, M = t.adapters.c, t.segments.c, t.versions.c, t.forgets.c, t.mentions.c
PLANTED = {
    "epoch": of(t.adapters).values(epoch=A.epoch + 1),
    "next index": of(t.adapters).values(next_index=A.next_index + 1),
    "next segment": of(t.adapters).values(next_segment=A.next_segment + 1),
    "next version": of(t.adapters).values(next_version=A.next_version + 1),
    "seed": of(t.adapters).values(seed=A.seed + 1),
    "recipe": of(t.adapters).values(recipe={}),
    "recipe's digest": of(t.adapters).values(recipe_digest="0" * 64),
    "not held": of(t.adapters).values(held=None),
    "held elsewhere": of(t.adapters).values(held=0),
    "tip": of(t.adapters).values(tip=1),
    "left tip": of(t.adapters).values(held_tip=1),
    "no left tip": of(t.adapters).values(held_tip=None),
    "mention deleted": t.mentions.delete().where(M.segment == 1),
    "mention of another": of(t.mentions, M.segment == 1).values(mention="0" * 64),
    "mention elsewhere": of(t.mentions, M.segment == 1).values(segment=9),
    "revoked": of(t.versions, V.number == 1).values(revoked=True),
    "purged": of(t.versions, V.number == 1).values(purged=True),
    "saw less": of(t.versions, V.number == 1).values(saw=[]),
    "saw others": of(t.versions, V.number == 3).values(saw=[2, 9]),
    "trigger": of(t.segments, S.number == 1).values(trigger="age"),
    "count": of(t.segments, S.number == 3).values(count=S.count + 1),
    "not learned": of(t.segments, S.number == 1).values(outcome="set_aside"),
    "learned elsewhere": of(t.segments, S.number == 1).values(version=3),
    "forget deleted": t.forgets.delete(),
    "forget of another": of(t.forgets).values(subject="0" * 64),
    "forget elsewhere": of(t.forgets).values(adapters={"other": 1}),
    "forget done": of(t.forgets).values(stage="purged"),
}


def test_what_later_acts_rely_on_is_as_the_journal_says(stack: Stack) -> None:
    stack.seal("acme", [("cy", "canary-cy")])
    stack.train("acme")
    stack.ledger.rollback("acme", 3, "op")
    assert problems(stack) == ()
    for what, statement in PLANTED.items():
        table = statement.table
        with stack.ledger.db.read() as c:
            before = [dict(row._mapping) for row in c.execute(sa.select(table))]
        change(stack, statement)
        assert problems(stack), what
        with stack.ledger.db.write() as c:
            c.execute(sa.text("PRAGMA defer_foreign_keys = ON"))
            c.execute(table.delete())
            c.execute(table.insert(), before)
    assert problems(stack) == ()


def test_a_journal_that_does_not_say_what_a_version_saw_is_an_older_one(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = decisions.decide_increment

    def older(*given: Any) -> Change:
        made = real(*given)
        facts = [(kind, {name: each for name, each in body.items() if name != "saw"}) for kind, body in made.facts]
        return replace(made, facts=tuple(facts))

    monkeypatch.setattr(decisions, "decide_increment", older)
    stack.seal("acme", [("cy", "canary-cy")])
    stack.train("acme")
    assert problems(stack) == ()
    change(stack, version(4, saw=[1]))
    assert problems(stack) == ("Version 4 saw other segments than the journal says.",)


def test_a_suppression_that_was_deleted_is_found(stack: Stack) -> None:
    change(stack, t.suppressions.delete())
    [problem] = problems(stack)
    assert "is not suppressed; fact" in problem
    assert stack.key.subject("ann")[:12] in problem


def test_what_was_allowed_or_only_drawn_in_is_no_problem(stack: Stack) -> None:
    acts = Operations(stack.ledger, stack.settings, "op")
    acts.allow("ann", ["acme"])
    assert problems(stack) == ()
    acts.forget("ann", None, request="r2")
    stack.ledger.create("other", Recipe(), "test")
    stack.ledger.import_adapter("copy", Recipe(), stack.ledger.version("acme", 3).digest, {}, "op")
    acts.forget("bob", ["acme"], request="r3")
    assert stack.ledger.adapter("copy").epoch == 1, "drawn in, as it is a copy of what saw bob"
    for name in ("acme", "other", "copy"):
        stack.train(name)
        assert problems(stack, name) == (), name
    change(stack, t.suppressions.delete())
    assert len(problems(stack)) == 2
