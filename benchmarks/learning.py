"""Learning from a stream beside its rivals: the frozen base, plain sequential LoRA, and retraining on everything.

Tenants of `tenants` live through segments of facts, tickets and small talk, with updates and a drift. Everybody sees
the same segments in order, and all are asked the same things at five checkpoints: facts as they are now, in a wording
that was never taught, new tickets and new small talk. Ours is the default recipe, gate and drift included; sequential
LoRA is the same without rehearsal. Retraining starts from the base at every checkpoint, on all that there is, with the
passes, rate and schedule of a grid that suited it best. Compute is counted in tokens through the base, a trained token
as three scored ones, the gate's own scoring included.

    python -m benchmarks.learning [--quick] [--base FOLDER] [--tenants 1] [--seed 0] [--jobs 2]

`--quick` takes the small base (`small_base`); without it, Gemma-3-270M from the demo extra.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from benchmarks.machine import RESULTS, write_result
from benchmarks.small_base import small_base
from benchmarks.tenants import Asked, Tenant
from riverdelta.core.recipe import Recipe
from riverdelta.trainer.adapter import AdapterWeights
from riverdelta.trainer.base import Base, Member
from riverdelta.trainer.drift import Usual
from riverdelta.trainer.gate import Gate, usual_of
from riverdelta.trainer.increment import Inputs, Learner, row_of, train
from riverdelta.trainer.layout import Row, arrange, bucket
from riverdelta.trainer.scoring import score, tiles

CHECKPOINTS = 5
RIVALS = ("base", "sequential", "ours", "retrain")
KINDS = ("fact", "ticket", "style")
LONGEST = 96
# How a rate falls, and whether weights are averaged: over one long training in a line and not, or as the default does.
SCHEDULES: dict[str, dict[str, float]] = {"linear": {"final": 0.1, "floor": 1.0, "average": 0.0}, "default": {}}
# Passes, rates and schedules among which retraining has its choice.
GRID = ((5, 2e-3, "linear"), (10, 5e-4, "linear"), (10, 1e-3, "linear"), (10, 1e-3, "default"))


@dataclass
class Life:
    """How one rival fares: weights as they are, tokens spent, and what was measured."""

    weights: AdapterWeights | None = None
    files: tuple[bytes | None, bytes | None] = (None, None)
    earlier: list[bytes | None] = field(default_factory=list)
    usual: list[Usual] = field(default_factory=list)
    compute: float = 0.0
    prequential: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    right: list[dict[str, float]] = field(default_factory=list)  # per kind, and of all
    then: dict[int, float] = field(default_factory=dict)  # per segment, its facts right after it was learned
    backward: float | None = None
    drifts: int = 0
    rejected: int = 0

    @property
    def told(self) -> Life:
        """Without weights and entries: what another process is told."""
        return replace(self, weights=None, files=(None, None), earlier=[])


class Bench:
    """One tenant, one base."""

    def __init__(self, base: Base, seed: int, segments: int, size: int) -> None:
        self.base, self.seed = base, seed
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
        return [row for one in asked if (row := row_of(self.base.tokenizer, one.content, LONGEST)) is not None]

    def losses(self, life: Life, asked: Sequence[Asked]) -> float:
        """The mean loss of some entries, in nats a token."""
        return fmean(each.loss for each in score(self.base, life.weights, self.rows(asked)))

    def recipe(self, optimiser: dict[str, float] | None = None, **training: Any) -> Recipe:
        """The default recipe, or what of it is said."""
        return Recipe.from_dict({"optimiser": optimiser or {}, "training": {"max_length": LONGEST, **training}})

    def examine(self, life: Life, checkpoint: int) -> None:
        """Ask everything of a checkpoint."""
        exam = self.exams[checkpoint]
        life.loss.append(self.losses(life, exam))
        hits = [
            right(self.base, life.weights, self.rows([one]), whole=one.kind != "style")  # a reply's words are drawn
            for one in exam
        ]
        known = {kind: [hit for hit, one in zip(hits, exam, strict=True) if one.kind == kind] for kind in KINDS}
        life.right.append({"all": fmean(hits), **{kind: fmean(each) for kind, each in known.items() if each}})

    def facts_of(self, segment: int) -> list[Asked]:
        """What a segment taught first and nothing has changed since, in other words."""
        return [self.tenant.ask(*key, 2) for key in self.known[segment] if key not in self.changed]

    def live(self, rival: str) -> Life:
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
        life.backward = self.backward(life)
        return life

    def learn(self, life: Life, recipe: Recipe, said: Sequence[Asked], gated: bool) -> None:
        """One increment."""
        entries = [one.content for one in said]
        inputs = Inputs(recipe, self.seed, entries, life.earlier, *life.files, life.usual)
        learner = Learner(self.base, inputs)
        gate = Gate(self.base, inputs, learner) if gated else None
        made = train(self.base, learner)
        life.compute += 3 * learner.tokens
        if gate is not None:
            judged = gate.judge()
            life.compute += 2 * sum(bucket(len(row.tokens)) for rows in gate.rows for row in rows)
            if judged.rejected:
                life.rejected += 1
                return
            life.usual += usual_of([judged.metrics])
            life.drifts += judged.metrics.get("drift", 0)
        life.files, life.weights = (made.weights, made.state), learner.weights
        life.earlier += entries

    def retrain(self, checkpoint: int, passes: int, rate: float, schedule: str) -> Life:
        """From the base, on all there is at a checkpoint; prequential losses are those of what comes after it."""
        until = (checkpoint + 1) * self.every
        life = Life()
        everything = [one for said in self.stream[:until] for one in said]
        recipe = self.recipe({"learning_rate": rate, **SCHEDULES[schedule]}, rehearse=0, passes=passes)
        self.learn(life, recipe, everything, gated=False)
        self.examine(life, checkpoint)
        life.prequential = [self.losses(life, said) for said in self.stream[until : until + self.every]]
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
def right(base: Base, weights: AdapterWeights | None, rows: Sequence[Row], whole: bool = True) -> float:
    """The share of rows whose whole answer greedy decoding gives or, not `whole`, of their tokens, each after the
    right ones."""
    hits = 0.0
    for row in rows:
        batch = arrange([[row]], filler=0)
        tokens, positions, keep, targets = (
            torch.tensor(values, device=base.device)
            for values in (batch.tokens, batch.positions, batch.keep, batch.targets)
        )
        member = Member(weights.pairs() if weights is not None else {}, len(batch.tokens))
        hidden = base.hidden(tokens, positions, [member], batch.blocks)[keep]
        agree = torch.cat(
            [(base.logits(places).argmax(-1) == wanted)[:n] for n, (places, wanted) in tiles(hidden, targets)]
        )
        hits += float(agree.all() if whole else agree.float().mean())
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


Job = tuple[int, str, int, int, float, str]  # tenant, rival, and for retraining checkpoint, passes, rate and schedule
_benches: dict[int, Bench] = {}


def begin(folder: Path, dtype: str, threads: int, given: tuple[int, int, int, int]) -> None:
    """In a process of its own: load the base and make the tenants."""
    base = Base.load(folder, dtype=dtype, threads=threads)
    tenants, seed, segments, size = given
    for number in range(tenants):
        _benches[number] = Bench(base, seed + number, segments, size)


def do(job: Job) -> tuple[Job, Life]:
    """Live a life, or a retraining's part of one."""
    number, rival, *how = job
    bench = _benches[number]
    life = bench.retrain(*how) if rival == "retrain" else bench.live(rival)
    return job, life.told


