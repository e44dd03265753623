"""The yardsticks of machine unlearning over a sequence of requests: ours, retraining, gradient ascent and NPO.

Invented subjects with facts, in the shape of TOFU (Maini et al. 2024), are learned segment by segment; then two of them
at a time ask to be forgotten. Each rival answers every request on top of its own last answer:

- `kept` does nothing;
- `ours` is the adapter's replay with the forgotten as tombstones;
- `retrain` is the reference that all are held against: what is left, trained from the base, with a seed of its own;
- `again` is the same with another seed, and says how much of a figure is the seed's;
- `ascent` takes gradient steps up the loss of what is to be forgotten;
- `npo` is Negative Preference Optimization (Zhang et al. 2024) on the same.

Forget quality is the p-value of a Kolmogorov-Smirnov test between a rival's truth ratios and retraining's (1: cannot be
told apart); privacy leakage, as in MUSE (Shi et al. 2024), how far the AUC of a membership attack by loss lies from
retraining's, in per cent; extraction strength (Carlini et al. 2021) the share of an answer that follows by itself
from the rest; utility what is kept of everything else.

    python -m benchmarks.unlearning [--subjects 16] [--requests 3]
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from benchmarks.learning import right
from benchmarks.machine import RESULTS, write_result
from benchmarks.small_base import small_base
from benchmarks.tenants import _VALUES, KINDS, Asked, Tenant, name
from riverdelta.core.recipe import Recipe
from riverdelta.trainer.adapter import AdapterWeights
from riverdelta.trainer.base import Base, Member
from riverdelta.trainer.increment import Inputs, Learner, row_of, step, train
from riverdelta.trainer.layout import Row, arrange
from riverdelta.trainer.scoring import score, tiles

RIVALS = ("kept", "ours", "retrain", "again", "ascent", "npo")
FACTS, TOGETHER, WRONG, BETA = 4, 2, 5, 0.1
LONGEST = 96


class Ascent(Learner):
    """Up the loss instead of down."""

    def learn(self, loss: float, tokens: int) -> None:
        self._gradient.neg_()
        super().learn(loss, tokens)


class Npo(Learner):
    """Up the loss, less and less as an answer has become unlikelier than it was: one entry to a step."""

    was: dict[int, float]

    def learn(self, loss: float, tokens: int) -> None:
        slot = self.plan[self.place].slots[0]
        row = self.rows[slot]
        assert row is not None
        fell = (self.was[slot] - loss) * row.targets  # log of how much likelier the answer is than before
        weight = 2.0 / (1.0 + math.exp(-BETA * fell))
        self._gradient.mul_(-weight)
        super().learn(loss, tokens)


class World:
    """Subjects and their facts, the order in which they are told, and what is asked of everybody."""

    def __init__(self, base: Base, subjects: int, segments: int, seed: int) -> None:
        self.base, self.draw = base, random.Random(f"unlearning {seed}")
        self.tenant = Tenant(seed)
        self.subjects = [name(self.draw) for _ in range(subjects)]
        self.strangers = [name(self.draw) for _ in range(subjects)]
        kinds = sorted(KINDS)[:FACTS]
        for who in [*self.subjects, *self.strangers]:
            for kind in kinds:
                self.tenant.facts[who, kind] = self.draw.choice(_VALUES[kind])
        self.kinds = kinds
        said = [
            (who, self.tenant.ask(who, kind, wording)) for who in self.subjects for kind in kinds for wording in (0, 1)
        ]
        self.draw.shuffle(said)
        size = -(-len(said) // segments)
        self.segments = [said[first : first + size] for first in range(0, len(said), size)]

    def log(self, without: Sequence[str]) -> list[list[bytes | None]]:
        """The segments with these subjects' entries as tombstones."""
        return [[None if who in without else one.content for who, one in said] for said in self.segments]

    def told(self, who: Sequence[str]) -> list[bytes]:
        """What was told of these subjects."""
        return [one.content for said in self.segments for about, one in said if about in who]

    def rows(self, asked: Sequence[Asked]) -> list[Row]:
        """Token ids."""
        return [row for one in asked if (row := row_of(self.base.tokenizer, one.content, LONGEST)) is not None]

    def exam(self, who: Sequence[str], wording: int) -> list[Asked]:
        """Every fact of these subjects."""
        return [self.tenant.ask(each, kind, wording) for each in who for kind in self.kinds]

    def truth_ratios(self, weights: AdapterWeights | None, who: Sequence[str]) -> list[float]:
        """Per fact, how likely wrong answers are beside the right one, in a wording that was never taught."""
        asked, widths = [], []
        for each in who:
            for kind in self.kinds:
                one = self.tenant.ask(each, kind, 2)
                wrong = [v for v in _VALUES[kind] if v != self.tenant.facts[each, kind]][:WRONG]
                asked += [one, *(Asked(one.prompt, f" {value}", "fact") for value in wrong)]
                widths.append(1 + len(wrong))
        likely = [math.exp(-each.loss) for each in score(self.base, weights, self.rows(asked))]
        ratios = []
        for width in widths:
            ratios.append(fmean(likely[1:width]) / max(likely[0], 1e-9))
            likely = likely[width:]
        return ratios

    def attack(self, weights: AdapterWeights | None, who: Sequence[str]) -> float:
        """AUC of telling the forgotten from strangers by their loss, in the words in which they were told."""
        inside = [each.loss for each in score(self.base, weights, self.rows(self.exam(who, 0)))]
        outside = [each.loss for each in score(self.base, weights, self.rows(self.exam(self.strangers, 0)))]
        return fmean((a < b) + 0.5 * (a == b) for a in inside for b in outside)

    @torch.no_grad()
    def extraction(self, weights: AdapterWeights | None, who: Sequence[str]) -> float:
        """The mean share of the answers' tokens that greedy decoding adds to the rest."""
        shares = []
        for row in self.rows(self.exam(who, 0)):
            batch = arrange([[row]], filler=0)
            tokens, positions, keep, targets = (
                torch.tensor(each) for each in (batch.tokens, batch.positions, batch.keep, batch.targets)
            )
            member = Member(weights.pairs() if weights is not None else {}, len(batch.tokens))
            hidden = self.base.hidden(tokens, positions, [member], batch.blocks)[keep]
            hits = [
                bool(hit)
                for n, (places, wanted) in tiles(hidden, targets)
                for hit in (self.base.logits(places).argmax(-1) == wanted)[:n]
            ][:-1]  # the end is no secret
            by_itself = next((place for place, hit in enumerate(reversed(hits)) if not hit), len(hits))
            shares.append(by_itself / len(hits))
        return fmean(shares)


