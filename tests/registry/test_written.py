"""What a collector takes from a writer that slept is written again before anything names it."""

import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from riverdelta.core import weights as weights_file
from riverdelta.core.errors import Conflict, Refused, Unavailable
from riverdelta.core.recipe import Recipe
from riverdelta.core.settings import Settings
from riverdelta.core.store import ObjectStore, state_key, weights_key
from riverdelta.registry import gc, written
from riverdelta.registry.keystore import KeyStore
from riverdelta.registry.ledger import Ledger, Manifest, ManifestEntry, Seal, VersionRecord
from riverdelta.registry.ledger import tables as t
from riverdelta.registry.peft_io import export_version, import_folder, write_peft_folder
from riverdelta.registry.written import Written
from tests.registry.stack import Stack, two_versions

KEY = "segments/acme/1.seg"


def seal(ledger: Ledger, held: Written) -> None:
    manifest = Manifest(("run",), (ManifestEntry(0, 0, 0, b"", ()),))
    asked = Seal("acme", 0, 0, manifest, "count", KEY, "sha", {("run", 0): (0, 1)}, "ring")
    (made,) = ledger.seal([asked], "test", held.look)
    assert not isinstance(made, Exception)


def test_a_slow_writer_finds_out_and_the_ledger_names_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger, store = Ledger.open(f"sqlite:///{tmp_path}/ledger.db"), ObjectStore(f"file://{tmp_path}/store")
    ledger.create("acme", Recipe(), "test")
    monkeypatch.setattr(written, "SURE_SECONDS", 0.0)
    keys = KeyStore(f"sqlite:///{tmp_path}/keys.db", bytes(32))
    written_as = ({KEY: b"payload"}, keys, {"ring": bytes(32)})
    for lost in (["keys/ring", KEY], ["keys/ring"], [KEY]):
        held = Written(store, *written_as)
        assert gc.collect(ledger, store, keys, grace=0.0, dry=True).deleted == ["keys/ring", KEY]
        ledger.delete_unnamed(lost, partial(gc.delete, store, keys))
        with pytest.raises(Unavailable, match="collected"):
            seal(ledger, held)
        assert ledger.segments("acme") == []
    seal(ledger, Written(store, *written_as))
    assert gc.collect(ledger, store, keys, grace=0.0).deleted == []
    assert store.exists(KEY)
    assert keys.get("ring") == bytes(32)
    ledger.close()


LINEARS = {"model.layers.0.self_attn.q_proj": (64, 64)}


@pytest.fixture
def stack(tmp_path: Path) -> Stack:
    return two_versions(Settings(data=tmp_path / "data"))


def bring(stack: Stack, name: str, folder: Path) -> VersionRecord:
    return import_folder(stack.ledger, stack.store, name, folder, LINEARS, "test")


def test_an_import_that_is_refused_leaves_nothing_in_the_store(stack: Stack, tmp_path: Path) -> None:
    dirty = stack.ledger.version("acme", 2).digest
    export_version(stack.ledger, stack.store, "acme", 2, tmp_path / "out")
    stack.ledger.forget("r", stack.key.subject("ann"), ["acme"], "test")
    stack.ledger.mark_purged("acme", [2])
    stack.store.delete(weights_key(dirty))
    for name, error in (("again", Refused), ("acme", Conflict)):
        with pytest.raises(error):
            bring(stack, name, tmp_path / "out")
        assert not stack.store.exists(weights_key(dirty))
    assert list(stack.ledger.heads()) == ["acme"]


