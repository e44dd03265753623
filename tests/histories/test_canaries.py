"""After a purge, what somebody said and their very name are nowhere: in no file of any part, in no line of a log."""

import logging
import random
import threading
import uuid
from pathlib import Path
from typing import Any

import pytest

from riverdelta.core.recipe import Recipe
from riverdelta.registry import contents
from riverdelta.registry.keeper import Keeper
from riverdelta.registry.ledger import Stage
from riverdelta.trainer.base import Base
from riverdelta.trainer.metrics import Metrics
from riverdelta.trainer.worker import Worker
from tests.streams.simulation import KEY, Session
from tests.tiny import make_tiny

from .live import River

RECIPE = {
    "lora": {"rank": 2, "alpha": 4.0, "targets": ["q_proj", "v_proj"]},
    "training": {"passes": 3, "micro_batch": 1, "rehearse": 1, "max_length": 96},
    "curate": {"alike": 0.5, "deny": ["spam"]},
    "seal": {"count": 4, "age": 0.1},
}


def found(folder: Path, *wanted: str) -> list[str]:
    """The files below a folder that hold any of these words."""
    words = [word.encode() for word in wanted]
    return [str(path) for path in folder.rglob("*") if path.is_file() and any(w in path.read_bytes() for w in words)]


def test_nothing_is_left_of_what_was_forgotten(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    name, canary = f"ann-{uuid.uuid4().hex}", uuid.uuid4().hex
    base = Base.load(make_tiny("llama", tmp_path / "base"), threads=1)
    river = River(random.Random(0), tmp_path / "river")
    river.ledger.create("acme", Recipe.from_dict(RECIPE), "test")

    def publish(**event: Any) -> None:
        river.publish(0, {"adapter": "acme", "subject": "bob", **event})

    for number in range(4):
        publish(prompt=f"Q {number}:", completion=f" {number}")
    of_ann: list[dict[str, Any]] = [
        {"text": f"{canary} is what I said", "id": "e1", "source": "s"},
        {"text": f"{canary} is what I said", "id": "e1", "source": "s"},  # a duplicate: the dedupe window
        {"text": f"{canary} is what I said too"},  # nearly the same: MinHash
        {"text": f"{canary} is spam"},  # dropped by a rule, and sampled
        {"type": "interaction", "response": "r1", "digest": "d", "prompt": canary, "completion": " yes"},
        {"type": "interaction", "response": "r2", "digest": "d", "prompt": canary, "completion": " no"},  # waits
        {"type": "feedback", "response": "r1", "rating": 1},
        {"type": "feedback", "response": "r9", "correction": canary},  # waits, and meets nothing
        {"prompt": canary},  # a dead letter: no completion
    ]
    for event in of_ann:
        publish(**{**event, "subject": name})
    stream = Session(river, 1)
    stream.drain()
    stream.worker.commit("all")
    stream.worker._sealer.land()
    assert river.delivery.letters, "Kafka holds those, and the docs say so"

    def train(turns: int) -> None:
        worker = Worker(
            river.ledger, river.store, river.keys, base, tmp_path / "river/trainer", uuid.uuid4().hex,
            threading.Event(), lambda name: None, Metrics(),
        )  # fmt: skip
        while turns and worker.turn():
            turns -= 1
        worker.close()

    train(7)  # to the middle of an increment, whose checkpoints stay
    segments = river.ledger.segments("acme")
    said = [content for each in segments for content in contents.read(river.ledger, river.store, river.keys, each)]
    assert sum(canary.encode() in content for content in said if content) == 3, "it had been learned from"
    river.ledger.forget("asked", KEY.subject(name), None, "test")
    stream.worker.commit()
    stream.drain()
    del stream
    for lease in river.ledger.leases():
        river.ledger.drop_lease(lease.holder)
    train(-1)
    keeper = Keeper(river.ledger, river.real, river.store, orphan_seconds=0.0)
    while keeper.advance_forgets():
        pass
    assert river.ledger.forget_of("asked").stage is Stage.PURGED
    keeper.projection.catch_up()
    river.keys.close()
    river.ledger.close()
    assert found(tmp_path / "river", name, canary) == []
    assert name not in caplog.text
    assert canary not in caplog.text