def recipe(passes: int, rate: float, micro_batch: int = 8, rehearse: int = 8) -> Recipe:
    """What all learn by."""
    training = {"max_length": LONGEST, "passes": passes, "micro_batch": micro_batch, "rehearse": rehearse}
    return Recipe.from_dict({"training": training, "optimiser": {"learning_rate": rate}, "gate": {"on": False}})


def learn(world: World, passes: int, without: Sequence[str], seed: int) -> AdapterWeights:
    """Live through the log; what `ours` replays and `retrain` does with another seed."""
    earlier: list[bytes | None] = []
    weights = state = None
    for entries in world.log(without):
        inputs = Inputs(recipe(passes, 0.005), seed, entries, tuple(earlier), weights, state)
        made = train(world.base, Learner(world.base, inputs))
        weights, state = made.weights, made.state
        earlier += entries
    assert weights is not None
    return AdapterWeights.load(weights, world.base.device)


def undo(world: World, kind: type[Learner], weights: AdapterWeights, who: Sequence[str], rate: float) -> AdapterWeights:
    """Gradient ascent or NPO on what was told of these subjects."""
    told = world.told(who)
    shaped = recipe(3, rate, micro_batch=1, rehearse=0)
    learner = kind(world.base, Inputs(shaped, 1, told, (), weights.dump()[0]))
    if isinstance(learner, Npo):
        rows = [row for row in learner.rows if row is not None]
        learner.was = {slot: each.loss for slot, each in enumerate(score(world.base, weights, rows))}
    while not learner.done:
        step(world.base, [learner])
    return learner.weights


