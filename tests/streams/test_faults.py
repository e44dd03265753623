"""A disk that fills, a ledger that goes away: the dataflow says so, waits, and goes on without loss."""

import contextlib
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from riverdelta.core.errors import Unavailable
from riverdelta.core.recipe import Recipe
from riverdelta.core.settings import Settings
from riverdelta.registry.ledger import Ledger
from riverdelta.streams import topics
from riverdelta.streams.publish import publish
from tests.postgres import Postgres, fresh

from .flow import count, flowing, texts, until

RECIPE = Recipe.from_dict({"seal": {"count": 4, "age": 0.3, "linger": 0.3}})


@pytest.fixture
def ledger(settings: Settings) -> Iterator[Ledger]:
    """Topics, and a ledger with the adapter `ada`. Name it last: the other fixtures say where it lies."""
    topics.ensure(settings)
    opened = Ledger.open(settings.ledger_url)
    opened.create("ada", RECIPE, "test")
    yield opened
    opened.close()


@pytest.fixture
def postgres(settings: Settings) -> Iterator[Postgres]:
    """A server that the ledger lies on."""
    server = Postgres()
    settings.registry.ledger = fresh(server.url)
    yield server
    server.remove()


@pytest.fixture
def small_disk(settings: Settings, tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 MiB that the data folder lies on."""
    folder = tmp_path / "small"
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)], check=False, capture_output=True
    )
    if made.returncode != 0:
        pytest.skip("file systems cannot be mounted here")
    settings.data = folder / "data"
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


def test_a_full_disk_is_waited_out(settings: Settings, small_disk: Path, ledger: Ledger, tmp_path: Path) -> None:
    lines = [json.dumps({"adapter": "ada", "text": f"t{number} {'x' * 4000}"}).encode() for number in range(40)]
    with flowing(settings, tmp_path) as flow:
        publish(settings, lines[:20])
        until(lambda: count(ledger) == 20)
        fill(small_disk / "filler")
        publish(settings, lines[20:])
        until(lambda: flow.told("not full?"))
        (small_disk / "filler").unlink()
        until(lambda: count(ledger) == 40)
        assert flow.stop() == 0
    assert set(texts(settings, ledger, "ada").values()) == {1}
    assert len(texts(settings, ledger, "ada")) == 40


def test_a_postgresql_that_goes_away_is_waited_for(
    settings: Settings, postgres: Postgres, ledger: Ledger, tmp_path: Path
) -> None:
    with flowing(settings, tmp_path) as flow:
        publish(settings, numbered(0, 20))
        until(lambda: count(ledger) == 20)
        postgres.stop()
        publish(settings, numbered(20, 40))
        until(lambda: flow.told("waiting. The ledger"))
        flow.kill()
        flow.start()  # and one that starts meanwhile
        until(lambda: flow.told("opening the ledger: waiting"))
        postgres.start()
        until(lambda: ledger_count(ledger) == 40)
        publish(settings, numbered(40, 60))
        postgres.stop()
        postgres.start()
        until(lambda: ledger_count(ledger) == 60)
        assert flow.stop() == 0
    assert texts(settings, ledger, "ada") == {f"t{number}": 1 for number in range(60)}


@pytest.mark.soak
def test_a_locked_sqlite_is_waited_for(settings: Settings, ledger: Ledger, tmp_path: Path) -> None:
    """Somebody holds the write lock for longer than a writer waits for it, as a backup tool may."""
    with flowing(settings, tmp_path) as flow:
        publish(settings, numbered(0, 20))
        until(lambda: count(ledger) == 20)
        with ledger.db.write():
            publish(settings, numbered(20, 40))
            until(lambda: flow.told("database is locked"), 90)
        until(lambda: count(ledger) == 40)
        assert flow.stop() == 0
    assert texts(settings, ledger, "ada") == {f"t{number}": 1 for number in range(40)}


def numbered(first: int, end: int) -> list[bytes]:
    return [json.dumps({"adapter": "ada", "text": f"t{number}"}).encode() for number in range(first, end)]


def ledger_count(ledger: Ledger) -> int:
    try:
        return count(ledger)
    except Unavailable:
        return -1
