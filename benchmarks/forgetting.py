"""What a forget costs by the number of shards, beside full replay and retraining, and what shards cost in learning.

A tenant of `tenants` lives through segments on the real ledger, store and trainer, once for each number of shards, at
the learning rate that suits it. Then 100 subjects, drawn uniformly, ask to be forgotten, each of an adapter that
knows all of them. The tokens that each rebuild takes are counted for all requests; for some of them the forget is
carried out on a copy of the folder: its tokens must be those counted, and the processor's time is measured.

Full replay trains every segment from the base on again, without the subject; retraining takes all that is left as one
segment. A second table drops clean states: one is kept every so many segments.

    python -m benchmarks.forgetting [--segments 8] [--size 32]
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

from benchmarks.learning import right
from benchmarks.machine import write_result
from benchmarks.small_base import small_base
from benchmarks.tenants import Asked, Tenant
from riverdelta.core import weights
from riverdelta.core.recipe import Recipe
from riverdelta.core.shards import shard_of
from riverdelta.core.store import weights_key
from riverdelta.registry.ledger.decisions import lineage
from riverdelta.trainer.adapter import AdapterWeights
from riverdelta.trainer.base import Base
from riverdelta.trainer.increment import Inputs, Learner, row_of, train
from riverdelta.trainer.layout import Row, bucket, plan
from riverdelta.trainer.parts import seed_of_shard
from riverdelta.trainer.replay import replay
from riverdelta.trainer.scoring import score
from tests.trainer.stack import Stack, hashed

COUNTS = (1, 4, 16)
# The better of two for one shard. The mean of many parts moves less than each of them, and wants more.
RATES = {1: (0.0015, 0.003), 4: (0.004,), 16: (0.01,)}
MEASURED = {1: 2, 4: 3, 16: 8}
SPACINGS = (1, 2, 4, 8)
LONGEST = 96


@dataclass(frozen=True)
class Said:
    """One entry and whom it is about."""

    subject: str
    asked: Asked


@dataclass
class Live:
    """An adapter that has learned everything: its folder, and how it fared."""

    folder: Path
    recipe: Recipe
    seed: int
    prequential: float
    loss: float
    right: float
    seconds: float
    learned: list[set[int]]  # per shard, the segments that it learned


def stream_of(seed: int, segments: int, size: int) -> tuple[list[list[Said]], list[Asked]]:
    """What a tenant says, and what it is asked afterwards, in a wording that was never taught."""
    tenant = Tenant(seed)
    stream = []
    for _ in range(segments):
        said = tenant.segment(size)
        names = sorted({subject for subject, _ in tenant.facts}, key=len, reverse=True)
        stream.append([Said(_whose(one, names), one) for one in said])
    keys = sorted(tenant.facts)
    return stream, [tenant.ask(*key, 2) for key in keys[:: max(1, len(keys) // 150)]]


def _whose(one: Asked, names: Sequence[str]) -> str:
    known = next((name for name in names if name in one.prompt), None)
    return known or one.prompt.split(":")[0].removeprefix("Ticket from ")


def recipe_of(count: int, rate: float, passes: int, size: int) -> Recipe:
    """The recipe with so many shards."""
    return Recipe.from_dict(
        {
            "training": {"max_length": LONGEST, "passes": passes},
            "optimiser": {"learning_rate": rate},
            "shards": {"count": count},
            "seal": {"count": size},
        }
    )


def settle(stack: Stack, base: Base) -> int:
    """Train all that waits; the tokens that it took."""
    worker = stack.worker(base)
    worker._exact = True  # the self-test is a start's cost, not a forget's
    while worker.turn():
        pass
    worker.close()
    return int(worker._metrics.tokens._value.get())


def live(
    base: Base, count: int, rate: float, stream: list[list[Said]], exam: list[Row], passes: int, folder: Path
) -> Live:
    """Learn the stream, a segment at a time."""
    stack, recipe = Stack(folder), recipe_of(count, rate, passes, len(stream[0]))
    stack.create("acme", recipe)
    began = time.process_time()
    for said in stream:
        stack.seal("acme", [one.asked.content for one in said], [one.subject for one in said])
        settle(stack, base)
    seconds = time.process_time() - began
    head, versions = stack.ledger.adapter("acme"), stack.ledger.versions("acme")
    line = [versions[number] for number in reversed(lineage(versions, head.tip))]
    made = AdapterWeights.load(stack.store.get(weights_key(line[-1].digest)), base.device)
    assert weights.decode(stack.store.get(weights_key(line[-1].digest)))[0]["r"] == recipe.lora.rank
    learned: list[set[int]] = [set() for _ in range(count)]
    for place, version in enumerate(line):
        for shard in range(count):
            was = line[place - 1].parts[shard].key if place and count > 1 else ""
            if count == 1 or version.parts[shard].key != was:
                learned[shard].add(version.segment or 0)
    stack.ledger.close()
    return Live(
        folder,
        recipe,
        head.seed,
        fmean(version.metrics["prequential"] for version in line),
        fmean(each.loss for each in score(base, made, exam)),
        right(base, made, exam),
        seconds,
        learned,
    )


@dataclass
class Cost:
    """Counts a rebuild's tokens from the plans of its increments."""

    sizes: list[list[int]]  # per segment and entry, the tokens that its row takes; 0 where it teaches nothing
    shards: list[list[int]]
    subjects: list[list[str]]

    def of(self, run: Live, shard: int, without: str, first: int, last: int) -> int:
        """Tokens to learn segments `first` to `last` (from 0) again, in one shard, without a subject."""
        training = run.recipe.of_a_shard.training
        seed = run.seed if run.recipe.shards.count == 1 else seed_of_shard(run.seed, shard)
        earlier: list[int] = []
        position = total = 0
        for number, sizes in enumerate(self.sizes[: last + 1]):
            mine = [
                0 if self.subjects[number][place] == without else size
                for place, size in enumerate(sizes)
                if self.shards[number][place] == shard
            ]
            if not mine or number + 1 not in run.learned[shard]:
                continue
            batches = plan(len(mine), len(earlier), training, seed, position)
            position += len(batches)
            if number >= first:
                total += sum(
                    sum(mine[slot] for slot in batch.slots) + sum(earlier[slot] for slot in batch.earlier)
                    for batch in batches
                    if any(mine[slot] for slot in batch.slots)
                )
            earlier += mine
        return total


