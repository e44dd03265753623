"""The key store: wrapped keys, their deletion down to the bytes on disk, and a KMS that guards the root key."""

import json
import sqlite3
import stat
import sys
from contextlib import closing
from pathlib import Path

import pytest
import sqlalchemy as sa

from riverdelta.core.errors import BadInput, Corrupt, NotFound, Refused, Unavailable
from riverdelta.core.settings import Kafka, Registry, Settings
from riverdelta.registry.keeper import Keeper
from riverdelta.registry.keystore import CommandKms, KeyStore
from riverdelta.registry.ledger import database
from riverdelta.registry.operations import Operations
from riverdelta.registry.purge import manifest_key
from tests.postgres import Postgres, fresh
from tests.registry.stack import two_versions, wait
from tests.registry.test_purge_is_whole import keeper_of

KEYS = {"one": bytes(range(32)) * 2, "two": bytes(range(32, 64))}
# Not a cipher: what matters here is that the root key's bytes are nowhere in the clear.
KMS = "import base64,sys; data=base64.b64decode(sys.stdin.read()); "
KMS += "print(base64.b64encode(bytes(byte ^ 90 for byte in data)).decode())"


@pytest.fixture
def alone(tmp_path: Path) -> Settings:
    """Settings without a broker."""
    return Settings.read(data=tmp_path / "data", kafka=Kafka(bootstrap="127.0.0.1:1"))


def test_what_is_kept_is_found_again_and_readable_to_its_owner_alone(alone: Settings) -> None:
    store = KeyStore.open(alone)
    store.add(KEYS)
    store.add({"one": bytes(64)})  # the same again, after a lost acknowledgement: nothing changes
    again = KeyStore.open(alone)
    assert {name: again.get(name) for name in KEYS} == KEYS
    assert set(again.written()) == set(KEYS)
    assert stat.S_IMODE((alone.keys_dir / "contents.key").stat().st_mode) == 0o600
    assert not alone.data.exists()
    files = b"".join(path.read_bytes() for path in alone.keys_dir.iterdir())
    assert KEYS["two"] not in files


def test_deleted_keys_leave_no_bytes_behind(alone: Settings) -> None:
    store = KeyStore.open(alone)
    store.add(KEYS)
    store.scrub()
    files = [alone.keys_dir / "keys.db", alone.keys_dir / "keys.db-wal"]
    held = files[0].read_bytes()
    [wrapped] = [held[at : at + 60] for at in [held.index(b"two") + 3]]  # nonce, 32 bytes and tag follow the name
    store.change({"two": lambda keys: bytes(len(keys)), "nobody": lambda keys: keys})
    store.change({"two": lambda keys: bytes(len(keys))})
    store.delete(["one"])
    store.scrub()
    assert store.get("two") == bytes(32)
    with pytest.raises(NotFound):
        store.get("one")
    assert not any(wrapped in path.read_bytes() for path in files)
    assert files[1].read_bytes() == b""


