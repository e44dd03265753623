"""The gate: a candidate beside its parent on the new segment, on earlier entries and on an operator's questions.

The segment is scored with the parent before it is learned: its prequential loss (Dawid 1984). Everything here is a
function of the log, so a replay comes to the same verdicts.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import msgspec

from riverdelta.core.digests import seed_of
from riverdelta.core.recipe import Recipe
from riverdelta.registry.ledger import Hand

from .adapter import AdapterWeights
from .base import Base
from .increment import Learner, row_of
from .layout import Row, spread
from .scoring import score
from .verdict import Compared, Evidence, verdict

BY_HAND = "Discarded by hand."


@dataclass(frozen=True)
class Judged:
    """A verdict, empty when the candidate is accepted, and the figures that it rests on."""

    rejected: str
    metrics: dict[str, Any]


class Gate:
    """Made before the first step of an increment, with the parent's losses; asked when the last step is done."""

    def __init__(
        self, base: Base, recipe: Recipe, seed: int, learner: Learner, earlier: Sequence[bytes | None], hand: Hand
    ) -> None:
        """`learner` has taken no step yet. Of `earlier`, only the sample is looked at."""
        self._base, self._recipe, self._learner, self._hand = base, recipe.gate, learner, hand
        longest = recipe.training.max_length
        start = seed_of(seed, "gate", learner.optimiser.position)
        sample = [earlier[slot] for slot in spread(len(earlier), recipe.gate.sample, start)]
        questions = [json.dumps(msgspec.structs.asdict(each)).encode() for each in recipe.gate.questions]
        self._rows = (
            [row for row in learner.rows if row is not None],
            [row for entry in sample if (row := row_of(base.tokenizer, entry, longest)) is not None],
            [row for each in questions if (row := row_of(base.tokenizer, each, longest)) is not None],
        )
        self._before = self._scores(learner.weights)

    def judge(self) -> Judged:
        """The verdict about what the learner has come to; a person's word stands above it."""
        after = self._scores(self._learner.weights)
        evidence = Evidence(*(Compared(was, now) for was, now in zip(self._before, after, strict=True)))
        reason = verdict(self._recipe, evidence)
        metrics = {**evidence.metrics, "rejected": int(bool(reason))}
        if self._hand is Hand.ACCEPT:
            reason = ""
        return Judged(reason, metrics)

    def _scores(self, weights: AdapterWeights) -> list[tuple[float, ...]]:
        ends = [0]
        rows: list[Row] = []
        for some in self._rows:
            rows += some
            ends.append(len(rows))
        scores = score(self._base, weights, rows)
        return [tuple(scores[first:last]) for first, last in pairwise(ends)]
