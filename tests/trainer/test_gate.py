"""The gate: scores, verdicts, and what the worker does with them."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from riverdelta.core.recipe import Gate as Rules
from riverdelta.core.recipe import Recipe
from riverdelta.registry.ledger import Cause, Hand, Line, Outcome
from riverdelta.trainer import gate
from riverdelta.trainer.adapter import AdapterWeights
from riverdelta.trainer.base import Base
from riverdelta.trainer.increment import Inputs, Learner, row_of, step
from riverdelta.trainer.scoring import score
from riverdelta.trainer.verdict import Compared, Evidence, verdict
from riverdelta.trainer.worker import Worker
from tests.trainer.samples import contents, fact, recipe
from tests.trainer.stack import Stack

losses = st.lists(st.floats(0, 20), min_size=8, max_size=40)


# -- scores ----------------------------------------------------------------------------------------------------


def test_a_score_is_the_loss_that_training_would_see(base: Base) -> None:
    learner = Learner(base, Inputs(recipe(micro_batch=1, passes=1), 3, [fact(1)]))
    (row,) = [row for row in learner.rows if row is not None]
    before = score(base, learner.weights, [row])
    assert before == score(base, None, [row])  # B begins as zeros
    step(base, [learner])
    assert learner.losses == pytest.approx([before[0].loss], rel=1e-5)


def test_a_score_belongs_to_its_row_and_to_its_weights(base: Base) -> None:
    rows = [row for entry in contents(12, 4) if (row := row_of(base.tokenizer, entry, 64)) is not None]
    weights = AdapterWeights.begin(base.shape(recipe().lora), 1, base.device)
    together = score(base, weights, rows)
    assert together == score(base, weights, rows)
    for row, scored in zip(rows, together, strict=True):
        assert score(base, weights, [row])[0] == pytest.approx(scored, rel=1e-4)
    assert len(set(together)) > 6


# -- verdicts --------------------------------------------------------------------------------------------------


@given(losses, st.floats(0, 5))
def test_what_spoils_nothing_is_accepted(before: list[float], better: float) -> None:
    same = Compared(tuple(before), tuple(max(0.0, loss - better) for loss in before))
    assert verdict(Rules(), Evidence(same, earlier=same, questions=same)) == ""


@given(losses, st.integers(0, 10**6))
def test_some_updated_facts_are_accepted_and_most_spoiled_are_not(before: list[float], pick: int) -> None:
    learned = Compared((3.0,) * 8, (0.1,) * 8)
    for spoiled, accepted in ((len(before) // 2, True), (len(before) // 2 + 1, False)):
        after = [loss + (6.0 if place < spoiled else 0.0) for place, loss in enumerate(before)]
        turn = pick % len(before)
        turned = Compared(tuple(before[turn:] + before[:turn]), tuple(after[turn:] + after[:turn]))
        assert (verdict(Rules(), Evidence(learned, earlier=turned)) == "") is accepted


def test_few_earlier_entries_tell_nothing() -> None:
    spoiled = Compared((0.1,) * 7, (9.0,) * 7)
    assert verdict(Rules(), Evidence(Compared((3.0,), (0.1,)), earlier=spoiled)) == ""


def test_questions_and_the_segment_itself_may_not_get_worse() -> None:
    good, bad = Compared((3.0,), (0.1,)), Compared((0.1,), (3.0,))
    assert "questions" in verdict(Rules(), Evidence(good, questions=bad))
    assert "segment" in verdict(Rules(), Evidence(bad))


def test_a_segment_that_contradicts_is_told_from_one_that_is_new() -> None:
    learned = Compared((3.0,) * 12, (0.1,) * 12)
    usual = (0.1, 0.0, 0.3, 0.2, 0.1)
    some = (0.1,) * 7 + (6.0,) * 5  # some facts have changed
    assert verdict(Rules(), Evidence(learned, some, usual=usual)) == ""
    assert "contradicts" in verdict(Rules(), Evidence(learned, (6.0,) * 7 + (0.1,) * 5, usual=usual))
    assert verdict(Rules(), Evidence(learned, (6.0,) * 12, usual=usual[:3])) == ""  # who has learned little cannot tell
    assert verdict(Rules(), Evidence(learned, (6.0,) * 12, usual=(6.0, 5.5, 6.2, 5.8))) == ""  # such is the stream


def test_one_word_over_and_over_is_rejected() -> None:
    learned = Compared((3.0,) * 12, (0.1,) * 12)
    assert "over and over" in verdict(Rules(), Evidence(learned, (0.0,) * 12, repetitive=0.6))
    assert verdict(Rules(), Evidence(learned, (0.0,) * 12, repetitive=0.4)) == ""


# -- the worker ------------------------------------------------------------------------------------------------


@pytest.fixture
def stack(tmp_path: Path) -> Stack:
    held = Stack(tmp_path)
    held.create("acme", Recipe.from_dict({**recipe(passes=1).to_dict(), "gate": {"alarm": 2}}))
    return held


def settle(trainer: Worker) -> None:
    while trainer.turn():
        pass


def turn_down(monkeypatch: pytest.MonkeyPatch, *first: int) -> None:
    """Reject every candidate whose segment begins with one of these facts."""
    prompts = {fact(number) for number in first}
    real = gate.Gate.__init__

    def begin(self: gate.Gate, base: Base, inputs: Inputs, learner: Learner) -> None:
        real(self, base, inputs, learner)
        bad = {row_of(base.tokenizer, prompt, 64) for prompt in prompts}
        self.bad = learner.rows[0] in bad  # type: ignore[attr-defined]

    judge = gate.Gate.judge

    def judged(self: gate.Gate) -> gate.Judged:
        held = judge(self)
        bad = self.bad and self._hand is not Hand.ACCEPT  # type: ignore[attr-defined]
        return gate.Judged("It is worse." if bad else held.rejected, held.metrics)

    monkeypatch.setattr(gate.Gate, "__init__", begin)
    monkeypatch.setattr(gate.Gate, "judge", judged)


def seal(stack: Stack, *numbers: int) -> None:
    for number in numbers:
        stack.seal("acme", [fact(number), fact(number + 1)], ["ann", "bob"])


def test_every_version_says_how_new_its_segment_was(stack: Stack, base: Base) -> None:
    seal(stack, 0, 10)
    settle(stack.worker(base))
    first, second = stack.ledger.versions("acme").values()
    assert {"prequential", "learned"} <= first.metrics.keys()
    assert second.metrics["prequential"] > second.metrics["learned"]
    assert {"earlier_before", "earlier_after"} <= second.metrics.keys()
    assert second.metrics["rejected"] == 0


def test_a_rejected_segment_is_set_aside_and_the_next_builds_on_the_last_accepted(
    stack: Stack, base: Base, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    turn_down(monkeypatch, 10, 20)
    seal(stack, 0, 10, 20)
    settle(stack.worker(base, "t0"))
    head = stack.ledger.adapter("acme")
    assert (head.release, head.tip) == (1, 1)
    rejected = stack.ledger.segment("acme", 2)
    assert (rejected.outcome, rejected.cause, rejected.note) == (Outcome.SET_ASIDE, Cause.GATE, "It is worse.")
    assert rejected.metrics["prequential"] > 0
    assert stack.ledger.rejections() == {"acme": 2}
    assert "acme learns nothing" in caplog.text
    seal(stack, 30)
    settle(stack.worker(base, "t1"))
    newest = stack.ledger.version("acme", 2)
    assert (newest.parent, newest.segment, newest.saw) == (1, 4, (1, 2, 3, 4))
    assert stack.ledger.rejections() == {}


def test_accepting_by_hand_learns_the_segment_in_its_place(
    stack: Stack, base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    turn_down(monkeypatch, 10)
    seal(stack, 0, 10, 20)
    trainer = stack.worker(base)
    settle(trainer)
    stack.ledger.decide_by_hand("acme", 2, Hand.ACCEPT, "ann", "those are the new prices")
    assert stack.ledger.adapter("acme").release == 2  # until the next is made
    settle(trainer)
    versions = stack.ledger.versions("acme")
    line = [(versions[number].parent, versions[number].segment) for number in (1, 3, 4)]
    assert line == [(0, 1), (1, 2), (3, 3)]
    assert stack.ledger.adapter("acme").release == 4


def test_discarding_by_hand_takes_a_learned_segment_out(stack: Stack, base: Base) -> None:
    seal(stack, 0, 10, 20)
    trainer = stack.worker(base)
    settle(trainer)
    head = stack.ledger.decide_by_hand("acme", 2, Hand.DISCARD, "ann")
    assert (head.release, head.tip) == (1, 1)
    settle(trainer)
    newest = stack.ledger.version("acme", 4)
    assert (newest.parent, newest.segment) == (1, 3)
    other = Stack(stack.folder / "other")
    other.create("acme", Recipe.from_dict(stack.ledger.adapter("acme").recipe))
    seal(other, 0, 20)
    settle(other.worker(base))
    assert other.ledger.version("acme", 2).digest == newest.digest


def test_a_rollback_to_what_learned_a_discarded_segment_is_the_later_word(stack: Stack, base: Base) -> None:
    seal(stack, 0, 10, 20)
    trainer = stack.worker(base)
    settle(trainer)
    stack.ledger.decide_by_hand("acme", 2, Hand.DISCARD, "ann")
    settle(trainer)
    stack.ledger.rollback("acme", 3, "ann")
    assert [segment.hand for segment in stack.ledger.segments("acme")] == [Hand.NONE] * 3
    stack.forget("acme", "ann")
    settle(trainer)
    rebuilt = stack.ledger.adapter("acme").release
    assert rebuilt > 4
    assert Line.of(stack.ledger.versions("acme"), rebuilt).trained.keys() == {1, 2, 3}
