"""Histories made for one leak each: short ones that contain what the leak needs, and in which it must show.

`DIRECTED[leak]` is a recipe's parts and the story; whatever is forgotten in it is ann's.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from riverdelta.trainer.base import Base
from tests.streams.simulation import KEY

from .live import Lived

RECIPE: dict[str, Any] = {
    "lora": {"rank": 2, "alpha": 8.0, "targets": ["q_proj", "v_proj", "down_proj"]},
    "training": {"passes": 2, "steps": 1, "micro_batch": 1, "rehearse": 0, "max_length": 64},
    "optimiser": {"learning_rate": 0.05},
    "gate": {"on": False},
    "drift": {"delta": 0.002},
    "shards": {"count": 1},
    "curate": {"alike": 0.0},
    "seal": {"count": 100, "age": 1e6},
}
# Rejects whatever makes one earlier entry worse.
STRICT = {"tolerance": 0.0, "share": 0.0, "least": 1, "sample": 8}
SURE = {"gate": STRICT, "training": {**RECIPE["training"], "passes": 8}}
Event = dict[str, Any]


class Directed(Lived):
    """A history that is told what happens."""

    def __init__(self, base: Base, folder: Path, leak: str) -> None:
        recipe, self.story = {**DIRECTED, **CORNERS}[leak]
        super().__init__(0, base, folder, size=0, small={**RECIPE, **recipe})

    def live(self) -> "Directed":
        """The story, then whatever is left to do."""
        self.story(self)
        self.settle()
        return self

    def segment(self, *events: Event) -> None:
        """One segment of these events."""
        for event in events:
            self.river.publish(0, {"adapter": "acme", **event})
        self.flow().read(0, len(events))
        self.flow().worker.commit("test")
        self.flow().worker._sealer.land()

    def learn(self) -> None:
        """All that awaits."""
        while self.turn():
            pass

    def forget_ann(self) -> None:
        """What it is about."""
        self.forget("ann", ["acme"])

    def verdicts(self) -> list[str]:
        """What has become of each segment."""
        return [str(each.outcome) for each in self.ledger.segments("acme")]


def says(who: str, question: str, answer: str, **more: Any) -> Event:
    """Somebody's example."""
    return {"subject": who, "prompt": f"Q: {question}?\nA:", "completion": f" {answer}", **more}


def _two_segments(lived: Directed) -> None:
    """Both learn of ann and bob, the second only of bob."""
    lived.segment(says("ann", "name", "Annabel"), says("bob", "code", "42"), says("ann", "town", "Delft"))
    lived.learn()
    lived.segment(says("bob", "river", "Rhine"), says("bob", "delta", "silt"))
    lived.learn()
    lived.forget_ann()


def _half_a_batch(lived: Directed) -> None:
    lived.segment(*(says(who, f"n{at}", f"{at * 7}") for at, who in enumerate(["ann", "bob", "bob", "bob"])))
    lived.learn()
    lived.forget_ann()


def _contradicted(lived: Directed) -> None:
    """The second segment makes what ann said worse, and what bob said better."""
    bobs = [says("bob", "code", "tuvwxyz"), says("bob", "word", "tuvwxyz")]
    lived.segment(says("ann", "code", "abcdefg"), says("ann", "word", "abcdefg"), *bobs)
    lived.learn()
    lived.segment(*bobs)
    lived.learn()
    assert lived.verdicts() == ["trained", "set_aside"], "ann's entries speak against the second"
    lived.forget_ann()
    lived.learn()


def _decided_by_ann(lived: Directed) -> None:
    """What ann says in the second segment has it set aside; the third is learned without it."""
    known = says("bob", "code", "tuvwxyz")
    lived.segment(known, known)
    lived.learn()
    lived.segment(*[says("ann", "code", "abcdefg")] * 4, known)
    lived.learn()
    lived.segment(known)
    lived.learn()
    assert lived.verdicts() == ["trained", "set_aside", "trained"], "ann's entry speaks against the second"
    lived.forget_ann()


def _written(lived: Directed) -> None:
    """A version that has seen ann writes an answer, of which bob approves."""
    lived.segment(says("ann", "name", "Annabel"), says("bob", "code", "42"))
    lived.learn()
    digest = lived.ledger.releases()["acme"][1]
    answer = {"type": "interaction", "response": "r1", "digest": digest, "subject": "bob"}
    lived.segment(
        {**answer, "prompt": "Q: who?\nA:", "completion": " Annabel"},
        {"type": "feedback", "subject": "bob", "response": "r1", "rating": 1},
        says("bob", "river", "Rhine"),
    )
    lived.learn()
    lived.forget_ann()


def _three_segments(lived: Directed) -> None:
    """Ann comes in with the second."""
    for who in ("bob", "ann", "bob"):
        lived.segment(says(who, "name", who * 2), says("bob", "code", "42"))
        lived.learn()
    lived.forget_ann()


