"""What people had said of a segment when a version learned or rejected it, whatever they have said since."""

import random
from pathlib import Path

import pytest

from riverdelta.core.errors import Conflict, NotFound, Refused
from riverdelta.core.recipe import Recipe
from riverdelta.core.settings import Settings
from riverdelta.registry.ledger import Cause, Hand, Increment, Line
from riverdelta.registry.ledger.decisions import words
from tests.registry.stack import Stack

Said = dict[int, Hand]


class Trainer:
    """Decides at random what people have not, and remembers under which words it did."""

    def __init__(self, stack: Stack, draw: random.Random) -> None:
        self.stack, self.draw = stack, draw
        self.learned: dict[int, Said] = {}
        self.rejected: dict[int, Said] = {}

    def step(self) -> None:
        ledger, work = self.stack.ledger, self.stack.ledger.work("acme")
        if work is None:
            return
        hand, number, parent = work.segment.hand, work.segment.number, work.adapter.tip
        if hand is Hand.DISCARD or (hand is Hand.NONE and self.draw.random() < 0.4):
            ledger.set_aside("acme", number, work.adapter.epoch, parent, Cause.GATE, "", "trainer")
            self.rejected.setdefault(parent, {})[number] = hand
            return
        digest = f"{work.adapter.next_version:064x}"
        made = Increment("acme", number, work.adapter.epoch, parent, digest, "", (), {})
        version = ledger.commit(made, "trainer")
        known = self.learned.get(parent, {})
        fresh = {s: self.rejected[parent][s] for s in version.saw if s != number and s not in known}
        self.learned[version.number] = {**known, **fresh, number: hand}


def act(stack: Stack, draw: random.Random, number: int) -> None:
    """Something that an operator or the dataflow does."""
    ledger, head = stack.ledger, stack.ledger.adapter("acme")
    segment = draw.randrange(1, head.next_segment + 1)
    what = draw.randrange(7)
    if what < 2:
        stack.seal("acme", [(draw.choice(("ann", "bob", "cy")), f"canary-{number}")])
    elif what < 4:
        ledger.decide_by_hand("acme", segment, draw.choice((Hand.ACCEPT, Hand.DISCARD)), "op")
    elif what == 4:
        ledger.rollback("acme", draw.randrange(head.next_version), "op")
    elif what == 5:
        ledger.resume("acme", draw.choice(("continue", "replay", "tip")), "op")
    elif draw.random() < 0.3:
        ledger.forget(f"r{number}", stack.key.subject(draw.choice(("ann", "bob"))), ["acme"], "op")


@pytest.mark.parametrize("seed", range(12))
def test_words_are_those_of_the_time(tmp_path: Path, seed: int) -> None:
    draw, stack = random.Random(seed), Stack(Settings(data=tmp_path / "data"))
    stack.ledger.create("acme", Recipe(), "test")
    trainer = Trainer(stack, draw)
    for number in range(60):
        try:
            act(stack, draw, number)
        except (Conflict, NotFound, Refused):
            continue
        for _ in range(draw.randrange(4)):
            trainer.step()
    versions, facts = stack.ledger.versions("acme"), stack.ledger.facts("acme")
    assert trainer.learned.keys() == versions.keys()
    for number, said in trainer.learned.items():
        assert words(facts, versions, number) == said
        assert said.keys() == Line.of(versions, number).segments