def forget(base: Base, run: Live, subject: str) -> tuple[int, float]:
    """Carry a forget out on a copy of the folder: tokens and seconds until nothing waits."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(run.folder, folder, dirs_exist_ok=True)
        stack = Stack(Path(folder))
        began = time.process_time()
        stack.forget("acme", subject)
        tokens = settle(stack, base)
        seconds = time.process_time() - began
        stack.ledger.close()
    return tokens, seconds


def main() -> None:
    """Run it and print tables, JSON last."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--segments", type=int, default=8)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--passes", type=int, default=Recipe().training.passes)
    parser.add_argument("--requests", type=int, default=100)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    began = time.monotonic()

    def told(what: str) -> None:
        print(f"{time.monotonic() - began:6.0f} s  {what}", flush=True)

    base = Base.load(small_base(told), threads=given.threads)
    stream, asked = stream_of(0, given.segments, given.size)
    exam = [row for one in asked if (row := row_of(base.tokenizer, one.content, LONGEST)) is not None]
    subjects = [[one.subject for one in said] for said in stream]
    rows = [[row_of(base.tokenizer, one.asked.content, LONGEST) for one in said] for said in stream]
    sizes = [[bucket(len(row.tokens)) if row else 0 for row in some] for some in rows]
    everybody = sorted({subject for some in subjects for subject in some})
    requests = random.Random(0).sample(everybody, min(given.requests, len(everybody)))
    enters = {who: min(n for n, some in enumerate(subjects) if who in some) for who in requests}
    last = given.segments - 1
    table: dict[str, dict[str, Any]] = {}
    spaced: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        runs: dict[int, Live] = {}
        costs: dict[int, Cost] = {}
        for count in COUNTS:
            tried = []
            for rate in RATES[count]:
                run = live(base, count, rate, stream, exam, given.passes, Path(folder) / f"{count}-{rate}")
                tried.append(run)
                told(f"{count} shards, {rate}: prequential loss {run.prequential:.3f}, right {run.right:.1%}")
            runs[count] = min(tried, key=lambda run: run.prequential)
            shards = [[shard_of([hashed(who)], 0, count) for who in some] for some in subjects]
            costs[count] = Cost(sizes, shards, subjects)
        for count in COUNTS:
            run, cost = runs[count], costs[count]
            own = {who: shard_of([hashed(who)], 0, count) for who in requests}
            counted = [cost.of(run, own[who], who, enters[who], last) for who in requests]
            seconds, agree = [], 0
            some = list(range(0, len(requests), max(1, len(requests) // MEASURED[count])))[: MEASURED[count]]
            for place in some:
                tokens, took = forget(base, run, requests[place])
                agree += tokens == counted[place]
                seconds.append(took)
            told(f"{count} shards: {len(some)} forgets carried out, {agree} took the tokens counted")
            table[str(count)] = {
                "tokens": fmean(counted),
                "tokens_p95": sorted(counted)[int(0.95 * len(counted))],
                "seconds": fmean(seconds),
                "measured": len(some),
                "agree": agree,
                "prequential": run.prequential,
                "loss": run.loss,
                "right": run.right,
                "learning_seconds": run.seconds,
                "rate": run.recipe.optimiser.learning_rate,
            }
            spaced[str(count)] = {
                str(every): fmean(
                    sum(
                        cost.of(run, shard, who, enters[who] // every * every, last)
                        if shard == own[who] or every > 1
                        else 0
                        for shard in range(count)
                    )
                    for who in requests
                )
                for every in SPACINGS
            }
        run, cost = runs[1], costs[1]
        full = fmean(cost.of(run, 0, who, 0, last) for who in requests)
        who = requests[0]
        without: list[list[bytes | None]] = [
            [None if one.subject == who else one.asked.content for one in said] for said in stream
        ]
        at = time.process_time()
        replay(base, run.recipe, run.seed, without)
        full_seconds = time.process_time() - at
        told(f"full replay: {full_seconds:.0f} s")
        flat = [entry for some in without for entry in some]
        at = time.process_time()
        again = train(base, Learner(base, Inputs(run.recipe, run.seed, flat)))
        table["retrain"] = {
            "tokens": float(again.metrics["tokens"]),
            "seconds": time.process_time() - at,
            "right": right(base, AdapterWeights.load(again.weights, base.device), exam),
        }
        table["full replay"] = {"tokens": full, "seconds": full_seconds}
    figures: dict[str, Any] = {
        "segments": given.segments,
        "entries": given.size,
        "passes": given.passes,
        "requests": len(requests),
        "table": {
            name: {key: round(value, 4) if isinstance(value, float) else value for key, value in cell.items()}
            for name, cell in table.items()
        },
        "spacing_tokens": {name: {k: round(v) for k, v in cell.items()} for name, cell in spaced.items()},
        **{f"speedup_{count}": round(full / table[str(count)]["tokens"], 1) for count in COUNTS},
        **{f"speedup_seconds_{count}": round(full_seconds / table[str(count)]["seconds"], 1) for count in COUNTS},
        **{
            f"x_retraining_{count}": round(table["retrain"]["tokens"] / table[str(count)]["tokens"], 1)
            for count in COUNTS
        },
        "loss_delta_pct": round(100 * (runs[16].prequential / runs[1].prequential - 1), 1),
        "median_entry_segment": median(enters.values()),
        "seconds": round(time.monotonic() - began, 1),
    }
    write_result("forgetting", " ".join(["python -m benchmarks.forgetting", *sys.argv[1:]]), figures)
    print(f"{'':14s}{'tokens':>10s}{'seconds':>9s}{'preq.':>8s}{'right':>8s}")
    for name, cell in table.items():
        preq = f"{cell['prequential']:8.3f}" if "prequential" in cell else " " * 8
        shown = f"{cell['right']:8.1%}" if "right" in cell else ""
        print(f"{name:14s}{cell['tokens']:10.0f}{cell['seconds']:9.1f}{preq}{shown}")
    wanted = [f"{what}_{count}" for what in ("speedup", "speedup_seconds") for count in COUNTS]
    print(json.dumps({key: figures[key] for key in [*wanted, "loss_delta_pct", "seconds"]}))


if __name__ == "__main__":
    main()
