"""One adapter's LoRA weights as views of one flat vector, begun from a seed or from its parent's file."""

import math

import torch
from torch import Tensor

from riverdelta.core.digests import seed_of
from riverdelta.core.peft_format import check_servable
from riverdelta.core.weights import decode, encode

from .shape import LoraShape, shape_of

# Every matrix begins on a boundary of 64 bytes, so that products find it at one alignment always.
_ALIGN = 16


class AdapterWeights:
    """A and B of every target, float32, as views of `flat`."""

    def __init__(self, shape: LoraShape, device: torch.device) -> None:
        self.shape = shape
        sizes = [size for target in shape.targets for size in (target.a_shape, target.b_shape)]
        starts = [0]
        for rows, columns in sizes:
            starts.append(starts[-1] + -(-rows * columns // _ALIGN) * _ALIGN)
        self._spans = list(zip(starts, sizes, strict=False))
        self.flat = torch.zeros(starts[-1], device=device)
        self.leaves = self.views(self.flat)

    @classmethod
    def begin(cls, shape: LoraShape, seed: int, device: torch.device) -> "AdapterWeights":
        """A uniform as peft draws it (Kaiming, a = sqrt 5), but from the seed and the module's name; B zero."""
        held = cls(shape, device)
        with torch.no_grad():
            for target, leaf in zip(shape.targets, held.leaves[::2], strict=True):
                generator = torch.Generator().manual_seed(seed_of(seed, "lora_A", target.module))
                bound = 1.0 / math.sqrt(target.a_shape[1])
                leaf.copy_(torch.empty(target.a_shape).uniform_(-bound, bound, generator=generator))
        return held

    @classmethod
    def load(cls, data: bytes, device: torch.device) -> "AdapterWeights":
        """The weights in a version's file; `Corrupt` or `Unsupported` when they are not a LoRA's."""
        config, tensors = decode(data)
        shape = shape_of(config, tensors, check_servable(config, tensors))
        held = cls(shape, device)
        with torch.no_grad():
            for target, a, b in zip(shape.targets, held.leaves[::2], held.leaves[1::2], strict=True):
                a.copy_(tensors[target.a_key])
                b.copy_(tensors[target.b_key])
        return held

    def views(self, flat: Tensor) -> list[Tensor]:
        """A and B of every target, in turn, as views of a vector like `flat`."""
        return [flat[start : start + rows * columns].view(rows, columns) for start, (rows, columns) in self._spans]

    def pairs(self) -> dict[str, tuple[Tensor, Tensor, float]]:
        """Per module path, A [rank, in], B [out, rank] and the scale."""
        return {
            target.module: (a, b, target.scale)
            for target, a, b in zip(self.shape.targets, self.leaves[::2], self.leaves[1::2], strict=True)
        }

    def slopes(self, gradient: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Per module path, the places of A's and B's gradients in a vector like `flat`."""
        leaves = self.views(gradient)
        return {
            target.module: (a, b) for target, a, b in zip(self.shape.targets, leaves[::2], leaves[1::2], strict=True)
        }

    def dump(self) -> tuple[bytes, str]:
        """The version's file and its digest."""
        names = [name for target in self.shape.targets for name in (target.a_key, target.b_key)]
        return encode(self.shape.config, dict(zip(names, self.leaves, strict=True)))
