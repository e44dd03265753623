"""The audit trains again what stands in the place of the revoked, shard by shard where there are shards."""

import threading
from pathlib import Path
from typing import Any

import pytest

from riverdelta.app.audit import audit
from riverdelta.core.recipe import Recipe
from riverdelta.core.settings import Settings
from riverdelta.trainer.base import Base
from riverdelta.trainer.metrics import Metrics
from riverdelta.trainer.worker import Worker
from tests.registry.stack import Stack


@pytest.mark.parametrize("shards", [1, 2])
def test_an_auditor_comes_to_the_same_bits(tmp_path: Path, tiny_base: Path, shards: int) -> None:
    settings = Settings(data=tmp_path / "data", base=str(tiny_base))
    stack, trainer = Stack(settings), settings.trainer
    base = Base.load(tiny_base, trainer.device, trainer.dtype, trainer.threads)
    shape: dict[str, Any] = {
        "lora": {"rank": 4},
        "training": {"passes": 2},
        "shards": {"count": shards},
        "curate": {"alike": 0.5},
    }
    stack.ledger.create("acme", Recipe.from_dict(shape), "test")
    for number in range(2):
        said = [(who, f"{who} says {number} and more") for who in ("ann", "bob", "cy", "di", "ed")]
        stack.seal("acme", [*said, ("ann", f"ann says {number} and more, again")])

    def settle() -> None:
        worker = Worker(
            stack.ledger, stack.store, stack.keys, base, tmp_path / "t", "t0", threading.Event(), str, Metrics()
        )
        while worker.turn():
            pass
        worker.close()

    settle()
    stack.ledger.forget("r", stack.key.subject("bob"), ["acme"], "test")
    settle()
    head = stack.ledger.adapter("acme")
    tip = {"version": head.tip, "digest": stack.ledger.version("acme", head.tip).digest}
    told = {"predicate": {"adapters": [{"adapter": "acme", "tip": tip}]}}
    (found,) = audit(settings, stack.ledger, told)
    assert found["same_environment"]
    assert found["equal"]
