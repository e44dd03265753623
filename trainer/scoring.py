"""Losses without learning: what weights make of rows, a function of both alone."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from .adapter import AdapterWeights
from .base import Base, Member
from .layout import Row, arrange, bucket

# Rows of logits held at once, and the multiple that their number is filled up to, as how a row is summed may depend on
# how many there are: on a CPU only below 8, on a GPU always.
LOGIT_ROWS = 24
_LOGIT_TILE = {"cpu": 8}
# What one pass through the base takes at most.
_PASS_TOKENS = 2048


def tiles(hidden: Tensor, *others: Tensor) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
    """`hidden` [targets, width] and what belongs to its rows, some rows at a time, filled up to a tile: how many rows
    count, and the parts."""
    tile = _LOGIT_TILE.get(hidden.device.type, LOGIT_ROWS)
    for first in range(0, hidden.shape[0], LOGIT_ROWS):
        rows = min(LOGIT_ROWS, hidden.shape[0] - first)
        spare = -rows % tile
        yield (
            rows,
            tuple(
                pad(part[first : first + rows], [0, 0] * (part.dim() - 1) + [0, spare]) for part in (hidden, *others)
            ),
        )


class Score(NamedTuple):
    """Means over a row's targets, in nats a token: its loss, and how far that lies above the loss that the model itself
    expected, which is the entropy of its predictions. A model that is calibrated is not surprised by what is new to it;
    it is by what contradicts it."""

    loss: float
    surprise: float


@torch.no_grad()
def score(base: Base, weights: AdapterWeights | None, rows: Sequence[Row]) -> list[Score]:
    """The score of each row; `weights` None is the base itself."""
    scores: list[Score] = []
    for some in _passes(rows):
        batch = arrange([some], filler=0)
        tokens, positions, keep, targets = (
            torch.tensor(values, device=base.device)
            for values in (batch.tokens, batch.positions, batch.keep, batch.targets)
        )
        member = Member(weights.pairs() if weights is not None else {}, len(batch.tokens))
        hidden = base.hidden(tokens, positions, [member], batch.blocks)[keep]
        losses = torch.cat([_losses(base, places, wanted)[:n] for n, (places, wanted) in tiles(hidden, targets)])
        # The layout puts rows of one bucket side by side; the scores go back to the rows' own order.
        order = sorted(range(len(some)), key=lambda place: (bucket(len(some[place].tokens)), place))
        parts = torch.split(losses.double().cpu(), [some[place].targets for place in order])
        means = {place: Score(*(part.sum(0) / len(part)).tolist()) for place, part in zip(order, parts, strict=True)}
        scores += [means[place] for place in range(len(some))]
    return scores


def _passes(rows: Sequence[Row]) -> Iterator[list[Row]]:
    some: list[Row] = []
    room = 0
    for row in rows:
        size = bucket(len(row.tokens))
        if some and size > room:
            yield some
            some = []
        if not some:
            room = _PASS_TOKENS
        some.append(row)
        room -= size
    if some:
        yield some


def _losses(base: Base, places: Tensor, wanted: Tensor) -> Tensor:
    """[rows, 2]: each place's loss, and that less its expectation."""
    likely = base.logits(places).float().log_softmax(-1)
    loss = -likely[torch.arange(len(wanted), device=wanted.device), wanted]
    return torch.stack([loss, loss + (likely.exp() * likely).sum(-1)], -1)
