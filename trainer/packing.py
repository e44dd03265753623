"""Whether adapters trained side by side get, on this machine, the bits that each gets alone: tried, not assumed.

All that adapters share in a step are the base's frozen products, which compute a row from that row alone if the library
underneath keeps to it; on some machines and shapes it does not. Everything else in a step has the adapter's own shape.
"""

import json
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from riverdelta.core.recipe import Recipe

from .base import Base, Site
from .increment import Inputs, Learner, step

_ROWS = 320
_PLACES = ((0, 4), (4, 12), (0, 24), (8, 40), (40, 64), (20, 152), (56, 312))


def packs_exactly(base: Base) -> bool:
    """Try it: every product at its real shape, and whole steps of three unlike adapters, packed and alone."""
    return all(_rows_stand_alone(base, site) for site in _kinds(base)) and _steps_agree(base)


def _kinds(base: Base) -> Iterator[Site]:
    """One site of each shape."""
    seen: set[tuple[int, int]] = set()
    for site in base.sites():
        if (site.in_features, site.out_features) not in seen:
            seen.add((site.in_features, site.out_features))
            yield site


def _rows_stand_alone(base: Base, site: Site) -> bool:
    # The head's rows come by the dozen; its product over hundreds would cost seconds and memory to no purpose.
    head = site.out_features > 16 * site.in_features
    places = _PLACES[1:4] if head else _PLACES
    rows = 64 if head else _ROWS
    return _same_rows(site.product.forward, _noise(rows, site.in_features, base.device), places) and _same_rows(
        site.product.transposed, _noise(rows, site.out_features, base.device), places
    )


def _same_rows(product: Callable[[Tensor], Tensor], x: Tensor, places: tuple[tuple[int, int], ...]) -> bool:
    whole = product(x)
    return all(torch.equal(product(x[first:last].clone()), whole[first:last]) for first, last in places)


def _noise(rows: int, columns: int, device: torch.device) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows * columns)).to(device)


def _steps_agree(base: Base) -> bool:
    alone = [_learner(base, number) for number in range(3)]
    packed = [_learner(base, number) for number in range(3)]
    for learner in alone:
        step(base, [learner])
    step(base, packed)
    return all(
        torch.equal(one.weights.flat, other.weights.flat) and one.losses == other.losses
        for one, other in zip(alone, packed, strict=True)
    )


def _learner(base: Base, number: int) -> Learner:
    """Adapters of unlike ranks, with one to three rows of unlike lengths, about to take their only step."""
    lengths = ((1, 8, 30), (2,), (4, 16))[number]
    training = {"passes": 1, "steps": 1, "micro_batch": len(lengths), "rehearse": 0}
    recipe = Recipe.from_dict({"lora": {"rank": (16, 8, 4)[number]}, "training": training})
    entries = [json.dumps({"prompt": "and " * length, "completion": "so"}).encode() for length in lengths]
    learner = Learner(base, Inputs(recipe, number, entries))
    with torch.no_grad():  # a B of zeros would hide A's gradients
        for place, leaf in enumerate(learner.weights.leaves):
            leaf.copy_(torch.randn(leaf.shape, generator=torch.Generator().manual_seed(place)) * 0.01)
    return learner