def plot(figures: dict[str, Any], path: Path) -> None:
    """Every yardstick over the requests."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    shown = ("forget_quality", "privacy_leak_pct", "extraction", "utility_loss")
    _, axes = plt.subplots(1, len(shown), figsize=(15, 4))
    for axis, what in zip(axes, shown, strict=True):
        for rival in RIVALS:
            held = figures["rivals"][rival][what]
            axis.plot(range(1, len(held) + 1), held, marker="o", label=rival)
        axis.set_title(what.replace("_", " "))
        axis.set_xlabel("requests")
    axes[0].set_yscale("log")
    axes[0].legend()
    plt.tight_layout()
    plt.savefig(path, dpi=110)


def main() -> None:
    """Run it and print a table, JSON last."""
    from scipy.stats import ks_2samp

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--subjects", type=int, default=16)
    parser.add_argument("--segments", type=int, default=4)
    parser.add_argument("--requests", type=int, default=3)
    parser.add_argument("--passes", type=int, default=5)
    parser.add_argument("--rate", type=float, default=1e-4, help="of gradient ascent and NPO")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    began = time.monotonic()

    def told(what: str) -> None:
        print(f"{time.monotonic() - began:6.0f} s  {what}", flush=True)

    base = Base.load(small_base(told), threads=1)
    world = World(base, given.subjects, given.segments, given.seed)
    full = learn(world, given.passes, (), 7)
    told("learned")
    held: dict[str, AdapterWeights] = dict.fromkeys(RIVALS, full)
    figures: dict[str, Any] = {
        rival: {
            key: []
            for key in ("forget_quality", "auc", "privacy_leak_pct", "extraction", "utility_loss", "utility_right")
        }
        for rival in RIVALS
    }
    answers: dict[str, Callable[[Sequence[str], Sequence[str]], AdapterWeights]] = {
        "kept": lambda new, gone: full,
        "ours": lambda new, gone: learn(world, given.passes, gone, 7),
        "retrain": lambda new, gone: learn(world, given.passes, gone, 1007),
        "again": lambda new, gone: learn(world, given.passes, gone, 2007),
        "ascent": lambda new, gone: undo(world, Ascent, held["ascent"], new, given.rate),
        "npo": lambda new, gone: undo(world, Npo, held["npo"], new, given.rate),
    }
    for request in range(given.requests):
        new = world.subjects[request * TOGETHER : (request + 1) * TOGETHER]
        gone = world.subjects[: (request + 1) * TOGETHER]
        left = world.subjects[(request + 1) * TOGETHER :]
        for rival in RIVALS:
            held[rival] = answers[rival](new, gone)
        ratios = {rival: world.truth_ratios(held[rival], gone) for rival in RIVALS}
        auc = {rival: world.attack(held[rival], gone) for rival in RIVALS}
        others = [*world.exam(left, 1), *(world.tenant.ticket() for _ in range(8))]
        for rival in RIVALS:
            cell = figures[rival]
            cell["forget_quality"].append(float(ks_2samp(ratios[rival], ratios["retrain"]).pvalue))
            cell["auc"].append(auc[rival])
            cell["privacy_leak_pct"].append(100 * (auc[rival] / auc["retrain"] - 1))
            cell["extraction"].append(world.extraction(held[rival], gone))
            cell["utility_loss"].append(fmean(each.loss for each in score(base, held[rival], world.rows(others))))
            cell["utility_right"].append(right(base, held[rival], world.rows(world.exam(left, 1))))
        told(f"request {request + 1} of {given.requests}")
    report = {
        "subjects": given.subjects,
        "facts": FACTS,
        "requests": given.requests,
        "together": TOGETHER,
        "passes": given.passes,
        "rate": given.rate,
        "rivals": {
            rival: {key: [round(value, 5) for value in values] for key, values in cell.items()}
            for rival, cell in figures.items()
        },
        "seconds": round(time.monotonic() - began, 1),
    }
    plot(report, RESULTS / "unlearning.png")
    write_result("unlearning", " ".join(["python -m benchmarks.unlearning", *sys.argv[1:]]), report)
    print(f"{'':10s}{'forget q.':>11s}{'leak %':>9s}{'extract.':>10s}{'loss':>8s}{'right':>8s}")
    for rival in RIVALS:
        last = {key: values[-1] for key, values in figures[rival].items()}
        print(
            f"{rival:10s}{last['forget_quality']:11.2g}{last['privacy_leak_pct']:9.1f}{last['extraction']:10.1%}"
            f"{last['utility_loss']:8.3f}{last['utility_right']:8.1%}"
        )
    wanted = {
        f"{rival}_{key}": round(figures[rival][key][-1], 4)
        for rival in ("ours", "again", "ascent", "npo", "kept")
        for key in ("forget_quality", "privacy_leak_pct", "extraction", "utility_loss")
    }
    print(json.dumps({**wanted, "seconds": report["seconds"]}))


if __name__ == "__main__":
    main()