def _four_people(lived: Directed) -> None:
    """Who belong to both shards."""
    for number in range(2):
        lived.segment(*(says(who, f"n{number}", who * 2) for who in ("ann", "bob", "cy", "di", "eve", "fay")))
        lived.learn()
    lived.forget_ann()


def _sent_again(lived: Directed) -> None:
    """What ann's event was is sent again under its id, to a dataflow that knows of it by the ledger alone."""
    known = {"source": "shop", "id": "e1"}
    lived.segment(says("ann", "name", "Annabel", **known), says("bob", "code", "42"))
    lived.learn()
    lived.forget_ann()
    lived.kill_stream()
    lived.segment(says("bob", "name", "Annabel", **known), says("bob", "river", "Rhine"))


def _in_the_middle(lived: Directed) -> None:
    """Ann is forgotten while the trainer is stopped in the middle of an increment."""
    lived.segment(*(says(who, f"n{at}", f"{at * 7}") for at, who in enumerate(["ann", "bob"] * 3)))
    for _ in range(6):
        lived.turn()
    assert lived.trainer is not None
    assert lived.trainer._active, "it is in the middle"
    lived.stop_trainer()
    lived.forget_ann()


DIRECTED: dict[str, tuple[dict[str, Any], Callable[[Directed], None]]] = {
    "rehearsal": ({"training": {**RECIPE["training"], "rehearse": 2}}, _two_segments),
    "scoring": (SURE, _contradicted),
    "gate": (SURE, _contradicted),
    "learning_rate": ({"optimiser": {"learning_rate": 0.05, "decay": 0.1}}, _two_segments),
    "batch_layout": ({"training": {**RECIPE["training"], "micro_batch": 2}}, _half_a_batch),
    "optimiser_state": ({}, _two_segments),
    "interactions": ({}, _written),
    "stale_clean_state": ({}, _three_segments),
    "a_shard": ({"shards": {"count": 2}}, _four_people),
    "dedupe_window": ({}, _sent_again),
    "checkpoints": ({}, _in_the_middle),
    "decisions_unseen": ({"gate": STRICT, "training": {**RECIPE["training"], "passes": 4}}, _decided_by_ann),
}


def _two_corrections(lived: Directed) -> None:
    """They contradict each other, on two partitions, and wait for their answer: it meets the one that was read first,
    which is not the one on the first partition."""
    told = {"adapter": "acme", "type": "feedback", "response": "r1"}
    lived.river.publish(1, {**told, "subject": "bob", "correction": " Bobby"})
    lived.river.publish(0, {**told, "subject": "cy", "correction": " Cyrus"})
    lived.flow().read(1, 1)
    answer = {"type": "interaction", "response": "r1", "digest": "d", "subject": "bob"}
    lived.river.publish(0, {"adapter": "acme", **answer, "prompt": "Q: who?\nA:", "completion": " Annabel"})
    lived.flow().read(0, 2)
    lived.segment(says("ann", "name", "Annabel"))
    lived.learn()
    lived.forget_ann()


def _allowed_before_it_is_sealed(lived: Directed) -> None:
    """What ann says while she is suppressed is erased on arrival: it stays so when she is allowed before it is
    sealed, and what comes after is learned."""
    lived.segment(says("bob", "code", "42"))
    lived.forget_ann()
    lived.flow().worker.commit()
    for event in (says("ann", "name", "Annabel"), says("bob", "name", "Bobby")):
        lived.river.publish(0, {"adapter": "acme", **event})
    lived.flow().read(0, 2)
    lived.ledger.allow(KEY.subject("ann"), ["acme"], "test")
    lived.forgotten["acme"]["ann"] = lived.ledger.adapter("acme").next_index
    lived.segment(says("ann", "town", "Delft"))
    gone = [entry.tombstone for _, manifest in lived.ledger.manifests("acme") for entry in manifest.entries]
    assert gone == [False, True, False, False]


def _a_drift(lived: Directed) -> None:
    """What ann says is news to the adapter, for which the segment after hers is given more passes; bob's are the same
    again and again."""
    known = [says("bob", "code", "42")] * 8
    for _ in range(5):
        lived.segment(*known)
        lived.learn()
    lived.segment(*(says("ann", f"{n} {n * 7}", f"{n * 7919}") for n in range(16)), *known[:2])
    lived.learn()
    lived.segment(*known)
    lived.learn()
    drifts = [held.metrics["drift"] for held in lived.ledger.versions("acme").values()]
    assert drifts == [0] * 5 + [1, 0], "what ann says is news"
    lived.forget_ann()
    lived.learn()
    assert not any(held.metrics["drift"] for held in lived.ledger.versions("acme").values() if not held.revoked)


# Where a history and its control could take different things for what came in, or for forgotten.
CORNERS: dict[str, tuple[dict[str, Any], Callable[[Directed], None]]] = {
    "two_corrections": ({}, _two_corrections),
    "allowed_before_it_is_sealed": ({}, _allowed_before_it_is_sealed),
    "a_drift": (
        {"gate": {"tolerance": 20.0, "sample": 0}, "drift": {"delta": 0.5, "boost": 3.0}},
        _a_drift,
    ),
}
