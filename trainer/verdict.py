"""The gate's verdict: what was measured of parent and candidate in, a reason to reject or none out. No I/O, no clock.

Every number is a mean loss of one row in nats a token, so that a figure means the same for every base and length.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median, quantiles

from riverdelta.core.recipe import Gate

# So many accepted segments of the lineage say what is usual, and fewer than so many say nothing.
_RECENT, _FEWEST = 16, 4


@dataclass(frozen=True)
class Compared:
    """The losses of the same rows with the parent and with the candidate."""

    before: tuple[float, ...] = ()
    after: tuple[float, ...] = ()

    def worse(self, by: float) -> float:
        """The share of rows that the candidate does worse on by more than `by`."""
        pairs = list(zip(self.before, self.after, strict=True))
        return sum(after > before + by for before, after in pairs) / len(pairs) if pairs else 0.0


@dataclass(frozen=True)
class Evidence:
    """What a candidate is judged by: the new segment, a sample of earlier entries, the operator's questions.

    `surprises` are the parent's at the segment's rows, and `usual` where the upper quarter of them began in accepted
    segments of the lineage, in order. `repetitive` is the share of rows whose answer says one thing over and over.
    """

    segment: Compared
    surprises: tuple[float, ...] = ()
    repetitive: float = 0.0
    usual: tuple[float, ...] = ()
    earlier: Compared = Compared()
    questions: Compared = Compared()

    def metrics(self, gate: Gate) -> dict[str, float]:
        """The figures that are kept of it; `prequential` is the segment's loss before it was learned."""
        means = {
            "prequential": self.segment.before,
            "learned": self.segment.after,
            "earlier_before": self.earlier.before,
            "earlier_after": self.earlier.after,
            "questions_before": self.questions.before,
            "questions_after": self.questions.after,
        }
        held = {name: fmean(losses) for name, losses in means.items() if losses}
        if self.surprises:
            upper = _upper_quarter(self.surprises)
            held |= {"surprise": median(self.surprises), "surprise_upper": upper, "repetitive": self.repetitive}
        if self.bound is not None:
            held["surprise_bound"] = self.bound + gate.tolerance
        if self.earlier.before:
            held["earlier_worse"] = self.earlier.worse(gate.tolerance)
        return {name: round(value, 6) for name, value in held.items()}

    @property
    def bound(self) -> float | None:
        """What the lineage lets expect of a segment's median surprise at most, before any tolerance: where the upper
        quarter begins in its segments, be all of this one like the most surprising of those. None while too few tell.
        Robust against a few that were not usual."""
        recent = self.usual[-_RECENT:]
        return median(recent) if len(recent) >= _FEWEST else None


def _upper_quarter(values: Sequence[float]) -> float:
    return quantiles(values, n=4, method="inclusive")[2] if len(values) > 1 else values[0]


def says_one_thing(answer: Sequence[int]) -> bool:
    """Whether an answer's tokens repeat one phrase: at most a third of their triples differ.

    >>> says_one_thing([7, 8] * 6), says_one_thing([1, 2, 3, 4, 5, 6, 7, 8])
    (True, False)
    """
    triples = list(zip(answer, answer[1:], answer[2:], strict=False))
    return len(triples) >= 4 and len(set(triples)) * 3 <= len(triples)


def verdict(gate: Gate, evidence: Evidence) -> str:
    """Why the candidate is rejected; empty where it is accepted."""
    segment, earlier, questions = evidence.segment, evidence.earlier, evidence.questions
    if len(segment.before) >= gate.least:
        if evidence.repetitive > gate.share:
            return "Most of its answers say one thing over and over."
        if evidence.bound is not None and median(evidence.surprises) > evidence.bound + gate.tolerance:
            return "Most of it contradicts what the parent is sure of, far more than its segments do."
    if segment.before and fmean(segment.after) > fmean(segment.before) + gate.tolerance:
        return "The candidate does worse on the very segment that it learned."
    if len(earlier.before) >= gate.least and earlier.worse(gate.tolerance) > gate.share:
        return "The candidate does worse on most of what was learned earlier."
    if questions.before and median(questions.after) > median(questions.before) + gate.tolerance:
        return "The candidate does worse on the operator's questions."
    return ""
