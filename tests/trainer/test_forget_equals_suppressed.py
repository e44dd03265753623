"""The counterfactual: after a forget, weights and optimiser state are those of a log in which it came suppressed.

The live side is the ledger, its store and a worker, with forgets between seals, in the middle of increments and after
them. The control is not circular: a replay alone, from the raw events and the segments' boundaries, which admits no
event of a subject that was suppressed when it arrived or has been forgotten since.
"""

import random
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import msgspec
import pytest

from riverdelta.core.recipe import Recipe
from riverdelta.registry.ledger import Ledger, Manifest
from riverdelta.trainer.base import Base
from riverdelta.trainer.replay import Replayed, replay
from tests.trainer.samples import contents, fact, recipe
from tests.trainer.stack import Stack

SUBJECTS = ["ann", "bob", "cy", "di"]


@dataclass
class Raw:
    """What a client published, in order, and where segments were cut: all that the control may know."""

    events: list[tuple[str, bytes]] = field(default_factory=list)
    boundaries: list[int] = field(default_factory=list)
    forgotten: dict[str, int] = field(default_factory=dict)
    allowed_again: dict[str, int] = field(default_factory=dict)


def control(base: Base, like: Recipe, seed: int, raw: Raw) -> list[Replayed]:
    """Admit the raw events anew, with the forgotten suppressed from the start, and train alone."""
    admitted = [
        None if index < raw.allowed_again.get(subject, 10**9) and subject in raw.forgotten else content
        for index, (subject, content) in enumerate(raw.events)
    ]
    cuts = [0, *raw.boundaries]
    return replay(base, like, seed, [admitted[a:b] for a, b in pairwise(cuts)])


def live(stack: Stack, base: Base, like: Recipe, draw: random.Random) -> Raw:
    """A random history: seals, steps of the trainer, forgets and allows at any moment, trainers lost and replaced."""
    raw = Raw()
    stack.create("acme", like)
    worker = stack.worker(base, "t0")
    for number in range(draw.randrange(3, 6)):
        size = draw.randrange(1, 7)
        subjects = [draw.choice(SUBJECTS) for _ in range(size)]
        made = [content for content in contents(size, seed=draw.randrange(10**6)) if content is not None]
        raw.events += zip(subjects, made, strict=True)
        raw.boundaries.append(len(raw.events))
        stack.seal("acme", made, subjects)
        for _ in range(draw.randrange(0, 9)):
            worker.turn()
        if draw.random() < 0.3:
            worker.close()
            worker = stack.worker(base, f"t{number + 1}")
        if draw.random() < 0.45:
            forget(stack, raw, draw.choice(SUBJECTS))
        if raw.forgotten and draw.random() < 0.2:
            allow(stack, raw, draw.choice(sorted(raw.forgotten)))
    if not raw.forgotten:
        forget(stack, raw, raw.events[0][0])
    while worker.turn():
        pass
    worker.close()
    return raw


def forget(stack: Stack, raw: Raw, subject: str) -> None:
    stack.forget("acme", subject)
    raw.forgotten[subject] = len(raw.events)
    raw.allowed_again.pop(subject, None)


def allow(stack: Stack, raw: Raw, subject: str) -> None:
    if stack.allow("acme", subject):
        raw.allowed_again[subject] = len(raw.events)


def same(stack: Stack, base: Base, like: Recipe, raw: Raw) -> bool:
    """Whether every version of the live lineage has the control's weights and state."""
    head = stack.ledger.adapter("acme")
    versions = stack.ledger.versions("acme")
    wanted = control(base, like, head.seed, raw)
    line = []
    at = head.tip
    while at:
        line.append((versions[at].digest, versions[at].state))
        at = versions[at].parent
    return line[::-1] == [(made.digest, made.state_digest) for made in wanted]


@pytest.mark.parametrize("seed", range(20))
def test_forget_equals_suppressed(tmp_path: Path, base: Base, seed: int) -> None:
    draw = random.Random(seed)
    like = recipe(micro_batch=draw.randrange(1, 5))
    stack = Stack(tmp_path)
    raw = live(stack, base, like, draw)
    assert same(stack, base, like, raw)


def test_a_leaked_tombstone_is_caught(tmp_path: Path, base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same check fails when one tombstone's content still reaches the trainer."""
    stack = Stack(tmp_path)
    raw = Raw(events=[(subject, fact(number)) for number, subject in enumerate(["ann", "ann", "bob", "bob"])])
    raw.boundaries = [4]
    stack.create("acme", recipe())
    stack.seal("acme", [content for _, content in raw.events], [subject for subject, _ in raw.events])
    forget(stack, raw, "ann")
    manifest = Ledger.manifest

    def leaky(self: Ledger, adapter: str, number: int, *args: int) -> Manifest:
        held = manifest(self, adapter, number, *args)
        first = msgspec.structs.replace(held.entries[0], tombstone=False)
        return Manifest(held.incarnations, (first, *held.entries[1:]))

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "manifest", leaky)
        worker = stack.worker(base, "t0")
        while worker.turn():
            pass
    assert stack.ledger.adapter("acme").release == 1
    assert not same(stack, base, recipe(), raw)


def test_what_a_tombstone_held_cannot_be_told_from_the_outcome(base: Base) -> None:
    """Whatever stood in the slot: a long row, a short one, or nothing that could be learned."""
    segment = contents(5, seed=9)
    ends = {replay(base, recipe(), 3, [[*segment[:2], None, *segment[3:]]])[0] for _ in range(2)}
    assert len(ends) == 1
    alone = replay(base, recipe(), 3, [[None] * 5, segment])
    assert alone[0].losses == ()
    assert alone[1].digest != replay(base, recipe(), 3, [segment])[0].digest


def test_the_learning_rate_position_advances_over_tombstones(base: Base) -> None:
    like = recipe(micro_batch=1, passes=1)
    like = Recipe.from_dict({**like.to_dict(), "optimiser": {"decay": 0.5}})
    late = replay(base, like, 3, [[None, None, None], contents(1)])[-1]
    early = replay(base, like, 3, [contents(1)])[-1]
    assert late.digest != early.digest
