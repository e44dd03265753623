"""What `allow` ends, and what it leaves: nobody is learned from again that was not to be."""

import random
import sqlite3
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from riverdelta.core.errors import Conflict, Unavailable
from riverdelta.core.recipe import Recipe
from riverdelta.core.settings import Settings
from riverdelta.registry.operations import Operations
from riverdelta.registry.verify import verify
from tests.registry.stack import Stack, two_versions
from tests.registry.test_waiting_requests import Reader, asks


@pytest.fixture
def stack(tmp_path: Path) -> Stack:
    """`acme`, of which the second version saw ann; no broker."""
    return two_versions(Settings(data=tmp_path / "data"))


def is_suppressed(stack: Stack, who: str) -> bool:
    """Whether `acme` learns nothing of a subject."""
    return stack.key.subject(who) in stack.ledger.suppressed("acme")


def test_where_events_were_read_nobody_is_allowed_without_a_word_of_where_they_end(stack: Stack) -> None:
    acts = Operations(stack.ledger, stack.settings, "test")
    acts.forget("ann", ["acme"])
    stack.ledger.move_positions({("run", 0, 5): 0})
    for request in ("", "again", "again"):
        with pytest.raises(Unavailable, match=r"kafka\.bootstrap"):
            acts.allow("ann", ["acme"], request=request)
    assert is_suppressed(stack, "ann")
    assert acts.allow("bob", ["acme"], request="nothing to allow") == []


def test_where_no_event_was_ever_read_no_broker_is_needed(stack: Stack) -> None:
    acts = Operations(stack.ledger, stack.settings, "test")
    acts.forget("ann", ["acme"])
    stack.ledger.record_heard("run", 0, 7, [])  # of the control topic
    assert acts.allow("ann", ["acme"]) == ["acme"]


@pytest.mark.parametrize("named", [["acme"], None])
def test_a_forget_that_comes_while_kafka_is_asked_stands(
    stack: Stack, monkeypatch: pytest.MonkeyPatch, named: list[str] | None
) -> None:
    """What was sent between where the log ended and that forget would be learned."""
    acts, others = (Operations(stack.ledger, stack.settings, who) for who in ("one", "two"))
    stack.ledger.create("beta", Recipe(), "test")
    for adapter in ("acme", "beta"):
        acts.forget("ann", [adapter])

    def ends(_: Settings) -> dict[tuple[str, int], int]:
        others.forget("ann", named, request="second")
        return {("run", 0): 5}

    monkeypatch.setattr("riverdelta.registry.operations.log_ends", ends)
    with pytest.raises(Conflict):
        acts.allow("ann", ["acme"], request="x")
    assert is_suppressed(stack, "ann")
    assert not stack.ledger.allowed_from("acme")
    monkeypatch.setattr("riverdelta.registry.operations.log_ends", lambda _: {("run", 0): 7})
    assert acts.allow("ann", named, request="x"), "asked for again, under the id that did nothing"
    assert not is_suppressed(stack, "ann")


@pytest.mark.parametrize("everywhere", [False, True])
def test_what_else_was_to_end_ends(stack: Stack, monkeypatch: pytest.MonkeyPatch, everywhere: bool) -> None:
    acts = Operations(stack.ledger, stack.settings, "test")
    stack.ledger.create("beta", Recipe(), "test")
    acts.forget("ann", None if everywhere else ["acme", "beta"])

    def ends(_: Settings) -> dict[tuple[str, int], int]:
        acts.forget("ann", ["acme"])
        return {("run", 0): 5}

    monkeypatch.setattr("riverdelta.registry.operations.log_ends", ends)
    assert acts.allow("ann", None) == (["*"] if everywhere else ["beta"])
    assert stack.ledger.suppressed_in(stack.key.subject("ann")) == {"acme"}
    assert [verify(stack.ledger, stack.store, stack.keys, name).problems for name in ("acme", "beta")] == [(), ()]


def test_an_allow_that_is_heard_late_lifts_no_forget_made_since_it_was_sent(
    stack: Stack, caplog: pytest.LogCaptureFixture
) -> None:
    acts = Operations(stack.ledger, stack.settings, "test")
    acts.forget("ann", ["acme"])
    time.sleep(0.002)
    topic = [asks("late", "allow", "ann", "acme", sent=time.time() * 1000)]
    time.sleep(0.002)
    acts.forget("ann", ["acme"])
    Reader(stack, topic).read()
    assert is_suppressed(stack, "ann")
    assert "forgotten again" in caplog.text
    time.sleep(0.002)
    topic += [asks("late", "allow", "ann", "acme")]
    Reader(stack, topic).read()
    assert not is_suppressed(stack, "ann"), "sent again"


@pytest.mark.parametrize("sent", [{"sent": 1}, {"sent": -1}, {"sent": 2**62}])
def test_on_one_partition_requests_are_in_order_whatever_their_clocks_say(stack: Stack, sent: dict[str, int]) -> None:
    topic = [asks(0, "forget", "ann", "acme"), asks(1, "allow", "ann", "acme", **sent)]
    Reader(stack, topic).read()
    assert not is_suppressed(stack, "ann")
    topic += [asks(2, "forget", "ann", "acme", **sent)]
    Reader(stack, topic).read()
    assert is_suppressed(stack, "ann")


@pytest.mark.parametrize("seed", range(6))
def test_whose_last_wish_is_to_be_forgotten_is_forgotten(tmp_path: Path, seed: int) -> None:
    """By message or command, however late the keeper hears, and after a restore, the forgets made since repeated."""
    dice = random.Random(seed)
    settings = Settings(data=tmp_path / "data")
    stack, kept, since = two_versions(settings), tmp_path / "backup", list[str]()
    last, topic = dict[str, str](), list[dict[str, Any] | None]()

    def copy(source: Path, target: Path) -> None:
        with closing(sqlite3.connect(source)) as held, closing(sqlite3.connect(target)) as made:
            held.backup(made)

    def hear() -> None:
        Reader(stack, topic).read()
        for who, action in last.items():
            assert action == "allow" or is_suppressed(stack, who), (who, topic)

    copy(settings.data / "ledger.db", kept)
    for number in range(30):
        time.sleep(0.002)
        who, action = dice.choice(["ann", "bob"]), dice.choice(["forget", "allow"])
        if dice.random() < 0.5:
            topic.append(asks(number, action, who, "acme", sent=time.time() * 1000))
            last[who] = action
        elif action == "forget":
            Operations(stack.ledger, settings, "test").forget(who, ["acme"], request=f"{number}")
            since.append(who)
            last[who] = action
        if dice.random() < 0.3:
            hear()
        if dice.random() < 0.1:
            copy(settings.data / "ledger.db", kept)
            since.clear()
        if dice.random() < 0.1:
            stack.ledger.close()
            copy(kept, settings.data / "ledger.db")
            stack = Stack(settings)
            for place, again in enumerate(since):
                acts = Operations(stack.ledger, settings, "test")
                acts.forget(again, ["acme"], request=f"repeated {number}/{place}")
    hear()
