"""Learning from a stream beside its rivals: the frozen base, plain sequential LoRA, and retraining on everything.

Tenants of `tenants` live through segments of facts, tickets and small talk, with updates and a drift. Everybody sees
the same segments in order, and all are asked the same things at five checkpoints: facts as they are now, in a wording
that was never taught, new tickets and new small talk. Retraining starts from the base at every checkpoint, on all that
there is, with the passes that suited it best. Compute is counted in tokens through the base, a trained token as three
scored ones, the gate's own scoring included.

    python -m benchmarks.learning [--quick] [--base FOLDER] [--tenants 1] [--seed 0]

`--quick` takes the small base (`small_base`); without it, Gemma-3-270M from the demo extra.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from benchmarks.machine import RESULTS, write_result
from benchmarks.small_base import small_base
from benchmarks.tenants import Asked, Tenant
from riverdelta.core.recipe import Recipe
from riverdelta.registry.ledger import Hand
from riverdelta.trainer.adapter import AdapterWeights
from riverdelta.trainer.base import Base, Member
from riverdelta.trainer.gate import Gate, usual_of
from riverdelta.trainer.increment import Learner, row_of, step
from riverdelta.trainer.layout import Row, arrange, bucket
from riverdelta.trainer.scoring import score, tiles

CHECKPOINTS = 5
RIVALS = ("base", "sequential", "ours", "retrain")
# What suits a base: the small one has to be pushed harder. The same for every rival.
SHAPES: dict[bool, dict[str, Any]] = {
    True: {"training": {"max_length": 96}, "optimiser": {"learning_rate": 0.01}},
    False: {"training": {"max_length": 96}},
}
GRID = (5, 10, 20)


@dataclass
class Life:
    """How one rival fares: weights as they are, tokens spent, and what was measured."""

    weights: AdapterWeights | None = None
    files: tuple[bytes | None, bytes | None] = (None, None)
    earlier: list[bytes | None] = field(default_factory=list)
    usual: list[float] = field(default_factory=list)
    compute: float = 0.0
    prequential: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    right: list[float] = field(default_factory=list)
    then: dict[int, float] = field(default_factory=dict)  # per segment, its facts right after it was learned
    rejected: int = 0


class Bench:
    """One tenant, one base."""

    def __init__(self, base: Base, shape: dict[str, Any], seed: int, segments: int, size: int) -> None:
        self.base, self.shape, self.seed = base, shape, seed
        self.tenant = Tenant(seed)
        self.stream: list[list[Asked]] = []
        self.exams: list[list[Asked]] = []
        self.known: list[list[tuple[str, str]]] = []
        self.changed: set[tuple[str, str]] = set()
        every = segments // CHECKPOINTS
        for number in range(segments):
            if number == segments // 2:
                self.tenant.drift()
            before = dict(self.tenant.facts)
            self.stream.append(self.tenant.segment(size))
            facts = self.tenant.facts
            self.known.append([key for key in facts if key not in before])
            self.changed |= {key for key in before if facts[key] != before[key]}
            if number % every == every - 1:
                self.exams.append(self.exam())
        self.every = every

    def exam(self) -> list[Asked]:
        """What is asked at a checkpoint: up to 40 facts in other words, eight tickets, eight bits of small talk."""
        keys = sorted(self.tenant.facts)
        some = keys[:: max(1, len(keys) // 40)]
        asked = [self.tenant.ask(subject, kind, 2) for subject, kind in some]
        return asked + [self.tenant.ticket() for _ in range(8)] + [self.tenant.small_talk() for _ in range(8)]

    def rows(self, asked: Sequence[Asked]) -> list[Row]:
        """Token ids of entries."""
        return [row for one in asked if (row := row_of(self.base.tokenizer, one.content, 96)) is not None]

    def losses(self, life: Life, asked: Sequence[Asked]) -> float:
        """The mean loss of some entries, in nats a token."""
        return fmean(each.loss for each in score(self.base, life.weights, self.rows(asked)))

    def recipe(self, **training: Any) -> Recipe:
        """The rivals' recipe."""
        return Recipe.from_dict({**self.shape, "training": {**self.shape["training"], **training}})

    def examine(self, life: Life, checkpoint: int) -> None:
        """Ask everything of a checkpoint."""
        life.loss.append(self.losses(life, self.exams[checkpoint]))
        life.right.append(right(self.base, life.weights, self.rows(self.exams[checkpoint])))

    def facts_of(self, segment: int) -> list[Asked]:
        """What a segment taught first and nothing has changed since, in other words."""
        return [self.tenant.ask(*key, 2) for key in self.known[segment] if key not in self.changed]

    def live(self, rival: str, told: Any) -> Life:
        """The base, sequential LoRA, or ours, through the stream."""
        life = Life()
        recipe = self.recipe(**({"rehearse": 0} if rival == "sequential" else {}))
        for number, said in enumerate(self.stream):
            life.prequential.append(self.losses(life, said))
            if rival != "base":
                self.learn(life, recipe, said, gated=rival == "ours")
                if facts := self.facts_of(number):
                    life.then[number] = right(self.base, life.weights, self.rows(facts))
            if number % self.every == self.every - 1:
                self.examine(life, number // self.every)
            told(f"{rival}: segment {number + 1} of {len(self.stream)}")
        return life

    def learn(self, life: Life, recipe: Recipe, said: Sequence[Asked], gated: bool) -> None:
        """One increment."""
        entries = [one.content for one in said]
        learner = Learner(self.base, recipe, self.seed, entries, life.earlier, *life.files)
        gate = Gate(self.base, recipe, self.seed, learner, life.earlier, life.usual, Hand.NONE) if gated else None
        while not learner.done:
            step(self.base, [learner])
        life.compute += 3 * learner.tokens
        if gate is not None:
            judged = gate.judge()
            life.compute += 2 * sum(bucket(len(row.tokens)) for rows in gate.rows for row in rows)
            if judged.rejected:
                life.rejected += 1
                return
            life.usual += usual_of([judged.metrics])
        made = learner.candidate()
        life.files, life.weights = (made.weights, made.state), learner.weights
        life.earlier += entries

    def retrain(self, told: Any) -> Life:
        """From the base at every checkpoint, on all there is; the passes are chosen at the last one."""
        everything = [one for said in self.stream for one in said]
        last = {}
        for passes in GRID:
            trial = Life()
            self.learn(trial, self.recipe(rehearse=0, passes=passes), everything, gated=False)
            last[passes] = (self.losses(trial, self.exams[-1]), trial)
            told(f"retrain: {passes} passes, loss {last[passes][0]:.3f}")
        best = min(GRID, key=lambda passes: last[passes][0])
        life = Life()
        for checkpoint in range(CHECKPOINTS):
            first = checkpoint * self.every
            for number in range(first, first + self.every):
                life.prequential.append(self.losses(life, self.stream[number]))
            if checkpoint == CHECKPOINTS - 1:
                made = last[best][1]
            else:
                so_far = [one for said in self.stream[: first + self.every] for one in said]
                made = Life()
                self.learn(made, self.recipe(rehearse=0, passes=best), so_far, gated=False)
            life.weights, life.compute = made.weights, life.compute + made.compute
            self.examine(life, checkpoint)
            told(f"retrain: checkpoint {checkpoint + 1} of {CHECKPOINTS}")
        return life

    def backward(self, life: Life) -> float | None:
        """How much better each segment's facts are known at the end than right after it, in points (Lopez-Paz and
        Ranzato 2017)."""
        moved = [
            right(self.base, life.weights, self.rows(facts)) - life.then[number]
            for number in life.then
            if number < len(self.stream) - 1 and (facts := self.facts_of(number))
        ]
        return 100 * fmean(moved) if moved else None


@torch.no_grad()
def right(base: Base, weights: AdapterWeights | None, rows: Sequence[Row]) -> float:
    """The share of rows whose whole answer greedy decoding gives."""
    hits = 0
    for row in rows:
        batch = arrange([[row]], filler=0)
        tokens, positions, keep, targets = (
            torch.tensor(values, device=base.device)
            for values in (batch.tokens, batch.positions, batch.keep, batch.targets)
        )
        member = Member(weights.pairs() if weights is not None else {}, len(batch.tokens))
        hidden = base.hidden(tokens, positions, [member], batch.blocks)[keep]
        hits += all(
            bool((base.logits(places).argmax(-1) == wanted)[:n].all()) for n, (places, wanted) in tiles(hidden, targets)
        )
    return hits / len(rows)


def plot(figures: dict[str, Any], path: Path) -> None:
    """Loss and exact answers at the checkpoints, and the prequential loss, of every rival."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    _, axes = plt.subplots(1, 3, figsize=(13, 4))
    for rival in RIVALS:
        held = figures["rivals"][rival]
        axes[0].plot(range(1, CHECKPOINTS + 1), held["loss"], marker="o", label=rival)
        axes[1].plot(range(1, CHECKPOINTS + 1), [100 * r for r in held["right"]], marker="o", label=rival)
        axes[2].plot(range(1, len(held["prequential"]) + 1), held["prequential"], label=rival)
    for axis, (title, below) in zip(
        axes,
        (
            ("loss on what was never worded so", "checkpoint"),
            ("right answers, %", "checkpoint"),
            ("prequential loss", "segment"),
        ),
        strict=True,
    ):
        axis.set_title(title)
        axis.set_xlabel(below)
    axes[0].legend()
    plt.tight_layout()
    plt.savefig(path, dpi=110)


def mean(lives: Sequence[Sequence[float]]) -> list[float]:
    """The mean over tenants, point by point."""
    return [round(fmean(points), 4) for points in zip(*lives, strict=True)]


def main() -> None:
    """Run it and print a table, JSON last."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--quick", action="store_true", help="the small base, in five minutes")
    parser.add_argument("--base", type=Path, help="another base model's folder")
    parser.add_argument("--tenants", type=int, default=1)
    parser.add_argument("--segments", type=int, default=10)
    parser.add_argument("--size", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="float32", help="of the base's products; bfloat16 where the CPU has it")
    given = parser.parse_args()
    began = time.monotonic()

    def told(what: str) -> None:
        print(f"{time.monotonic() - began:6.0f} s  {what}", flush=True)

    if given.base is None and not given.quick:
        from riverdelta.app.gemma import gemma_folder

        folder = gemma_folder(told)
    else:
        folder = given.base or small_base(told)
    base = Base.load(folder, dtype=given.dtype)
    lives: dict[str, list[Life]] = {rival: [] for rival in RIVALS}
    backward: list[float] = []
    for number in range(given.tenants):
        bench = Bench(base, SHAPES[given.quick], given.seed + number, given.segments, given.size)
        for rival in RIVALS[:3]:
            lives[rival].append(bench.live(rival, told))
        lives["retrain"].append(bench.retrain(told))
        if (moved := bench.backward(lives["ours"][-1])) is not None:
            backward.append(moved)
    loss = {rival: fmean(each for life in lives[rival] for each in life.loss) for rival in RIVALS}
    # To retrain at every segment costs as much a token as at a checkpoint, on 1 + 2 + ... segments.
    each = given.segments // CHECKPOINTS
    per_segment = sum(range(1, given.segments + 1)) / (each * sum(range(1, CHECKPOINTS + 1)))
    spent = {rival: sum(life.compute for life in lives[rival]) for rival in RIVALS}
    figures = {
        "base": folder.name,
        "tenants": given.tenants,
        "segments": given.segments,
        "entries": given.size,
        "seconds": round(time.monotonic() - began, 1),
        "rivals": {
            rival: {
                "loss": mean([life.loss for life in lives[rival]]),
                "right": mean([life.right for life in lives[rival]]),
                "prequential": mean([life.prequential for life in lives[rival]]),
                "compute": spent[rival],
            }
            for rival in RIVALS
        },
        "rejected": sum(life.rejected for life in lives["ours"]),
        "loss_vs_retrain_pct": round(100 * (loss["ours"] / loss["retrain"] - 1), 1),
        "compute_vs_retrain_pct": round(100 * spent["ours"] / spent["retrain"], 1),
        "compute_vs_retrain_every_segment_pct": round(100 * spent["ours"] / (spent["retrain"] * per_segment), 1),
        "backward_transfer": round(fmean(backward), 1) if backward else None,
    }
    name = "learning_quick" if given.quick else "learning"
    plot(figures, RESULTS / f"{name}.png")
    write_result(name, " ".join(["python -m benchmarks.learning", *sys.argv[1:]]), figures)
    print(f"{'':12s}{'loss':>8s}{'right':>8s}{'preq.':>8s}{'compute':>10s}")
    for rival in RIVALS:
        held = figures["rivals"][rival]  # type: ignore[index]
        print(
            f"{rival:12s}{held['loss'][-1]:8.3f}{held['right'][-1]:8.1%}{fmean(held['prequential']):8.3f}"
            f"{held['compute'] / max(1.0, spent['retrain']):10.2f}"
        )
    wanted = ("loss_vs_retrain_pct", "compute_vs_retrain_pct", "compute_vs_retrain_every_segment_pct")
    print(json.dumps({key: figures[key] for key in (*wanted, "backward_transfer", "rejected", "seconds")}))


if __name__ == "__main__":
    main()
