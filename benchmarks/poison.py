"""The gate among poison: what share of poisoned segments it keeps out, and how many good ones with them.

Tenants of `tenants` learn segment by segment, each on the last accepted version, as in the trainer. Among the good
segments, with updates and drift, lie poisoned ones: answers shuffled, one word over and over, labels flipped. The gate
and the recipe are the defaults; the base is small (`small_base`): its two million weights let hundreds of increments
take minutes.

    python -m benchmarks.poison [--tenants 10] [--good 38] [--poison 5] [--size 12] [--jobs 2]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import time
from collections import Counter
from collections.abc import Iterable
from typing import Any

from benchmarks.machine import write_result
from benchmarks.small_base import small_base
from benchmarks.tenants import Asked, Tenant, flipped, repeated, shuffled

POISON = ("shuffled", "repeated", "flipped")
RECIPE = {"training": {"max_length": 96}}  # the default otherwise
TOLERANCES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0)


def story(seed: int, good: int, poison: int) -> list[str]:
    """What each segment of a tenant is: good ones, of them three where the world moves and three full of updates, and
    poisoned ones once the tenant has learned something."""
    draw = random.Random(f"story {seed}")
    kinds = ["good"] * (good - 6) + ["drift"] * 3 + ["updates"] * 3
    draw.shuffle(kinds)
    bad = [POISON[(seed + turn) % 3] for turn in range(poison)]
    for each in bad:
        kinds.insert(draw.randrange(8, len(kinds) + 1), each)
    return kinds


def said(tenant: Tenant, kind: str, size: int, draw: random.Random) -> list[Asked]:
    """The entries of a segment."""
    if kind == "drift":
        tenant.drift()
    if kind == "flipped":
        return flipped([tenant.ticket()] * size, tenant)
    entries = tenant.segment(size, 0.4 if kind == "updates" else 0.1)
    return {"shuffled": shuffled, "repeated": repeated}.get(kind, lambda entries, _: entries)(entries, draw)


def live(given: tuple[int, int, int, int]) -> list[dict[str, Any]]:
    """One tenant's life under the gate: what it decided about each segment, and on what."""
    from riverdelta.core.recipe import Gate as Rules
    from riverdelta.core.recipe import Recipe
    from riverdelta.trainer.base import Base
    from riverdelta.trainer.drift import Usual
    from riverdelta.trainer.gate import Gate, usual_of
    from riverdelta.trainer.increment import Inputs, Learner, train
    from riverdelta.trainer.verdict import verdict

    seed, good, poison, size = given
    base = Base.load(small_base(), threads=1)
    recipe = Recipe.from_dict(RECIPE)
    tenant, draw = Tenant(seed), random.Random(f"poison {seed}")
    weights = state = None
    earlier: list[bytes | None] = []
    usual: list[Usual] = []
    told = []
    for number, kind in enumerate(story(seed, good, poison)):
        entries = [one.content for one in said(tenant, kind, size, draw)]
        inputs = Inputs(recipe, seed, entries, earlier, weights, state, usual)
        learner = Learner(base, inputs)
        gate = Gate(base, inputs, learner)
        made = train(base, learner)
        judged = gate.judge()
        assert judged.evidence is not None
        at = {t: bool(verdict(Rules(tolerance=t), judged.evidence)) for t in TOLERANCES}
        told.append(
            {"tenant": seed, "segment": number, "kind": kind, "why": judged.rejected, "at": at, **judged.metrics}
        )
        if not judged.rejected:
            weights, state = made.weights, made.state
            earlier += entries
            usual += usual_of([judged.metrics])
    return told


def share(hits: int, of: int) -> dict[str, Any]:
    """A share with its 95 % interval (Clopper and Pearson 1934)."""
    from scipy.stats import beta

    low = float(beta.ppf(0.025, hits, of - hits + 1)) if hits else 0.0
    high = float(beta.ppf(0.975, hits + 1, of - hits)) if hits < of else 1.0
    return {"count": hits, "of": of, "share": round(hits / of, 4), "low": round(low, 4), "high": round(high, 4)}


def counted(told: Iterable[dict[str, Any]], tolerance: float | None = None) -> dict[str, Any]:
    """Shares rejected of poison and of good; with a tolerance, as it would have decided on the same evidence."""
    rejected, all_ = Counter[str](), Counter[str]()
    for each in told:
        side = "poison" if each["kind"] in POISON else "all good"
        hit = bool(each["why"]) if tolerance is None else each["at"][tolerance]
        for key in (side, each["kind"]):
            all_[key] += 1
            rejected[key] += hit
    return {key: share(rejected[key], all_[key]) for key in sorted(all_)}


def tell(each: dict[str, Any]) -> None:
    """One segment on a line."""
    bound, worse = each.get("surprise_bound", float("nan")), each.get("earlier_worse", 0.0)
    wrong = bool(each["why"]) is not (each["kind"] in POISON)
    print(
        f"{each['tenant']:3d} {each['segment']:3d} {each['kind']:9s} surprise {each['surprise']:6.3f} "
        f"(bound {bound:6.3f}) new {each['prequential']:.2f} to {each['learned']:.2f} earlier worse {worse:.2f}"
        f"{' WRONG' if wrong else ''} {each['why']}",
        flush=True,
    )


def summary(told: list[dict[str, Any]], tenants: int) -> dict[str, Any]:
    """The figures of so many tenants."""
    kinds = counted(told)
    return {
        "base": "Llama of 2 million weights that has read other tenants' text",
        "recipe": RECIPE,
        "tenants": tenants,
        "blocked": kinds.pop("poison"),
        "wrongly_blocked": kinds.pop("all good"),
        "kinds": kinds,
        "curve": [
            {"tolerance": t, "blocked": c["poison"]["share"], "wrongly_blocked": c["all good"]["share"]}
            for t in TOLERANCES
            for c in [counted(told, t)]
        ],
    }


def main() -> None:
    """Run it and print the figures, JSON last."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--tenants", type=int, default=10)
    parser.add_argument("--good", type=int, default=38)
    parser.add_argument("--poison", type=int, default=5)
    parser.add_argument("--size", type=int, default=12)
    parser.add_argument("--jobs", type=int, default=2)
    given = parser.parse_args()
    small_base()
    began = time.monotonic()
    told: list[dict[str, Any]] = []
    report: dict[str, Any] = {}
    with multiprocessing.get_context("spawn").Pool(given.jobs) as pool:
        lives = [(seed, given.good, given.poison, given.size) for seed in range(given.tenants)]
        for done, life in enumerate(pool.imap_unordered(live, lives), start=1):
            told += life
            for each in life:
                tell(each)
            report = summary(told, done) | {"seconds": round(time.monotonic() - began, 1)}
            write_result("poison", "python -m benchmarks.poison", report)  # what is done stays, if the rest is not
    for line in report["curve"]:
        blocked, wrongly = line["blocked"], line["wrongly_blocked"]
        print(f"tolerance {line['tolerance']:.1f}: blocked {blocked:.1%}, wrongly {wrongly:.1%}")
    print(json.dumps({key: report[key] for key in ("blocked", "wrongly_blocked", "kinds", "seconds")}))


if __name__ == "__main__":
    main()