def test_an_import_names_no_weights_that_were_just_collected(
    stack: Stack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, tensors = weights_file.decode(stack.store.get(weights_key(stack.ledger.version("acme", 1).digest)))
    data, digest = weights_file.encode({**config, "lora_alpha": 7}, tensors)
    write_peft_folder(tmp_path / "in", data, digest)
    real = stack.ledger.import_adapter

    def collected(*given: Any) -> VersionRecord:
        stack.ledger.delete_unnamed({weights_key(digest)}, stack.store.delete)
        return real(*given)

    with monkeypatch.context() as patched:
        patched.setattr(stack.ledger, "import_adapter", collected)
        with pytest.raises(Unavailable):
            bring(stack, "mine", tmp_path / "in")
    assert list(stack.ledger.heads()) == ["acme"]
    assert stack.store.exists(weights_key(bring(stack, "mine", tmp_path / "in").digest))


def test_others_come_to_the_ledger_while_much_is_collected_from_a_slow_store(stack: Stack) -> None:
    orphans = [f"weights/{number}" for number in range(60)]
    stack.ledger.take_lease("server", "server", 10.0)
    began = threading.Event()

    def slow(key: str) -> None:
        began.set()
        time.sleep(0.05)

    collecting = threading.Thread(target=stack.ledger.delete_unnamed, args=(orphans, slow))
    collecting.start()
    assert began.wait(10)
    since = time.monotonic()
    stack.ledger.renew_lease("server", 0)
    stack.ledger.forget("r", stack.key.subject("ann"), ["acme"], "test")
    assert collecting.is_alive()
    assert time.monotonic() - since < 2.0
    collecting.join()


def test_what_is_named_stays_however_many_are_asked_about_and_only_they_are_looked_up(stack: Stack) -> None:
    """By versions that stand, are revoked, are purged and were let go, by segments with contents and without; of more
    keys than one statement takes."""
    ledger, s, v = stack.ledger, t.segments.c, t.versions.c
    with ledger.db.write() as c:
        for table in (t.segments, t.versions):
            row = dict(c.execute(sa.select(table).where(table.c.number == 2)).one()._mapping)
            rows = [{**row, "number": number, **other(number)} for number in range(3, 900)]
            c.execute(table.insert(), [{key: each[key] for key in row} for each in rows])
        c.execute(t.segments.update().where(s.number % 7 == 0).values(payload=""))
        c.execute(t.versions.update().where(v.number % 5 == 0).values(revoked=True, purged=v.number % 2 == 0))
        c.execute(t.versions.update().where(v.number % 11 == 0).values(state=""))
        c.execute(t.versions.update().where(v.number % 13 == 0).values(purged=True))
    every = {"keys/", "keys/none", state_key(""), weights_key(""), "weights/none", "states/none", "segments/none"}
    for number in range(3, 900):
        told = other(number)
        every |= {told["payload"], f"keys/{told['keyring']}", weights_key(told["digest"]), state_key(told["state"])}
    with ledger.db.read() as c:
        usable = list(c.execute(sa.select(v.digest, v.state).where(v.revoked.is_(False), v.purged.is_(False))))
    named = ledger.named_objects()
    standing = {weights_key(digest) for digest, _ in usable} | {state_key(state) for _, state in usable if state}
    standing |= {key for key in named if not key.startswith(("weights/", "states/"))}
    asked, here = list[str](), threading.get_ident()

    def note(c: Any, cursor: Any, statement: str, *_: Any) -> None:
        if threading.get_ident() == here:  # threads that other tests have left ask for what they like
            asked.append(statement)

    for revoked, stay in ((False, named), (True, standing)):
        gone = list[str]()
        sa.event.listen(sa.Engine, "before_cursor_execute", note)
        ledger.delete_unnamed(every, gone.append, revoked=revoked)
        sa.event.remove(sa.Engine, "before_cursor_execute", note)
        assert sorted(gone) == sorted(every - stay)
    assert len(standing) < len(named)
    looked = [each for each in asked if each.startswith("SELECT") and "FROM forgets" not in each]  # for loans
    assert all(" IN (" in statement for statement in looked)


def other(number: int) -> dict[str, str]:
    return {
        "payload": f"segments/acme/{number}.seg",
        "keyring": f"ring-{number}",
        "digest": f"{number:064x}",
        "state": f"{number:063x}a",
    }
