"""What sets two versions of an adapter apart: segments, recipe, metrics, and the distance of their weights."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from riverdelta.core import weights
from riverdelta.core.peft_format import check_servable
from riverdelta.core.store import ObjectStore, weights_key

from .ledger import Ledger, Line, VersionRecord
from .ledger.decisions import releasable

if TYPE_CHECKING:
    from torch import Tensor

    Product = tuple[Tensor, Tensor]  # scale · B and A: what a module's weights are changed by

_FURTHEST = 5


@dataclass(frozen=True)
class Difference:
    """Pairs are (first version, second version). `learned`: segments that only one of them learned, or on another
    parent. Sizes and distances are Frobenius norms of what the versions add to the base's weights, over all
    modules; `furthest` names the modules that lie furthest apart.
    """

    adapter: str
    versions: tuple[int, int]
    digests: tuple[str, str]
    common: tuple[int, ...]
    learned: tuple[tuple[int, ...], tuple[int, ...]]
    recipes: tuple[str, str]
    metrics: dict[str, tuple[Any, Any]]
    sizes: tuple[float, float]
    distance: float
    furthest: dict[str, float]


def difference(ledger: Ledger, store: ObjectStore, adapter: str, first: int, second: int) -> Difference:
    """Compare two versions, 0 being the base; `Refused` for one that is revoked or dropped, whose weights are gone."""
    a, b = _record(ledger, adapter, first), _record(ledger, adapter, second)
    versions = ledger.versions(adapter)
    learned_a, learned_b = Line.of(versions, first).trained, Line.of(versions, second).trained
    common = sorted(segment for segment, by in learned_a.items() if learned_b.get(segment) == by)
    products_a, products_b = _products(store, a), _products(store, b)
    apart = {module: _norm(products_a.get(module), products_b.get(module)) for module in {*products_a, *products_b}}
    figures_a, figures_b = _figures(a), _figures(b)
    return Difference(
        adapter,
        (first, second),
        (a.digest if a else "", b.digest if b else ""),
        tuple(common),
        (tuple(sorted(learned_a.keys() - common)), tuple(sorted(learned_b.keys() - common))),
        (a.recipe_digest if a else "", b.recipe_digest if b else ""),
        {name: (figures_a.get(name), figures_b.get(name)) for name in sorted({*figures_a, *figures_b})},
        (
            _total(_norm(each, None) for each in products_a.values()),
            _total(_norm(x, None) for x in products_b.values()),
        ),
        _total(apart.values()),
        {name: apart[name] for name in sorted(apart, key=lambda name: (-apart[name], name))[:_FURTHEST] if apart[name]},
    )


def _record(ledger: Ledger, adapter: str, number: int) -> VersionRecord | None:
    if number == 0:
        return None
    versions = ledger.versions(adapter)
    releasable(ledger.adapter(adapter), versions, number)
    return versions[number]


def _figures(record: VersionRecord | None) -> dict[str, Any]:
    """Single numbers among the metrics; of the curve of losses, its end."""
    held = dict(record.metrics) if record else {}
    curve = held.pop("losses", None)
    return {key: value for key, value in held.items() if isinstance(value, int | float)} | (
        {"last loss": curve[-1]} if curve else {}
    )


def _products(store: ObjectStore, record: VersionRecord | None) -> "dict[str, Product]":
    if record is None:
        return {}
    config, tensors = weights.decode(store.get(weights_key(record.digest)), record.digest)
    return {
        site.module: (tensors[site.b_key].double() * site.scale, tensors[site.a_key].double())
        for site in check_servable(config, tensors)
    }


def _norm(one: "Product | None", other: "Product | None") -> float:
    """The norm of a difference of products, from their small factors alone: ‖BA‖² = tr(BᵀB·AAᵀ)."""
    import torch

    parts = [(b * sign, a) for pair, sign in ((one, 1.0), (other, -1.0)) if pair is not None for b, a in [pair]]
    b, a = torch.cat([b for b, _ in parts], dim=1), torch.cat([a for _, a in parts])
    if one is not None and other is not None and all(torch.equal(x, y) for x, y in zip(one, other, strict=True)):
        return 0.0
    return math.sqrt(max(0.0, float(((b.T @ b) * (a @ a.T)).sum())))


def _total(norms: Iterable[float]) -> float:
    return math.hypot(*norms)