def main() -> None:
    """Run it and print a table, JSON last."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--quick", action="store_true", help="the small base, in five minutes")
    parser.add_argument("--base", type=Path, help="another base model's folder")
    parser.add_argument("--tenants", type=int, default=1)
    parser.add_argument("--segments", type=int, default=30)
    parser.add_argument("--size", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="processes, of one thread each")
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
    began = time.monotonic()
    shape = (given.tenants, given.seed, given.segments, given.size)
    last = CHECKPOINTS - 1
    tenants = range(given.tenants)
    jobs: list[Job] = [(n, "retrain", last, *how) for n in tenants for how in reversed(GRID)]
    jobs += [(n, rival, 0, 0, 0.0, "") for n in tenants for rival in ("ours", "sequential", "base")]
    done: dict[Job, Life] = {}
    context = multiprocessing.get_context("spawn")
    with context.Pool(given.jobs, begin, (folder, given.dtype, 1, shape)) as pool:

        def all_of(some: list[Job]) -> None:
            for job, life in pool.imap_unordered(do, some):
                done[job] = life
                told(f"{job}: loss {life.loss[-1]:.3f}")

        all_of(jobs)
        best = min(GRID, key=lambda how: fmean(done[n, "retrain", last, *how].loss[0] for n in tenants))
        all_of([(n, "retrain", checkpoint, *best) for n in tenants for checkpoint in reversed(range(last))])
    report(given, folder, done, best, time.monotonic() - began)


def again(done: dict[Job, Life], number: int, best: tuple[int, float, str]) -> Life:
    """A tenant's five retrainings as one life; before the first, it is the base's."""
    parts = [done[number, "retrain", checkpoint, *best] for checkpoint in range(CHECKPOINTS)]
    base = done[number, "base", 0, 0, 0.0, ""].prequential
    first = base[: len(base) // CHECKPOINTS]
    return Life(
        compute=sum(part.compute for part in parts),
        prequential=[*first, *(loss for part in parts[:-1] for loss in part.prequential)],
        loss=[part.loss[0] for part in parts],
        right=[part.right[0] for part in parts],
    )


def report(
    given: argparse.Namespace, folder: Path, done: dict[Job, Life], best: tuple[int, float, str], seconds: float
) -> None:
    """Keep the figures and the plot, print the table and the JSON."""
    tenants = range(given.tenants)
    lives = {rival: [done[n, rival, 0, 0, 0.0, ""] for n in tenants] for rival in RIVALS[:3]}
    lives["retrain"] = [again(done, n, best) for n in tenants]
    loss = {rival: fmean(each for life in lives[rival] for each in life.loss) for rival in RIVALS}
    # To retrain at every segment costs as much a token as at a checkpoint, on 1 + 2 + ... segments.
    each = given.segments // CHECKPOINTS
    per_segment = sum(range(1, given.segments + 1)) / (each * sum(range(1, CHECKPOINTS + 1)))
    spent = {rival: sum(life.compute for life in lives[rival]) for rival in RIVALS}
    backward = [life.backward for life in lives["ours"] if life.backward is not None]
    rivals = {
        rival: {
            "loss": mean([life.loss for life in lives[rival]]),
            "right": mean([[exam["all"] for exam in life.right] for life in lives[rival]]),
            "kinds": {kind: round(fmean(life.right[-1][kind] for life in lives[rival]), 4) for kind in KINDS},
            "prequential": mean([life.prequential for life in lives[rival]]),
            "compute": spent[rival],
        }
        for rival in RIVALS
    }
    figures = {
        "base": folder.name,
        "dtype": given.dtype,
        "tenants": given.tenants,
        "segments": given.segments,
        "entries": given.size,
        "seconds": round(seconds, 1),
        "rivals": rivals,
        "retrain_choice": {"passes": best[0], "rate": best[1], "schedule": best[2]},
        "retrain_tried": [
            {
                "passes": passes,
                "rate": rate,
                "schedule": schedule,
                "loss": fmean(done[n, "retrain", CHECKPOINTS - 1, passes, rate, schedule].loss[0] for n in tenants),
            }
            for passes, rate, schedule in GRID
        ],
        "rejected": sum(life.rejected for life in lives["ours"]),
        "drifts": sum(life.drifts for life in lives["ours"]),
        "loss_vs_retrain_pct": round(100 * (loss["ours"] / loss["retrain"] - 1), 1),
        "compute_vs_retrain_pct": round(100 * spent["ours"] / spent["retrain"], 1),
        "compute_vs_retrain_every_segment_pct": round(100 * spent["ours"] / (spent["retrain"] * per_segment), 1),
        "backward_transfer": round(fmean(backward), 1) if backward else None,
    }
    name = "learning_quick" if given.quick else "learning"
    write_result(name, " ".join(["python -m benchmarks.learning", *sys.argv[1:]]), figures)
    plot(figures, RESULTS / f"{name}.png")
    print(f"{'':12s}{'loss':>8s}{'right':>8s}" + "".join(f"{kind:>8s}" for kind in KINDS) + f"{'compute':>10s}")
    for rival, held in rivals.items():
        kinds = "".join(f"{held['kinds'][kind]:8.1%}" for kind in KINDS)
        print(
            f"{rival:12s}{held['loss'][-1]:8.3f}{held['right'][-1]:8.1%}{kinds}{spent[rival] / spent['retrain']:10.2f}"
        )
    wanted = ("loss_vs_retrain_pct", "compute_vs_retrain_pct", "compute_vs_retrain_every_segment_pct")
    more = ("backward_transfer", "rejected", "drifts", "seconds")
    print(json.dumps({key: figures[key] for key in (*wanted, *more)}))


if __name__ == "__main__":
    main()
