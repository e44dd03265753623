"""LoRA over several adapters in one batch for training, forward and backward, each computed as if it were alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# Bytes to which rows must be aligned for a group's part of a tensor to be worked on in its place.
_ALIGNED = 256


class Group(NamedTuple):
    """The next `rows` rows of a batch, and their adapter: A [rank, in], B [out, rank] and the scale."""

    a: Tensor
    b: Tensor
    scale: float
    rows: int


def grouped_lora(x: Tensor, groups: Sequence[Group], out: Tensor) -> list[Tensor]:
    """``out += scale * (x A^T) B^T`` per group, for `x` [rows, in] and `out` [rows, out]; ranks may differ.

    Returns each group's ``x A^T``, which `grouped_lora_backward` takes. Every product of a group has the group's own
    shape and operands at one alignment, so the bits of its outputs and gradients depend neither on the other groups nor
    on how many there are.
    """
    if sum(group.rows for group in groups) != x.shape[0]:
        raise ValueError(f"the groups have {sum(group.rows for group in groups)} rows, but x has {x.shape[0]}")
    hidden = []
    for group, xi, to in zip(groups, _pieces(x, groups), _places(out, groups), strict=True):
        hidden.append(torch.mm(xi, group.a.t()))
        _add(to, hidden[-1], group.b.t(), group.scale)
    return hidden


def grouped_lora_backward(
    x: Tensor,
    groups: Sequence[Group],
    hidden: Sequence[Tensor],
    slope: Tensor,
    slopes: Sequence[tuple[Tensor, Tensor]],
    slope_x: Tensor | None,
) -> None:
    """Add what `slope` [rows, out], the gradient of `grouped_lora`'s output, means for A and B to each group's pair of
    `slopes`, and what it means for x to `slope_x` [rows, in], where it is given."""
    to_x = [None] * len(groups) if slope_x is None else _places(slope_x, groups)
    pieces = zip(groups, hidden, _pieces(x, groups), _pieces(slope, groups), slopes, to_x, strict=True)
    for group, h, xi, dy, (slope_a, slope_b), to in pieces:
        dh = torch.mm(dy, group.b).mul_(group.scale)
        slope_a.addmm_(dh.t(), xi)
        slope_b.addmm_(dy.t(), h, alpha=group.scale)
        if to is not None:
            _add(to, dh, group.a, 1.0)


class _Place(NamedTuple):
    rows: Tensor
    aligned: bool


def _pieces(x: Tensor, groups: Sequence[Group]) -> Iterator[Tensor]:
    return (place.rows if place.aligned else place.rows.clone() for place in _places(x, groups))


def _places(x: Tensor, groups: Sequence[Group]) -> list[_Place]:
    # A BLAS may sum in another order when an operand starts at another alignment. Whether rows are aligned is a
    # matter of their width, never of where a group's rows begin.
    aligned = x.is_contiguous() and x.shape[1] * x.element_size() % _ALIGNED == 0
    return [_Place(rows, aligned) for rows in torch.split(x, [group.rows for group in groups])]


def _add(to: _Place, left: Tensor, right: Tensor, scale: float) -> None:
    if to.aligned:
        to.rows.addmm_(left, right, alpha=scale)
    else:
        to.rows.add_(torch.mm(left, right).mul_(scale))
