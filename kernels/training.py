"""Differentiable LoRA over several adapters in one batch, each computed as if it were alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def grouped_lora(
    x: Tensor, a: Sequence[Tensor], b: Sequence[Tensor], scales: Sequence[float], runs: Sequence[int]
) -> Tensor:
    """The LoRA part of a site for a batch whose rows belong to several adapters: ``scale * (x A^T) B^T`` per group.

    `x` [rows, in]; group i is the next `runs[i]` rows, with `a[i]` [rank_i, in] and `b[i]` [out, rank_i]; ranks may
    differ. Returns [rows, out], to be added to the frozen site's output. Gradients flow to x and to every A and B.

    Every product of a group has the group's own shape and freshly allocated operands, so the bits of its outputs and
    gradients depend neither on the other groups nor on how many there are.
    """
    if not len(a) == len(b) == len(scales) == len(runs):
        raise ValueError(f"{len(a)} A, {len(b)} B, {len(scales)} scales, {len(runs)} runs: give one of each per group")
    if sum(runs) != x.shape[0]:
        raise ValueError(f"runs sum to {sum(runs)} but x has {x.shape[0]} rows")
    out: Tensor = _GroupedLora.apply(x, tuple(scales), tuple(runs), *a, *b)  # type: ignore[no-untyped-call]
    return out


class _GroupedLora(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scales: tuple[float, ...], runs: tuple[int, ...], *weights: Tensor) -> Tensor:
        groups = len(runs)
        a, b = weights[:groups], weights[groups:]
        xs = _pieces(x, runs)
        hidden = [torch.mm(xi, ai.to(xi.dtype).t()) for xi, ai in zip(xs, a, strict=True)]
        out = [torch.mm(h, bi.to(h.dtype).t()).mul_(s) for h, bi, s in zip(hidden, b, scales, strict=True)]
        ctx.save_for_backward(x, *weights, *hidden)
        ctx.scales, ctx.runs = scales, runs
        return torch.cat(out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        groups = len(ctx.runs)
        x, *rest = ctx.saved_tensors
        a, b, hidden = rest[:groups], rest[groups : 2 * groups], rest[2 * groups :]
        grad_x: list[Tensor] = []
        grad_a: list[Tensor | None] = []
        grad_b: list[Tensor | None] = []
        wants = ctx.needs_input_grad
        for i, (xi, dy) in enumerate(zip(_pieces(x, ctx.runs), _pieces(grads[0], ctx.runs), strict=True)):
            dy = dy * ctx.scales[i]  # noqa: PLW2901
            dh = torch.mm(dy, b[i].to(dy.dtype))
            grad_a.append(torch.mm(dh.t(), xi).to(a[i].dtype) if wants[3 + i] else None)
            grad_b.append(torch.mm(dy.t(), hidden[i]).to(b[i].dtype) if wants[3 + groups + i] else None)
            if wants[0]:
                grad_x.append(torch.mm(dh, a[i].to(dh.dtype)))
        return (torch.cat(grad_x) if wants[0] else None, None, None, *grad_a, *grad_b)


def _pieces(x: Tensor, runs: tuple[int, ...]) -> list[Tensor]:
    # Copies, because a BLAS may sum in another order when an operand starts at another alignment.
    return [piece.clone(memory_format=torch.contiguous_format) for piece in torch.split(x, list(runs))]
