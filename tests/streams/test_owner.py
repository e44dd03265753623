"""The owner's memory of adapters, and a ledger that is not the one it was read from."""

import sqlite3
import threading
from contextlib import closing
from pathlib import Path

import pytest

from riverdelta.core.errors import Conflict
from riverdelta.core.patience import Patience
from riverdelta.core.settings import Settings
from riverdelta.streams.owner import Bucket, Owner
from tests.registry.stack import two_versions


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
