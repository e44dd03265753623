"""Adapters trained side by side end with the bits that each gets alone, and one bad job harms no other."""

from pathlib import Path

import pytest
import torch

from riverdelta.core.recipe import Recipe
from riverdelta.registry.ledger import Cause
from riverdelta.trainer.base import Base
from riverdelta.trainer.packing import packs_exactly
from riverdelta.trainer.products import FrozenProduct
from riverdelta.trainer.replay import replay
from tests.trainer.samples import contents, fact, recipe
from tests.trainer.stack import Stack


def test_packed_through_the_stack_equals_alone(tmp_path: Path, base: Base) -> None:
    """Adapters of several ranks and sizes, two segments each, one of them with a forget in the middle."""
    stack = Stack(tmp_path)
    names = ["a", "b", "c", "d"]
    recipes = {
        name: Recipe.from_dict(
            {**recipe(micro_batch=n + 1, near=0.3 * (n % 2)).to_dict(), "lora": {"rank": 2 + n, "alpha": 4.0 + n}}
        )
        for n, name in enumerate(names)
    }
    logs: dict[str, list[list[bytes | None]]] = {name: [] for name in names}
    worker = stack.worker(base)
    for name in names:
        stack.create(name, recipes[name])
    for round_ in range(2):
        for number, name in enumerate(names):
            segment = [content for content in contents(3 + number, seed=10 * round_ + number) if content]
            logs[name].append([*segment[:1], None, *segment[2:]] if name == "b" else list(segment))
            stack.seal(name, segment, ["ann", "bob", *["cy"] * (len(segment) - 2)])
        for _ in range(3):
            worker.turn()
        if round_ == 0:
            assert len(worker._active) > 1
            stack.forget("b", "bob")
    while worker.turn():
        pass
    for name in names:
        head, versions = stack.ledger.adapter(name), stack.ledger.versions(name)
        wanted = replay(base, recipes[name], head.seed, logs[name])[-1]
        assert (versions[head.tip].digest, versions[head.tip].state) == (wanted.digest, wanted.state_digest)


def test_one_bad_job_is_put_aside_and_the_others_do_not_feel_it(tmp_path: Path, base: Base) -> None:
    stack = Stack(tmp_path)
    wild = Recipe.from_dict({**recipe().to_dict(), "optimiser": {"learning_rate": 1e30}})
    for name, like in (("bad", wild), ("good", recipe())):
        stack.create(name, like)
        stack.seal(name, [fact(1), fact(2)], ["ann", "bob"])
    worker = stack.worker(base)
    while worker.turn():
        pass
    assert stack.ledger.segment("bad", 1).cause is Cause.ERROR
    head = stack.ledger.adapter("good")
    alone = replay(base, recipe(), head.seed, [[fact(1), fact(2)]])[-1]
    assert stack.ledger.version("good", 1).digest == alone.digest


def test_the_self_test_passes_here(base: Base) -> None:
    assert packs_exactly(base)


def test_the_self_test_turns_packing_off_where_rows_feel_each_other(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    product = FrozenProduct.forward

    def felt(self: FrozenProduct, x: torch.Tensor) -> torch.Tensor:
        out = product(self, x)
        return out * (1 + 1e-6) if x.shape[0] > 64 else out

    monkeypatch.setattr(FrozenProduct, "forward", felt)
    assert not packs_exactly(base)
    stack = Stack(tmp_path)
    for name in ("a", "b"):
        stack.create(name, recipe())
        stack.seal(name, [fact(1), fact(2)], ["ann", "bob"])
    worker = stack.worker(base)
    while worker.turn():
        assert len(worker._active) <= 1
    assert stack.ledger.adapter("b").release == 1
