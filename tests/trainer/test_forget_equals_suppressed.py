"""The counterfactual: after a forget, weights and optimiser state are those of a log in which it came suppressed.

The live side is the ledger, its store and a worker, with forgets between seals, in the middle of increments and after
them. The control is not circular: a replay alone, from the raw events and the segments' boundaries, which admits no
event of a subject that was suppressed when it arrived or has been forgotten since.
"""

import random
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import msgspec
import pytest

from riverdelta.core.digests import seed_of
from riverdelta.core.errors import Conflict
from riverdelta.core.recipe import Recipe
from riverdelta.registry.ledger import Cause, Hand, Ledger, Manifest, Outcome
from riverdelta.trainer import gate
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
    hands: dict[int, Hand] = field(default_factory=dict)


def control(base: Base, like: Recipe, seed: int, raw: Raw) -> list[Replayed]:
    """Admit the raw events anew, with the forgotten suppressed from the start, and train alone, gates and all."""
    admitted = [
        None if index < raw.allowed_again.get(subject, 10**9) and subject in raw.forgotten else content
        for index, (subject, content) in enumerate(raw.events)
    ]
    cuts = [0, *raw.boundaries]
    hands = [raw.hands.get(number, Hand.NONE) for number in range(1, len(cuts))]
    return replay(base, like, seed, [admitted[a:b] for a, b in pairwise(cuts)], hands=hands)


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
        if draw.random() < 0.15:
            decide(stack, raw, draw.randrange(1, number + 2), draw.choice([Hand.ACCEPT, Hand.DISCARD]))
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


def decide(stack: Stack, raw: Raw, segment: int, hand: Hand) -> None:
    with suppress(Conflict):  # it has that word already
        stack.ledger.decide_by_hand("acme", segment, hand, "test")
        raw.hands[segment] = hand


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
    return line[::-1] == [(made.digest, made.state_digest) for made in wanted if not made.set_aside]


@pytest.mark.parametrize("seed", range(20))
def test_forget_equals_suppressed(tmp_path: Path, base: Base, seed: int) -> None:
    draw = random.Random(seed)
    like = recipe(micro_batch=draw.randrange(1, 5))
    stack = Stack(tmp_path)
    raw = live(stack, base, like, draw)
    assert same(stack, base, like, raw)


def strict(sample: int = 4, **gate: float) -> Recipe:
    """A recipe whose gate turns down whatever spoils one of a few earlier entries, or a question, in the least."""
    held = {"tolerance": 0.0, "share": 0.0, "least": 1, "sample": sample, **gate}
    held["questions"] = [{"prompt": "hi", "completion": " wo rd"}]
    steep = {"learning_rate": 0.05, "clip": 0.0}
    return Recipe.from_dict({**recipe(micro_batch=2, rehearse=1).to_dict(), "optimiser": steep, "gate": held})


def test_histories_with_gates_that_reject(tmp_path: Path, base: Base) -> None:
    turned_down = 0
    for seed in range(100, 108):
        draw = random.Random(seed)
        like = strict(sample=draw.randrange(1, 5), share=draw.choice([0.0, 0.3, 0.5]))
        stack = Stack(tmp_path / str(seed))
        raw = live(stack, base, like, draw)
        assert same(stack, base, like, raw)
        segments = stack.ledger.segments("acme")
        turned_down += sum(each.cause is Cause.GATE and not each.hand for each in segments)
    assert turned_down >= 5


def test_a_leak_through_the_gate_is_caught(tmp_path: Path, base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    """Learned from nothing that is forgotten, and yet influenced: a gate that is not asked again after a forget."""
    like = strict(sample=8)
    for seed in range(30):  # a history in which the forgotten entry alone decides whether a segment is learned
        texts = [fact(1000 * seed + n) for n in range(5)]
        admitted = [[texts[0], texts[1]], [texts[2], None], [texts[4]]]
        known = [[texts[0], texts[1]], [texts[2], texts[3]], [texts[4]]]
        seeded = seed_of("adapter", "acme", 0)
        outcomes = [[bool(made.set_aside) for made in replay(base, like, seeded, log)] for log in (known, admitted)]
        if outcomes[0] != outcomes[1]:
            break
    else:
        raise AssertionError("no history in which the forgotten entry decides")
    raw = Raw(events=list(zip(["bob", "bob", "bob", "ann", "bob"], texts, strict=True)), boundaries=[2, 4, 5])
    for folder, leaks in (("sound", False), ("leaky", True)):
        stack = Stack(tmp_path / folder)
        stack.create("acme", like)
        stack.seal("acme", texts[:2], ["bob", "bob"])
        stack.seal("acme", texts[2:4], ["bob", "ann"])
        stack.seal("acme", texts[4:], ["bob"])
        settle(stack, base)
        was = {each.number: each.cause is Cause.GATE for each in stack.ledger.segments("acme")}
        forget(stack, raw, "ann")
        with monkeypatch.context() as patch:
            if leaks:
                again = [n for n in was if stack.ledger.segment("acme", n).outcome is Outcome.AWAITING]
                told = iter(["As before." if was[number] else "" for number in again])
                patch.setattr(gate, "verdict", lambda *_, told=told: next(told))
            settle(stack, base)
        assert same(stack, base, like, raw) is not leaks


def settle(stack: Stack, base: Base) -> None:
    worker = stack.worker(base, "t0")
    while worker.turn():
        pass
    worker.close()


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
        return msgspec.structs.replace(held, entries=(first, *held.entries[1:]))

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