def test_deleted_keys_leave_the_tables_of_postgresql(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row that is changed stays in PostgreSQL's file beside the new one, and is kept while somebody may look back."""
    monkeypatch.setattr(database, "_OLDER_SECONDS", 0.2)
    server = Postgres()
    try:
        registry = Registry(keys=fresh(server.url), ledger=fresh(server.url))
        stack = two_versions(Settings(data=tmp_path / "data", registry=registry))
        engine = sa.create_engine(registry.keys)
        with engine.begin() as c:
            query = sa.text("SELECT wrapped FROM keys WHERE name = :name")
            wrapped = bytes(c.execute(query, {"name": stack.ledger.segment("acme", 2).keyring}).scalar_one())
        Operations(stack.ledger, stack.settings, "op").forget("ann", ["acme"], request="r1")
        stack.train("acme")
        keeper = Keeper(stack.ledger, stack.settings, stack.store, orphan_seconds=0.0)
        assert server.holding(wrapped) == {"base", "pg_wal"}
        with engine.connect().execution_options(isolation_level="REPEATABLE READ") as c:
            c.execute(sa.text("SELECT txid_current()"))  # looks back to before the scrub, at whatever it reads
            with pytest.raises(Unavailable, match="older"):
                stack.keys.scrub()
        assert [each.stage for each in keeper.advance_forgets()] == []
        assert server.holding(wrapped) == {"pg_wal"}
        manifest = json.loads(stack.store.get(manifest_key("r1")))
        [adapter] = manifest["adapters"]
        assert any("write-ahead log" in each for each in adapter["residual"]["elsewhere"])
        engine.dispose()
    finally:
        server.remove()


def test_what_keeps_a_deleted_key_in_the_tables_of_postgresql_is_waited_for_or_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whoever has begun to write, in whichever database, looks back as far as a reader; a table of another role's is
    passed over by VACUUM without an error."""
    monkeypatch.setattr(database, "_OLDER_SECONDS", 0.2)
    server = Postgres()
    try:
        url, elsewhere = fresh(server.url), fresh(server.url)
        engines = {each: sa.create_engine(each) for each in (url, elsewhere)}
        store = KeyStore(url, bytes(32))

        def deleted(name: str) -> bytes:
            store.add({name: KEYS["two"]})
            with engines[url].begin() as c:
                query = sa.text("SELECT wrapped FROM keys WHERE name = :name")
                wrapped = bytes(c.execute(query, {"name": name}).scalar_one())
            store.change({name: lambda keys: bytes(len(keys))})
            return wrapped

        for busy, engine in engines.items():
            with engine.connect() as c:
                c.execute(sa.text("SELECT txid_current()"))  # and no more for now, as between two statements
                wrapped = deleted(f"while {busy[-4:]} is busy")
                with pytest.raises(Unavailable, match="older"):
                    store.scrub()
            store.scrub()
            assert server.holding(wrapped) == {"pg_wal"}
        with engines[url].begin() as c:
            for statement in ("CREATE ROLE app LOGIN", "GRANT ALL ON keys TO app"):
                c.execute(sa.text(statement))
        lent = KeyStore(url.replace("river@", "app@"), bytes(32))
        wrapped = deleted("of a table that is another role's")
        with pytest.raises(Refused, match="owner"):
            lent.scrub()
        assert "base" in server.holding(wrapped)
        with engines[url].begin() as c:
            for statement in ("GRANT CREATE ON SCHEMA public TO app", "ALTER TABLE keys OWNER TO app"):
                c.execute(sa.text(statement))
        lent.scrub()
        assert server.holding(wrapped) == {"pg_wal"}
        for each in (store, lent):
            each.close()
        for engine in engines.values():
            engine.dispose()
    finally:
        server.remove()


def test_a_damaged_row_keeps_no_other_key_from_being_deleted(alone: Settings, caplog: pytest.LogCaptureFixture) -> None:
    stack = two_versions(alone)
    rows = [stack.ledger.segment("acme", number).keyring for number in (1, 2)]
    whole = {row: stack.keys.get(row) for row in rows}

    def damage(row: str) -> None:
        with closing(sqlite3.connect(alone.keys_dir / "keys.db")) as c:
            c.execute("UPDATE keys SET wrapped = zeroblob(100) WHERE name = ?", (row,))
            c.commit()

    damage(rows[0])
    with pytest.raises(Corrupt, match=rows[0]):
        Operations(stack.ledger, alone, "op").forget("bob", ["acme"], request="r1")
    assert stack.keys.get(rows[1])[:32] == whole[rows[1]][:32], "ann's"
    assert stack.keys.get(rows[1])[32:] == bytes(32), "bob's, of the other segment"
    stack.keys.delete(rows[:1])
    stack.keys.add({rows[0]: whole[rows[0]]})  # as from a backup
    keeper = keeper_of(stack)
    stack.train("acme")
    assert wait(lambda: not keeper.advance_forgets(), 10)
    assert stack.keys.get(rows[0]) == bytes(32)

    damage(rows[0])
    Operations(stack.ledger, alone, "op").forget("ann", ["acme"], request="r2")
    stack.train("acme")
    keeper = keeper_of(stack)
    assert wait(lambda: not keeper.advance_forgets(), 10), "a finished forget's damaged row keeps no other waiting"
    assert any(rows[0] in record.getMessage() for record in caplog.records if record.levelname == "ERROR")
    assert stack.keys.get(rows[1]) == bytes(64)


def test_another_root_key_opens_nothing(alone: Settings) -> None:
    KeyStore.open(alone).add(KEYS)
    with pytest.raises(Corrupt, match="root key"):
        KeyStore(alone.keys_url, bytes(32)).get("one")
    (alone.keys_dir / "contents.key").write_bytes(b"short")
    with pytest.raises(Corrupt, match="5 bytes"):
        KeyStore.open(alone)


def test_a_kms_guards_the_root_key(alone: Settings, tmp_path: Path) -> None:
    script = tmp_path / "kms.py"
    script.write_text(KMS)
    alone.registry.kms = f"{sys.executable} {script}"
    KeyStore.open(alone).add(KEYS)
    assert KeyStore.open(alone).get("two") == KEYS["two"]
    wrapped = (alone.keys_dir / "contents.key.wrapped").read_bytes()
    assert len(CommandKms(alone.registry.kms).unwrap(wrapped)) == 32
    assert not (alone.keys_dir / "contents.key").exists()
    script.write_text("raise SystemExit('the vault is sealed')")
    with pytest.raises(Unavailable, match="vault is sealed"):
        KeyStore.open(alone)


def test_the_ledger_is_no_place_for_keys(alone: Settings) -> None:
    alone.registry.keys = alone.ledger_url
    with pytest.raises(BadInput, match="database of its own"):
        KeyStore.open(alone)
