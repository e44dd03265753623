"""Told: what an adapter's journal says that its head is, whatever its row says."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from .ledger import AdapterRecord, Fact


@dataclass
class _Told:
    """What the facts so far come to. `tip` is None where they do not say: what a forget or a person's word goes back
    to depends on more than the facts. `left` is the tip that a rollback left, and `aside` whether one holds."""

    epoch: int = 0
    next_index: int = 0
    next_segment: int = 1
    next_version: int = 1
    release: int = 0
    tip: int | None = 0
    held: bool = False
    aside: bool = False
    left: int | None = None

    def hear(self, fact: Fact) -> None:
        """Go on to the next fact."""
        body = fact.body
        if fact.kind == "sealed":
            self.next_index, self.next_segment = body["first"] + body["count"], body["segment"] + 1
        elif fact.kind in ("increment", "imported"):
            self.tip, self.next_version = body["version"], body["version"] + 1
        elif fact.kind == "rollback":
            if not self.held:
                self.left, self.aside = self.tip, True
            self.tip, self.held = body["to"], True
        elif fact.kind == "resume":
            self.tip, self.held, self.aside = body["to"], False, False
        elif fact.kind == "forget":
            self.epoch, self.held = body["epoch"], self.held or "retired" in body
            self.tip = body["to"] if self.held else self.tip if not body["segments"] and not body["revoked"] else None
        elif fact.kind == "by_hand":
            self.tip = None
        self.release = body.get("to", self.release)


def check_head(head: AdapterRecord, facts: Iterable[Fact]) -> list[str]:
    """What a head has otherwise than its journal says."""
    told, made = _Told(), dict[str, Any]()
    for fact in facts:
        told.hear(fact)
        if fact.kind == "created":
            made = fact.body
    expected: dict[str, Any] = {
        "release": told.release,
        "epoch": told.epoch,
        "next_index": told.next_index,
        "next_segment": told.next_segment,
        "next_version": told.next_version,
        "held": told.release if told.held else None,
        **{name: made.get(name) for name in ("recipe", "recipe_digest", "seed")},
    }
    if told.tip is not None:
        expected["tip"] = told.tip
    if not told.aside:
        expected["held_tip"] = None
    elif told.left is not None:
        expected["held_tip"] = told.left
    return [
        f"The {name.replace('_', ' ')} is {held}; the journal says {said}."
        for name, said in expected.items()
        if (held := getattr(head, name)) != said
    ]
