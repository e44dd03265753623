"""The base's norms as a packed step computes them: a row's bits depend on that row alone, forward and backward."""

from typing import Any

import torch
from torch import Tensor, nn


class RowNorm(nn.Module):
    """RMS normalisation (Zhang and Sennrich 2019) by operators that round each element once.

    Others, which round a product and a sum together, may do so differently at the end of a vector, and so may sums over
    a row with the number of rows.
    """

    def __init__(self, gain: Tensor, eps: float) -> None:
        super().__init__()
        self.gain, self.eps = gain, eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> [..., width]."""
        out: Tensor = _Rms.apply(x, self.gain, self.eps)  # type: ignore[no-untyped-call]
        return out


def row_norm(norm: nn.Module) -> RowNorm | None:
    """The same as a base's RMS normalisation with one weight vector; None where a try shows that `norm` is another."""
    weight = getattr(norm, "weight", None)
    eps = getattr(norm, "eps", getattr(norm, "variance_epsilon", None))
    if not isinstance(weight, Tensor) or weight.dim() != 1 or not isinstance(eps, float):
        return None
    x = torch.randn(4, len(weight), generator=torch.Generator().manual_seed(0)).to(weight.device) * 3
    wanted = norm(x)
    for gain in (weight.detach(), 1.0 + weight.detach()):
        made = RowNorm(gain, eps)
        if torch.allclose(made(x), wanted, rtol=1e-5, atol=1e-6):
            return made
    return None


class _Rms(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, eps: float) -> Tensor:
        factor = _row_sums(x * x).div_(x.shape[-1]).add_(eps).sqrt_().reciprocal_()
        ctx.save_for_backward(x, gain, factor)
        return (x * factor).mul_(gain)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        x, gain, factor = ctx.saved_tensors
        slope = grads[0] * gain
        along = _row_sums(slope * x).mul_(factor).mul_(factor).mul_(factor).div_(x.shape[-1])
        return slope.mul_(factor).sub_(x * along), None, None


def _row_sums(x: Tensor) -> Tensor:
    """[..., width] -> [..., 1], by adding halves; may use `x` itself."""
    rest = None
    while (width := x.shape[-1]) > 1:
        half = width // 2
        if width % 2:
            last = x[..., 2 * half :]
            rest = last if rest is None else rest + last
        x = x[..., :half] + x[..., half : 2 * half]
    return x if rest is None else x + rest
