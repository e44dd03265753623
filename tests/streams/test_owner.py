"""The owner's memory of adapters, and a ledger that is not the one it was read from."""

import sqlite3
import threading
from contextlib import closing
from pathlib import Path

import pytest

from riverdelta.core.errors import Conflict
from riverdelta.core.patience import Patience
from riverdelta.core.recipe import Recipe
from riverdelta.core.settings import Settings
from riverdelta.registry.operations import Operations
from riverdelta.streams.items import EXAMPLE, FEEDBACK, INTERACTION, Item, Parcel
from riverdelta.streams.owner import Bucket, Owner
from tests.registry.stack import Stack, two_versions

RUN = ("run", 0)


def test_a_ledger_that_has_lost_entries_is_not_gone_on_with(tmp_path: Path) -> None:
    """They were consumed: going on would pass their events over for good. A new start reads them again."""
    stack = two_versions(Settings(data=tmp_path / "data"))
    ledger = tmp_path / "data" / "ledger.db"
    with closing(sqlite3.connect(ledger)) as held, closing(sqlite3.connect(tmp_path / "backup")) as made:
        held.backup(made)
    stack.seal("acme", [("bob", "sealed after the backup")])
    owner = Owner(stack.settings, stack.ledger, Patience(threading.Event()))
    bucket = owner.buckets[0] = Bucket(0)
    state = bucket.adapters["acme"] = owner.load("acme")
    owner.start_at(0)
    with closing(sqlite3.connect(tmp_path / "backup")) as held, closing(sqlite3.connect(ledger)) as made:
        held.backup(made)
    with pytest.raises(Conflict, match="restored"):
        owner.start_at(0)  # its lease was of another ledger
    with pytest.raises(Conflict, match="restored"):
        owner.reload(state)  # what it sealed was refused
    assert bucket.adapters["acme"] is state


def says(stack: Stack, offset: int, who: str, kind: str = EXAMPLE, event: bytes = b"", **more: object) -> Item:
    """An event of a subject's, at its place in Kafka."""
    said = {
        EXAMPLE: b'{"type":"example","text":"hers"}',
        INTERACTION: b'{"prompt":"2+2=","completion":"5"}',
        FEEDBACK: b'{"correction":"4"}',
    }[kind]
    response = b"r1" if kind != EXAMPLE else b""
    return Item(kind, "new", RUN, offset, event, (stack.key.subject(who),), said, None, response)


def read(stack: Stack, items: list[Item], owner: Owner | None = None) -> Owner:
    """An owner that has read a partition's items, from its beginning on unless it is given."""
    owner = owner or Owner(stack.settings, stack.ledger, Patience(threading.Event()))
    owner.take(Parcel(0, (0, 0), {RUN: items[-1].offset + 1}, items, []), 0.0)
    return owner


def said(owner: Owner) -> list[bool]:
    """Of each open entry, whether it says anything."""
    return [entry.content is not None for state in owner.states() for entry in state.open]


@pytest.mark.parametrize("everywhere", [False, True])
def test_what_came_before_allow_is_not_learned_when_it_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, everywhere: bool
) -> None:
    """Before the forget, and while the subject was suppressed: none is sealed when the dataflow is killed."""
    stack = two_versions(Settings(data=tmp_path / "data"))
    stack.ledger.create("new", Recipe(), "test")
    acts, names = Operations(stack.ledger, stack.settings, "test"), None if everywhere else ["new"]
    items = [says(stack, 0, "ann"), says(stack, 1, "bob"), says(stack, 2, "ann", INTERACTION)]
    owner = read(stack, items)
    owner.catch_up(acts.forget("ann", names).forget.fence)
    items.append(says(stack, 3, "ann"))
    read(stack, items[3:], owner)
    assert said(owner) == [False, True, False]
    monkeypatch.setattr("riverdelta.registry.operations.log_ends", lambda _: {RUN: 5})
    acts.allow("ann", names)
    items.append(says(stack, 4, "ann"))  # sent before, and not read yet
    items += [says(stack, 5, "ann"), says(stack, 6, "bob", FEEDBACK, b"f")]
    read(stack, items[4:], owner)
    assert said(owner) == [False, True, False, False, True, False]
    assert said(read(stack, items)) == said(owner), "after a crash all is read again"

    acts.forget("ann", names)
    acts.allow("ann", names)
    assert not any(
        said(read(stack, [item for item in items if item.subjects == items[0].subjects and item.offset < 5]))
    )
