"""What a collector takes from a writer that slept is written again before anything names it."""

from functools import partial
from pathlib import Path

import pytest

from riverdelta.core.errors import Unavailable
from riverdelta.core.recipe import Recipe
from riverdelta.core.store import ObjectStore
from riverdelta.registry import gc, written
from riverdelta.registry.keystore import KeyStore
from riverdelta.registry.ledger import Ledger, Manifest, ManifestEntry, Seal
from riverdelta.registry.written import Written

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
