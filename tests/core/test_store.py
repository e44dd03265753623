"""The object store, on a folder."""

import os
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from riverdelta.core.errors import BadInput, NotFound, Unavailable
from riverdelta.core.store import ObjectStore


@pytest.fixture
def store(tmp_path: Path) -> ObjectStore:
    return ObjectStore(f"file://{tmp_path}/store")


def test_what_is_written_is_read_and_deleted(store: ObjectStore) -> None:
    store.put_all({f"a/{number}": bytes([number]) for number in range(20)})
    store.put("a/3", b"again")
    assert store.get("a/3") == b"again"
    assert list(store.keys("a/")) == sorted(f"a/{number}" for number in range(20))
    assert list(store.keys("b/")) == []
    assert abs(store.written("a/")["a/3"] - datetime.now(UTC)) < timedelta(minutes=5)
    assert store.exists("a/3")
    store.delete("a/3")
    store.delete("a/3")
    assert not store.exists("a/3")
    with pytest.raises(NotFound):
        store.get("a/3")


@pytest.mark.parametrize("key", ["../out", "a/../../out", "/etc/passwd"])
def test_a_key_stays_below_the_root(store: ObjectStore, key: str) -> None:
    for act in (store.get, store.delete, store.exists, lambda key: store.put(key, b"x")):
        with pytest.raises(BadInput):
            act(key)


def test_many_at_once_are_written_or_leave_no_drafts(store: ObjectStore, tmp_path: Path) -> None:
    store.put_all({f"many/{number}/x": bytes([number]) for number in range(20)})
    assert [store.get(f"many/{number}/x") for number in range(20)] == [bytes([number]) for number in range(20)]
    (tmp_path / "store" / "file").write_text("no folder")
    with pytest.raises(Unavailable):
        store.put_all({**{f"more/{number}/x": b"x" for number in range(20)}, "file/x": b"x"})
    assert not list((tmp_path / "store").rglob("*#*"))
    with pytest.raises(BadInput):
        store.put_all({f"{'../' * number}x": b"x" for number in range(20)})


def test_a_draft_that_is_taken_away_is_written_again(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    rename, taken = os.rename, list[str]()

    def take_first(draft: str, path: Path) -> None:
        if not taken:
            taken.append(draft)
            os.unlink(draft)
        rename(draft, path)

    monkeypatch.setattr(os, "rename", take_first)
    store.put_all({f"many/{number}": bytes([number]) for number in range(20)})
    assert [store.get(f"many/{number}") for number in range(20)] == [bytes([number]) for number in range(20)]
    assert len(taken) == 1


def test_deletes_do_not_take_a_folder_from_a_writer(store: ObjectStore) -> None:
    broken: list[BaseException] = []

    def loop(name: str) -> None:
        try:
            for _ in range(200):
                store.put(f"shared/{name}", b"x")
                store.delete(f"shared/{name}")
        except BaseException as error:
            broken.append(error)

    threads = [threading.Thread(target=loop, args=(f"w{number}",)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert broken == []


def test_half_written_drafts_are_dropped_once_they_are_old(store: ObjectStore, tmp_path: Path) -> None:
    store.put("a/one", b"x")
    draft = tmp_path / "store" / "a" / "two#123"
    draft.write_bytes(b"half")
    store.drop_drafts(3600)
    assert draft.exists()
    store.drop_drafts(0)
    assert not draft.exists()
    assert list(store.keys("a/")) == ["a/one"]


def test_a_store_that_cannot_be_had_is_said_to_be_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises((BadInput, Unavailable)):
        ObjectStore(f"file://{tmp_path}/file")
    with pytest.raises(BadInput):
        ObjectStore("nonsense://x")
