"""`riverdelta up` on a data folder: stopped, started again, and told what is wrong with it."""

import shutil
import signal
import socket
import sqlite3
from pathlib import Path

import psutil
import pytest

from tests.tiny import make_tiny

from .river import River, facts, question


def test_a_data_folder_survives_restarts(tmp_path: Path, tiny_base: Path, bootstrap: str) -> None:
    river = River(tmp_path, tiny_base, bootstrap)
    try:
        river.start()
        river.create("again")
        river.publish(facts("again", ["a1", "b2"]))
        first = river.released("again", 1)
        river.served("again", first)
        assert "Another riverdelta up" in _refuses(river, code=4)
        code, seconds = river.stop(signal.SIGINT)
        assert code == 0
        assert seconds < 5
        river.start()
        assert river.ask("again", question("a1")) == (" a1", first)
        if not bootstrap:
            assert river.said("keeps events in memory only. 2 entries were sealed and stay")
        river.publish(facts("again", ["c3", "d4"]))
        river.served("again", river.released("again", 2))
        assert [river.ask("again", question(answer))[0] for answer in ("a1", "c3")] == [" a1", " c3"]
        assert river.process is not None
        children = psutil.Process(river.process.pid).children(recursive=True)
        river.process.kill()
        _, left = psutil.wait_procs(children, 10)
        assert not left, "they end with `up`, even when it is killed"
    finally:
        river.end()


@pytest.fixture
def asleep(tmp_path: Path, tiny_base: Path) -> River:
    """A stack that is not started."""
    return River(tmp_path, tiny_base)


def _refuses(river: River, *options: str, code: int) -> str:
    """`up` ends at once with this exit code and one line; the line."""
    told = river.tell("up", *options, code=code)
    lines = [line for line in told.splitlines() if line.strip()]
    assert len(lines) == 1, told
    assert lines[0].startswith("riverdelta: ")
    return lines[0]


def test_a_port_that_is_taken(asleep: River) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"Cannot listen on 127.0.0.1:{port}: Address already in use" in _refuses(
            asleep, "--port", str(port), code=4
        )


def test_no_model_and_a_missing_one(asleep: River, tmp_path: Path) -> None:
    assert "no folder" in _refuses(asleep, "--base", str(tmp_path / "absent"), code=3)
    asleep.environment["RIVERDELTA_BASE"] = ""
    assert "No base model is set" in _refuses(asleep, code=2)


def test_another_base_than_the_folders(asleep: River, tmp_path: Path) -> None:
    asleep.data.mkdir()
    other = make_tiny("llama", tmp_path / "other", seed=1)
    ledger = asleep.ledger
    ledger.remember("base", "0" * 64)
    ledger.close()
    assert "belongs to the base model with digest 000000000000" in _refuses(asleep, "--base", str(other), code=5)


def test_no_broker_where_one_is_named(asleep: River) -> None:
    assert "No Kafka broker answers at 127.0.0.1:1" in _refuses(asleep, "--kafka", "127.0.0.1:1", code=8)


@pytest.mark.parametrize("damage", ["junk", "cut"])
def test_a_damaged_ledger(asleep: River, damage: str) -> None:
    asleep.create("acme")
    path = asleep.data / "ledger.db"
    for beside in asleep.data.glob("ledger.db-*"):
        beside.unlink()
    if damage == "junk":
        path.write_bytes(b"this is no database" * 1000)
    else:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert "ledger" in _refuses(asleep, code=7).lower()


@pytest.mark.parametrize(("made_by", "code"), [("another program", 7), ("a newer Riverdelta", 5)])
def test_a_ledger_that_is_not_ours(asleep: River, made_by: str, code: int) -> None:
    asleep.data.mkdir()
    foreign = sqlite3.connect(asleep.data / "ledger.db")
    if code == 7:
        foreign.execute("CREATE TABLE adapters (id INTEGER)")
    else:
        foreign.execute("CREATE TABLE ledger_version (version_num TEXT)")
        foreign.execute("INSERT INTO ledger_version VALUES ('9999')")
    foreign.commit()
    foreign.close()
    assert "ledger" in _refuses(asleep, code=code), made_by


def test_a_lost_key(asleep: River, tmp_path: Path) -> None:
    asleep.create("acme")
    asleep.environment["RIVERDELTA_BASE"] = str(tmp_path / "absent")
    _refuses(asleep, code=3)  # checks the keys before the base
    shutil.rmtree(tmp_path / "data-keys")
    assert "no subjects.key" in _refuses(asleep, code=7)
