"""Drift: found in the losses of entries before they are learned, worth passes, and a function of the log alone."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from riverdelta.core.digests import seed_of
from riverdelta.core.recipe import Recipe
from riverdelta.registry.ledger import Outcome
from riverdelta.trainer import gate
from riverdelta.trainer.base import Base
from riverdelta.trainer.drift import RECENT, Usual, budgeted, rose
from riverdelta.trainer.replay import replay
from tests.trainer.samples import example, fact, recipe
from tests.trainer.stack import Stack
from tests.trainer.test_forget_equals_suppressed import Raw, forget, same, settle

losses = st.lists(st.floats(0, 20), min_size=1, max_size=24)


# -- the decision --------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=50)
@given(st.floats(0, 20), st.lists(st.integers(0, 40), max_size=12))
def test_losses_that_stay_as_they_are_have_not_risen(loss: float, sizes: list[int]) -> None:
    assert not rose([[loss] * size for size in sizes], 0.002)


@settings(deadline=None, max_examples=50)
@given(losses, st.integers(5, 12), st.floats(0, 1))
def test_what_gets_better_is_no_drift(said: list[float], many: int, share: float) -> None:
    better = [[share**turn * loss for loss in sorted(said, reverse=True)] for turn in range(many)]
    falling = [sorted((loss for one in better for loss in one), reverse=True)]
    assert not rose(falling, 0.002)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(0, 0.3), min_size=64, max_size=200), st.lists(st.floats(3, 20), min_size=32, max_size=64))
def test_a_world_that_moves_is_found_in_the_segment_in_which_it_did(was: list[float], now: list[float]) -> None:
    known = [was[first : first + 16] for first in range(0, len(was), 16)]
    assert rose([*known, now], 0.002)
    assert not rose([*known, now], 0.0)
    assert not rose([*known, now, []], 0.002)  # that was the one before


@settings(deadline=None, max_examples=50)
@given(st.lists(losses, min_size=1, max_size=6))
def test_only_the_newest_segments_tell(said: list[list[float]]) -> None:
    recent = (said * RECENT)[:RECENT]
    assert rose([[9.0] * 30, *recent], 0.002) == rose([[0.0] * 30, [5.0] * 30, *recent], 0.002)


def test_a_drift_is_worth_passes_until_the_next_segment() -> None:
    like = Recipe.from_dict({"training": {"passes": 3, "steps": 5}, "drift": {"boost": 1.5}})
    calm, moved = Usual(0.1, (0.1,)), Usual(0.1, (0.1,), drift=True)
    assert [budgeted(like, usual).training.passes for usual in ([], [calm], [moved], [moved, calm])] == [3, 3, 4, 3]
    assert budgeted(like, [moved]) == Recipe.from_dict({**like.to_dict(), "training": {"passes": 4, "steps": 8}})


# -- in the lineage --------------------------------------------------------------------------------------------------


def watchful(boost: float = 3.0) -> Recipe:
    """A recipe whose gate only measures, and that sees drift early."""
    calm = {"tolerance": 20.0, "sample": 0}
    steep = {"learning_rate": 0.05, "clip": 0.0}
    watch = {"delta": 0.5, "boost": boost}
    like = recipe(passes=2, rehearse=8)
    return Recipe.from_dict({**like.to_dict(), "optimiser": steep, "gate": calm, "drift": watch})


def known(many: int) -> list[bytes]:
    return [example(prompt="a", completion=" b")] * many


def test_a_drift_raises_the_budget_of_the_next_increment(tmp_path: Path, base: Base) -> None:
    stack = Stack(tmp_path)
    stack.create("acme", watchful())
    said = [*[known(12)] * 6, [fact(n) for n in range(20)], known(6), known(6)]
    for texts in said:
        stack.seal("acme", texts, ["bob"] * len(texts))
    settle(stack, base)
    versions = stack.ledger.versions("acme")
    drift = [versions[number].metrics["drift"] for number in sorted(versions)]
    assert drift == [0] * 6 + [1, 0, 0]
    steps = [versions[number].metrics["steps"] for number in sorted(versions)]
    assert steps == [8] * 6 + [14, 12, 4]
    head = stack.ledger.adapter("acme")
    again = replay(base, Recipe.from_dict(head.recipe), head.seed, said)
    assert [made.digest for made in again] == [versions[number].digest for number in sorted(versions)]


def test_a_leak_through_drift_is_caught(tmp_path: Path, base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    """Learned from nothing that is forgotten, and yet influenced: a budget that is not decided anew after a forget."""
    like = watchful()
    seed = seed_of("adapter", "acme", 0)
    strange = [fact(n) for n in range(20)]
    log: list[list[bytes]] = [*[known(12)] * 6, [*known(2), *strange], known(4)]
    people = ["bob" if text == known(1)[0] else "ann" for texts in log for text in texts]
    admitted = [[text if text == known(1)[0] else None for text in texts] for texts in log]
    ends = [replay(base, like, seed, said)[-1] for said in (log, admitted)]
    assert [len(end.losses) for end in ends] == [12, 4]  # what is forgotten decides about the budget of others
    raw = Raw(
        list(zip(people, [text for texts in log for text in texts], strict=True)), [12, 24, 36, 48, 60, 72, 94, 98]
    )
    for folder, leaks in (("sound", False), ("leaky", True)):
        stack = Stack(tmp_path / folder)
        stack.create("acme", like)
        for texts in log:
            stack.seal("acme", texts, ["bob" if text == known(1)[0] else "ann" for text in texts])
        settle(stack, base)
        assert stack.ledger.version("acme", 7).metrics["drift"] == 1
        forget(stack, raw, "ann")
        assert [each.outcome for each in stack.ledger.segments("acme")[6:]] == [Outcome.AWAITING] * 2
        with monkeypatch.context() as patch:
            if leaks:
                patch.setattr(gate, "drifted", lambda *_: True)
            settle(stack, base)
        assert same(stack, base, like, raw) is not leaks


def test_the_ledger_says_who_asks_for_a_segment_early(tmp_path: Path, base: Base) -> None:
    stack = Stack(tmp_path)
    stack.create("acme", watchful())
    stack.create("other", watchful())
    for name in ("acme", "other"):
        for _ in range(6):
            stack.seal(name, known(12), ["bob"] * 12)
    stack.seal("acme", [fact(n) for n in range(20)], ["ann"] * 20)
    settle(stack, base)
    assert stack.ledger.drifting(["acme", "other", "nobody"]) == {"acme"}
    stack.forget("acme", "ann")
    settle(stack, base)
    assert stack.ledger.drifting(["acme", "other"]) == set()
