"""A restored ledger comes to numbers and epochs that it has had: what was kept under them is of another past."""

import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from riverdelta.trainer.base import Base
from tests.trainer.samples import example, recipe
from tests.trainer.stack import Stack

DATABASES = ("ledger.db", "keys/keys.db")
SAID = [example(text=f"{who} likes what begins with {who}") for who in ("ann", "cy", "bob")]


def seal(stack: Stack) -> None:
    stack.seal("acme", SAID, ["ann", "cy", "bob"])


def begun(folder: Path, base: Base) -> Stack:
    """A version, and a backup of the databases beside them."""
    stack = Stack(folder)
    stack.create("acme", recipe(passes=4, steps=12))
    stack.seal("acme", [example(text="first of all")], ["di"])
    settle(stack, base)
    return stack


def settle(stack: Stack, base: Base, turns: int = 1000) -> None:
    trainer = stack.worker(base)
    for _ in range(turns):
        if not trainer.turn():
            break
    trainer.close()


def back_up(stack: Stack) -> None:
    for name in DATABASES:
        held, copy = sqlite3.connect(stack.folder / name), sqlite3.connect(stack.folder / f"{name}.bak")
        held.backup(copy)
        held.close()
        copy.close()


def restored(stack: Stack) -> Stack:
    stack.ledger.close()
    stack.keys.close()
    for name in DATABASES:
        for path in (stack.folder / name).parent.glob(f"{Path(name).name}*"):
            if path.suffix != ".bak":
                path.unlink()
        shutil.copy(stack.folder / f"{name}.bak", stack.folder / name)
    return Stack(stack.folder)


def forget(*subjects: str) -> Callable[[Stack], None]:
    def act(stack: Stack) -> None:
        for subject in subjects:
            stack.forget("acme", subject)

    return act


def allow_and_seal(stack: Stack) -> None:
    stack.allow("acme", "cy")
    seal(stack)


CASES = {
    "another is forgotten": (seal, forget("ann"), forget("cy")),
    "in another order": (seal, forget("ann", "cy"), forget("cy", "bob")),
    "sealed again without": (forget("cy"), allow_and_seal, seal),
}


@pytest.mark.parametrize("case", CASES)
def test_no_step_of_other_tombstones_is_resumed(tmp_path: Path, base: Base, case: str) -> None:
    before, lost, repeated = CASES[case]
    stack = begun(tmp_path / "with", base)
    before(stack)
    settle(stack, base)
    back_up(stack)
    lost(stack)
    settle(stack, base, turns=6)  # to the middle of an increment, whose checkpoint stays
    assert list(stack.store.keys("checkpoints/"))
    digests = []
    for kept in (True, False):
        stack = restored(stack)
        if not kept:
            shutil.rmtree(stack.folder / "trainer")
            for key in list(stack.store.keys("checkpoints/")):
                stack.store.delete(key)
        repeated(stack)
        settle(stack, base)
        digests.append(stack.ledger.version("acme", stack.ledger.adapter("acme").release).digest)
    assert digests[0] == digests[1]


def test_a_trainer_that_comes_back_resumes_its_own(tmp_path: Path, base: Base) -> None:
    stack = begun(tmp_path, base)
    seal(stack)
    stack.forget("acme", "ann")
    settle(stack, base, turns=6)
    trainer = stack.worker(base)
    trainer.turn()
    (active,) = trainer._active.values()
    assert active.learners[0].place > 1
    trainer.close()
