"""The optimiser: its rate falls within an increment and over an adapter's life; a step is AdamW's."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from riverdelta.core.recipe import Optimiser, Recipe
from riverdelta.trainer.base import Base
from riverdelta.trainer.increment import Inputs, Learner, step
from riverdelta.trainer.optimiser import AdamW, rate_at
from tests.trainer.samples import contents

CPU = torch.device("cpu")


def test_the_rate_falls_in_a_line_to_final_and_slower_with_every_position() -> None:
    like = Optimiser(learning_rate=0.01, final=0.2, decay=0.5, floor=0.0)
    falls = [rate_at(like, 0, progress) for progress in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert falls == pytest.approx([0.01, 0.008, 0.006, 0.004, 0.002])
    assert rate_at(like, 2, 0.0) == pytest.approx(0.005)
    assert rate_at(like, 6, 1.0) == pytest.approx(0.0005)
    assert rate_at(Optimiser(learning_rate=0.01, final=1.0, decay=0.5, floor=0.4), 6, 1.0) == pytest.approx(0.0055)


@given(
    rate=st.floats(1e-6, 1.0),
    final=st.floats(0.0, 1.0),
    decay=st.floats(0.0, 1.0),
    floor=st.floats(0.0, 1.0),
    position=st.integers(0, 10_000),
    steps=st.integers(1, 50),
)
def test_it_never_rises_within_an_increment(
    rate: float, final: float, decay: float, floor: float, position: int, steps: int
) -> None:
    like = Optimiser(learning_rate=rate, final=final, decay=decay, floor=floor)
    falls = [rate_at(like, position + at, at / steps) for at in range(steps + 1)]
    assert all(later <= earlier * (1 + 1e-9) for earlier, later in pairwise(falls))
    end = rate * final * (floor + (1 - floor) / (1 + decay * (position + steps)))
    assert falls[-1] == pytest.approx(end, rel=1e-9, abs=1e-12 * rate)


def test_every_step_of_an_increment_takes_its_place_in_the_fall(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next increment begins at the full rate again, further on in the adapter's life."""
    like = Recipe.from_dict(
        {
            "optimiser": {"learning_rate": 0.01, "final": 0.5, "decay": 0.1},
            "training": {"passes": 2, "micro_batch": 2, "rehearse": 0, "steps": 1},
        }
    )
    seen: list[tuple[int, float]] = []

    def watch(self: AdamW, weights: torch.Tensor, gradient: torch.Tensor, progress: float) -> bool:
        seen.append((self.position, progress))
        return real(self, weights, gradient, progress)

    real = AdamW.step
    monkeypatch.setattr(AdamW, "step", watch)
    first = Learner(base, Inputs(like, 1, contents(4)))
    while not first.done:
        step(base, [first])
    made = first.candidate()
    second = Learner(base, Inputs(like, 1, contents(4), (), made.weights, made.state))
    step(base, [second])
    assert seen == [(0, 0.0), (1, 0.25), (2, 0.5), (3, 0.75), (4, 0.0)]


@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_a_step_is_adamw_with_clipped_gradients(clip: float) -> None:
    like = Optimiser(learning_rate=0.01, final=1.0, decay=0.0, clip=clip, weight_decay=0.1)
    draw = torch.Generator().manual_seed(0)
    ours, gradients = torch.randn(1000, generator=draw), torch.randn(5, 1000, generator=draw)
    theirs = ours.clone().requires_grad_()
    optimiser = AdamW(like, 1000, CPU)
    oracle = torch.optim.AdamW(
        [theirs], lr=0.01, betas=(like.beta1, like.beta2), eps=like.epsilon, weight_decay=0.1, foreach=False
    )
    for gradient in gradients:
        assert optimiser.step(ours, gradient.clone(), 0.0)
        theirs.grad = gradient.clone()
        if clip:
            torch.nn.utils.clip_grad_norm_([theirs], clip)
        oracle.step()
    torch.testing.assert_close(ours, theirs.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_moves_nothing(wrong: float) -> None:
    weights, gradient = torch.ones(4), torch.tensor([1.0, wrong, 0.0, 1.0])
    optimiser = AdamW(Optimiser(), 4, CPU)
    assert not optimiser.step(weights, gradient, 0.0)
    assert (optimiser.position, optimiser.taken) == (0, 0)
    for vector, was in ((weights, 1.0), (optimiser.m, 0.0), (optimiser.v, 0.0)):
        assert bool((vector == was).all())


@pytest.mark.parametrize(("average", "of"), [(0.0, 1), (0.5, 2), (0.6, 3), (1.0, 4)])
@pytest.mark.parametrize("last", [4, 3])
def test_an_increment_ends_with_the_mean_of_its_last_weights(base: Base, average: float, of: int, last: int) -> None:
    """Of so many of its four steps; a step that is all tombstones is none."""
    like = Recipe.from_dict(
        {
            "optimiser": {"learning_rate": 0.01, "average": average},
            "training": {"passes": 1, "micro_batch": 2, "rehearse": 0, "steps": 4},
        }
    )
    said = contents(8)
    if last == 3:
        learner = Learner(base, Inputs(like, 1, said))
        for slot in learner.plan[-1].slots:
            said[slot] = None
    learner = Learner(base, Inputs(like, 1, said))
    after = []
    while not learner.done:
        step(base, [learner])
        after.append(learner.weights.flat.detach().clone())
    after = after[:last]
    assert len(learner.losses) == last
    counted = after[4 - of :] if average else []
    made = learner.candidate()
    wanted = torch.stack(counted).mean(0) if counted else after[-1]
    torch.testing.assert_close(learner.weights.flat.detach(), wanted, rtol=1e-5, atol=1e-7)
    assert learner.candidate().digest == made.digest
