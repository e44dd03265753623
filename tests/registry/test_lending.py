"""A forget that serves until rebuilt: all but the fence at once; that by rebuild, deadline, or whoever comes."""

import json
from pathlib import Path

import pytest

from riverdelta.core.errors import Refused
from riverdelta.core.recipe import Recipe
from riverdelta.core.settings import Settings
from riverdelta.core.store import weights_key
from riverdelta.core.times import later, now
from riverdelta.registry.keeper import Keeper
from riverdelta.registry.ledger import Forget, Stage
from riverdelta.registry.purge import manifest_key
from tests.registry.stack import Stack, two_versions, wait
from tests.registry.test_purge_is_whole import keeper_of


@pytest.fixture
def stack(tmp_path: Path) -> Stack:
    """`acme` with two versions, of which the second saw ann; nobody else at work."""
    return two_versions(Settings(data=tmp_path / "data"))


def lend(stack: Stack, request: str = "req", seconds: float = 600.0, subject: str = "ann") -> Forget:
    until = later(now(), seconds)
    return stack.ledger.forget(request, stack.key.subject(subject), ["acme"], "op", until=until)


def fenced(stack: Stack) -> set[str]:
    return {digest for fence in stack.ledger.fences(0) for digest in fence.digests}


def test_everything_but_the_fence_is_done_at_once(stack: Stack) -> None:
    dirty = stack.ledger.version("acme", 2)
    held = lend(stack)
    assert held.stage is Stage.LENDING
    assert stack.ledger.releases()["acme"] == (2, dirty.digest)
    assert dirty.digest not in fenced(stack)
    head = stack.ledger.adapter("acme")
    assert (head.release, head.tip, head.epoch) == (1, 1, 1)
    assert stack.ledger.version("acme", 2).revoked
    assert dirty.digest in stack.ledger.revoked_digests(), "what it writes meanwhile is not learned"
    assert stack.ledger.suppressed("acme") == {stack.key.subject("ann")}
    assert stack.ledger.work("acme") is not None, "the rebuild awaits"
    with pytest.raises(Refused):
        stack.ledger.release("acme", 2, "op")
    assert lend(stack) == stack.ledger.forget_of("req"), "a repeated request changes nothing"


def test_the_rebuild_ends_it(stack: Stack) -> None:
    dirty = stack.ledger.version("acme", 2).digest
    lend(stack)
    keeper = Keeper(stack.ledger, stack.settings, stack.store, orphan_seconds=0.0)
    assert [held.stage for held in keeper.advance_forgets()] == [Stage.LENDING]
    stack.train("acme")
    assert stack.ledger.releases()["acme"] == (2, dirty)
    assert wait(lambda: not keeper.advance_forgets(), 20)
    assert stack.ledger.releases()["acme"][0] == 3
    assert dirty in fenced(stack)
    assert not stack.store.exists(f"weights/{dirty}.safetensors")
    stages = [fact.body["stage"] for fact in stack.ledger.facts("acme") if fact.kind == "forget_stage"]
    assert stages == ["fenced", "acknowledged", "rebuilt", "purged"]


def test_the_deadline_ends_it_whether_or_not_it_is_rebuilt(stack: Stack) -> None:
    dirty = stack.ledger.version("acme", 2).digest
    lend(stack, seconds=0.0)
    stack.ledger.call_in()
    assert stack.ledger.releases()["acme"][0] == 1
    assert dirty in fenced(stack)
    assert stack.ledger.forget_of("req").stage is Stage.FENCED


def test_an_operator_ends_it(stack: Stack) -> None:
    dirty = stack.ledger.version("acme", 2).digest
    lend(stack)
    stack.ledger.rollback("acme", 1, "op")
    assert stack.ledger.releases()["acme"][0] == 1
    assert dirty in fenced(stack)


def test_a_forget_that_does_not_wait_ends_it(stack: Stack) -> None:
    """The version on loan saw bob too, who is fenced off at once."""
    dirty = stack.ledger.version("acme", 2).digest
    lend(stack)
    stack.ledger.forget("now", stack.key.subject("bob"), ["acme"], "op")
    assert stack.ledger.releases()["acme"] == (0, "")
    assert dirty in fenced(stack)
    assert {held.stage for held in stack.ledger.forgets()} == {Stage.FENCED}


def test_two_that_wait_end_with_the_first(stack: Stack) -> None:
    dirty = stack.ledger.version("acme", 2)
    lend(stack)
    lend(stack, "late", subject="bob")
    assert stack.ledger.releases()["acme"] == (2, dirty.digest)
    stack.ledger.call_in(["late"])
    assert stack.ledger.releases()["acme"] == (0, "")
    assert {held.stage for held in stack.ledger.forgets()} == {Stage.FENCED}


def test_nothing_is_lent_where_nothing_served_is_concerned(stack: Stack) -> None:
    assert lend(stack, subject="nobody").stage is Stage.FENCED


def test_what_is_on_loan_outlives_the_purge_of_a_copy_of_it(stack: Stack) -> None:
    """By a forget for which the other adapter was not asked: its certificate says that they are in use."""
    dirty, ann = stack.ledger.version("acme", 2).digest, stack.key.subject("ann")
    stack.ledger.import_adapter("copy", Recipe(), dirty, {"imported": True}, "op")
    stack.ledger.forget("first", ann, ["copy"], "op")
    lend(stack)
    keeper = keeper_of(stack)
    assert wait(lambda: [held.id for held in keeper.advance_forgets()] == ["req"], 20)
    assert stack.ledger.releases()["acme"] == (2, dirty)
    assert stack.store.exists(weights_key(dirty)), "servers that start load them"
    [part] = json.loads(stack.store.get(manifest_key("first")))["adapters"]
    assert [each for each in part["residual"]["elsewhere"] if "copy@1" in each and "until its rebuild" in each]
    stack.train("acme")
    assert wait(lambda: not keeper.advance_forgets(), 20)
    assert not stack.store.exists(weights_key(dirty))
