"""The base's frozen products, forward and backward, by means whose rows do not feel each other."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import linear

from riverdelta.kernels import PackedLinear

# Rows of a product on a GPU: where its arithmetic takes as long as reading the weights.
_TILE = 256


class FrozenProduct:
    """x W^T and y W in the dtype of W, for `weight` [out, in]; results are in the dtype of what comes in.

    On a CPU they are oneDNN's. `packed` keeps W reordered for both, at three times its memory: worth it where few rows
    meet many columns, as in the head. Elsewhere rows go in tiles of one size, as a library that chooses its kernel by
    the number of rows then chooses one.
    """

    def __init__(self, weight: Tensor, packed: bool) -> None:
        self.weight = weight
        self._onednn = weight.device.type == "cpu" and bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]
        self._packed: tuple[PackedLinear, PackedLinear] | None = None
        if packed and self._onednn:
            mode: Literal["bf16", "fp32"] = "bf16" if weight.dtype == torch.bfloat16 else "fp32"
            self._packed = (PackedLinear(weight, None, mode), PackedLinear(weight.t().contiguous(), None, mode))

    def __call__(self, x: Tensor) -> Tensor:
        """[rows, in] -> [rows, out], with a gradient to x."""
        out: Tensor = _Frozen.apply(x, self)  # type: ignore[no-untyped-call]
        return out

    def forward(self, x: Tensor) -> Tensor:
        """x W^T."""
        held = x.to(self.weight.dtype)
        if self._packed is not None:
            out = self._packed[0](held)
        elif self._onednn:
            out = _onednn(held, self.weight)
        else:
            out = _tiled(held, lambda tile: linear(tile, self.weight))
        return torch.as_tensor(out).to(x.dtype)

    def transposed(self, y: Tensor) -> Tensor:
        """y W."""
        held = y.to(self.weight.dtype).contiguous()
        if self._packed is not None:
            out = self._packed[1](held)
        elif self._onednn:
            out = _onednn(held, self.weight.t())
        else:
            out = _tiled(held, lambda tile: tile @ self.weight)
        return torch.as_tensor(out).to(y.dtype)


class _Frozen(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, product: FrozenProduct) -> Tensor:
        ctx.product = product
        return product.forward(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.product.transposed(grads[0]), None


def _onednn(x: Tensor, weight: Tensor) -> Tensor:
    return torch.as_tensor(torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], ""))


def _tiled(x: Tensor, product: Callable[[Tensor], Tensor]) -> Tensor:
    rows = x.shape[0]
    if rows % _TILE:
        x = torch.cat([x, x.new_zeros(_TILE - rows % _TILE, x.shape[1])])
    return torch.cat([product(tile) for tile in torch.split(x, _TILE)])[:rows]
