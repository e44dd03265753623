"""The gate: a candidate beside its parent on the new segment, on earlier entries and on an operator's questions.

The segment is scored with the parent before it is learned: its prequential loss (Dawid 1984). Everything here is a
function of the log, so a replay comes to the same verdicts.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import msgspec

from riverdelta.core.digests import seed_of
from riverdelta.registry.ledger import Hand

from .adapter import AdapterWeights
from .base import Base
from .drift import Usual, drifted
from .increment import Inputs, row_of
from .layout import Row, spread
from .scoring import Score, score
from .verdict import Compared, Evidence, says_one_thing, verdict

BY_HAND = "Discarded by hand."


@dataclass(frozen=True)
class Judged:
    """A verdict, empty when the candidate is accepted, the figures that are kept of it, and all that it rests on."""

    rejected: str
    metrics: dict[str, Any]
    evidence: Evidence | None = None


def usual_of(metrics: Iterable[Mapping[str, Any]]) -> list[Usual]:
    """What the segments of versions were, given the versions' metrics."""
    return [
        Usual(float(held["surprise_upper"]), tuple(held.get("new", ())), bool(held.get("drift")))
        for held in metrics
        if "surprise_upper" in held
    ]


class Judgeable(Protocol):
    """What a gate looks at: a segment's rows, and the weights that change between its making and its verdict. The
    sample is drawn by `position`."""

    @property
    def rows(self) -> Sequence[Row | None]: ...
    @property
    def weights(self) -> AdapterWeights | None: ...
    @property
    def position(self) -> int: ...


class Gate:
    """Made before the first step of an increment, with the parent's losses; asked when the last step is done."""

    def __init__(self, base: Base, inputs: Inputs, learner: Judgeable) -> None:
        """`learner` has taken no step yet. Of the earlier entries, only the sample is looked at."""
        recipe, seed, earlier = inputs.recipe, inputs.seed, inputs.earlier
        self._base, self._recipe, self._learner, self._hand = base, recipe.gate, learner, inputs.hand
        self._drift = recipe.drift
        longest = recipe.training.max_length
        start = seed_of(seed, "gate", learner.position)
        sample = [earlier[slot] for slot in spread(len(earlier), recipe.gate.sample, start)]
        questions = [json.dumps(msgspec.structs.asdict(each)).encode() for each in recipe.gate.questions]
        self.rows = (
            [row for row in learner.rows if row is not None],
            [row for entry in sample if (row := row_of(base.tokenizer, entry, longest)) is not None],
            [row for each in questions if (row := row_of(base.tokenizer, each, longest)) is not None],
        )
        self._usual = tuple(inputs.usual)
        self._before = self._scores(learner.weights)

    def judge(self) -> Judged:
        """The verdict about what the learner has come to; a person's word stands above it."""
        after = self._scores(self._learner.weights)
        segment, earlier, questions = (
            Compared(tuple(each.loss for each in was), tuple(each.loss for each in now))
            for was, now in zip(self._before, after, strict=True)
        )
        rows = self.rows[0]
        surprises = tuple(each.surprise for each in self._before[0])
        repetitive = sum(says_one_thing(row.answer) for row in rows) / len(rows) if rows else 0.0
        evidence = Evidence(
            segment, surprises, repetitive, tuple(each.surprise for each in self._usual), earlier, questions
        )
        reason = verdict(self._recipe, evidence)
        metrics: dict[str, Any] = {**evidence.metrics(self._recipe), "rejected": int(bool(reason))}
        if rows:
            metrics["new"] = [round(loss, 6) for loss in segment.before]
            metrics["drift"] = int(drifted(self._drift, self._usual, metrics["new"]))
        if self._hand is Hand.ACCEPT:
            reason = ""
        return Judged(reason, metrics, evidence)

    def _scores(self, weights: AdapterWeights | None) -> list[list[Score]]:
        ends = [0]
        rows: list[Row] = []
        for some in self.rows:
            rows += some
            ends.append(len(rows))
        scores = score(self._base, weights, rows)
        return [scores[first:last] for first, last in pairwise(ends)]


@dataclass
class Whole:
    """All shards' parts as one adapter, before a gate."""

    rows: Sequence[Row | None]
    weights: AdapterWeights | None
    position: int


def judge_whole(base: Base, inputs: Inputs, weights: bytes) -> Judged:
    """The verdict on all parts together, which are `weights`; the parent is the last whole that was released, or the
    base."""
    rows = [row_of(base.tokenizer, entry, inputs.recipe.training.max_length) for entry in inputs.entries]
    before = AdapterWeights.load(inputs.weights, base.device) if inputs.weights is not None else None
    whole = Whole(rows, before, len(inputs.earlier))
    gate = Gate(base, inputs, whole)
    whole.weights = AdapterWeights.load(weights, base.device)
    return gate.judge()
