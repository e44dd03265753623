"""A ledger from before a purge beside a store from after it, as the documented order of backups may leave them; and a
key store from before one that the ledger knows."""

import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from riverdelta.core.errors import NotFound
from riverdelta.core.settings import Settings
from riverdelta.registry import contents, gc
from riverdelta.registry.ledger import Forget, Stage
from riverdelta.registry.operations import Operations
from riverdelta.registry.verify import verify
from tests.registry.stack import Stack, two_versions
from tests.registry.test_purge_is_whole import keeper_of


def purge(stack: Stack) -> list[Forget]:
    """The forgets that a keeper leaves unfinished."""
    keeper = keeper_of(stack)
    for _ in range(4):
        if not (left := keeper.advance_forgets()):
            break
    return left


def forget(stack: Stack, subject: str, request: str) -> None:
    """Fence, and what can be done then."""
    Operations(stack.ledger, stack.settings, "op").forget(subject, ["acme"], request=request)


def said(stack: Stack) -> list[list[bytes | None]]:
    """What all segments say."""
    segments = stack.ledger.segments("acme")
    return [contents.read(stack.ledger, stack.store, stack.keys, segment) for segment in segments]


def restored(stack: Stack, copy: Path) -> Stack:
    """The ledger as it was when it was copied, over store and keys as they are."""
    folder = stack.settings.data
    stack.ledger.close()
    for file in folder.glob("ledger.db*"):
        file.unlink()
    shutil.copy(copy, folder / "ledger.db")
    return Stack(stack.settings)


@pytest.fixture
def stack(tmp_path: Path) -> Stack:
    """A ledger copied before ann was forgotten and her contents purged."""
    stack = two_versions(Settings(data=tmp_path / "data"))
    with sqlite3.connect(tmp_path / "data" / "ledger.db") as held, sqlite3.connect(tmp_path / "ledger.copy") as copy:
        held.backup(copy)
    forget(stack, "ann", "r1")
    stack.train("acme")
    assert purge(stack) == []
    return restored(stack, tmp_path / "ledger.copy")


def test_a_forget_repeated_after_a_restore_ends(stack: Stack) -> None:
    assert gc.collect(stack.ledger, stack.store, stack.keys, 0.0).deleted, "rebuilt weights, which nothing names"
    forget(stack, "ann", "r1")
    stack.train("acme")
    assert said(stack)[1][0] is None
    assert b"canary-bob-three" in (said(stack)[1][1] or b"")
    assert purge(stack) == []
    assert verify(stack.ledger, stack.store, stack.keys, "acme").problems == ()
    assert gc.collect(stack.ledger, stack.store, stack.keys, 0.0).deleted == []


def test_another_forget_first_says_which_is_to_be_repeated(stack: Stack) -> None:
    forget(stack, "bob", "r2")
    with pytest.raises(NotFound, match=r"forgets? .*since"):
        stack.train("acme")
    assert [each.stage for each in purge(stack)] == [Stage.ACKNOWLEDGED]
    forget(stack, "ann", "r1")
    stack.train("acme")
    assert purge(stack) == []
    assert verify(stack.ledger, stack.store, stack.keys, "acme").problems == ()


def test_what_a_purge_has_rewritten_is_rewritten_again_after_a_restore(stack: Stack) -> None:
    """The payload in the place of the one that the ledger names holds what this forget is about."""
    forget(stack, "ann", "r1")
    forget(stack, "bob", "r2")
    stack.train("acme")
    assert purge(stack) == []
    assert said(stack) == [[None, None], [None, None]]
    [held] = stack.store.keys("segments/acme/" + stack.ledger.segment("acme", 2).keyring)
    assert held == stack.ledger.segment("acme", 2).payload
    assert verify(stack.ledger, stack.store, stack.keys, "acme").problems == ()


@pytest.mark.parametrize("repeated", [False, True])
def test_a_key_store_restored_alone_loses_again_what_was_forgotten(tmp_path: Path, repeated: bool) -> None:
    """Repeated under a new id, a forget finds nothing live any more: the ledger says what the first one erased."""
    stack = two_versions(Settings(data=tmp_path / "data"))
    segment, path = stack.ledger.segment("acme", 2), stack.settings.keys_dir / "keys.db"
    with closing(sqlite3.connect(path)) as held, closing(sqlite3.connect(tmp_path / "keys.copy")) as copy:
        held.backup(copy)
    forget(stack, "ann", "r1")
    stack.train("acme")
    assert purge(stack) == []
    erased = stack.keys.get(segment.keyring)
    stack.ledger.close()
    stack.keys.close()
    with closing(sqlite3.connect(tmp_path / "keys.copy")) as copy, closing(sqlite3.connect(path)) as held:
        copy.backup(held)
    stack = Stack(stack.settings)
    assert stack.keys.get(segment.keyring) != erased
    assert verify(stack.ledger, stack.store, stack.keys, "acme").problems
    if repeated:
        forget(stack, "ann", "r2")
    assert purge(stack) == []
    assert stack.keys.get(segment.keyring) == erased
    assert verify(stack.ledger, stack.store, stack.keys, "acme").problems == ()
    assert b"canary-bob-three" in (said(stack)[1][1] or b"")


def test_a_payload_that_is_gone_for_good_is_told_of(stack: Stack) -> None:
    for key in list(stack.store.keys("segments/acme")):
        stack.store.delete(key)
    forget(stack, "ann", "r1")
    with pytest.raises(NotFound, match="holds no segments/acme"):
        stack.train("acme")
    assert [each.stage for each in purge(stack)] == [Stage.ACKNOWLEDGED]
