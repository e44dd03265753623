"""The gate's verdict: what was measured of parent and candidate in, a reason to reject or none out. No I/O, no clock.

Every number is a mean loss of one row in nats a token, so that a figure means the same for every base and length.
"""

from dataclasses import dataclass
from statistics import fmean, median

from riverdelta.core.recipe import Gate


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
    """What a candidate is judged by: the new segment, a sample of earlier entries, the operator's questions."""

    segment: Compared
    earlier: Compared = Compared()
    questions: Compared = Compared()

    @property
    def metrics(self) -> dict[str, float]:
        """The figures that are kept of it; `prequential` is the segment's loss before it was learned."""
        means = {
            "prequential": self.segment.before,
            "learned": self.segment.after,
            "earlier_before": self.earlier.before,
            "earlier_after": self.earlier.after,
            "questions_before": self.questions.before,
            "questions_after": self.questions.after,
        }
        return {name: round(fmean(losses), 6) for name, losses in means.items() if losses}


def verdict(gate: Gate, evidence: Evidence) -> str:
    """Why the candidate is rejected; empty where it is accepted."""
    segment, earlier, questions = evidence.segment, evidence.earlier, evidence.questions
    if segment.before and fmean(segment.after) > fmean(segment.before) + gate.tolerance:
        return "The candidate does worse on the very segment that it learned."
    if len(earlier.before) >= gate.least and earlier.worse(gate.tolerance) > gate.share:
        return "The candidate does worse on most of what was learned earlier."
    if questions.before and median(questions.after) > median(questions.before) + gate.tolerance:
        return "The candidate does worse on the operator's questions."
    return ""
