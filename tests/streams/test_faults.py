"""A disk that fills: the dataflow says so, waits, and goes on without loss when there is room again."""

import contextlib
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from riverdelta.core.recipe import Recipe
from riverdelta.core.settings import Settings
from riverdelta.registry.ledger import Ledger
from riverdelta.streams import topics
from riverdelta.streams.publish import publish

from .flow import count, flowing, texts, until


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)], check=False, capture_output=True
    )
    if made.returncode != 0:
        pytest.skip("file systems cannot be mounted here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


def test_a_full_disk_is_waited_out(settings: Settings, small_disk: Path, tmp_path: Path) -> None:
    settings.data = small_disk / "data"
    topics.ensure(settings)
    ledger = Ledger.open(settings.ledger_url)
    ledger.create("ada", Recipe.from_dict({"seal": {"count": 4, "age": 0.3, "linger": 0.3}}), "test")
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
    ledger.close()
