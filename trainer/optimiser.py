"""AdamW over one adapter's weights, held as one flat vector: few operators a step, and always in the same order."""

import math

import torch
from torch import Tensor

from riverdelta.core.errors import Corrupt
from riverdelta.core.recipe import Optimiser
from riverdelta.core.weights import decode, encode


def rate_at(optimiser: Optimiser, position: int, progress: float) -> float:
    """The learning rate at a position (micro-batches since the adapter began, skipped ones counted), a share `progress`
    into its increment."""
    within = 1.0 - progress * (1.0 - optimiser.final)
    over_life = optimiser.floor + (1.0 - optimiser.floor) / (1.0 + optimiser.decay * position)
    return optimiser.learning_rate * within * over_life


class AdamW:
    """Moments of one flat float32 vector (Loshchilov and Hutter 2019), with gradients clipped by their norm.

    `position` counts micro-batches since the adapter began, `taken` the steps among them that had a gradient.
    """

    def __init__(self, recipe: Optimiser, size: int, device: torch.device) -> None:
        self.recipe = recipe
        self.m = torch.zeros(size, device=device)
        self.v = torch.zeros(size, device=device)
        self.position = 0
        self.taken = 0

    def skip(self) -> None:
        """Pass a micro-batch that has nothing to learn: the position moves, weights and moments do not."""
        self.position += 1

    def step(self, weights: Tensor, gradient: Tensor, progress: float) -> bool:
        """Move `weights` in place, a share `progress` into the increment; False, and nothing moves, where the gradient
        is not finite. Both are vectors of the moments' size; the gradient is used up."""
        r = self.recipe
        norm = torch.linalg.vector_norm(gradient)
        if not math.isfinite(size := float(norm)):
            return False
        rate = rate_at(r, self.position, progress)
        self.position += 1
        self.taken += 1
        # One pass over the four vectors, PyTorch's own.
        torch._fused_adamw_(
            [weights],
            [gradient],
            [self.m],
            [self.v],
            [],
            [torch.full((), float(self.taken), device=weights.device)],
            lr=rate,
            beta1=r.beta1,
            beta2=r.beta2,
            weight_decay=r.weight_decay,
            eps=r.epsilon,
            amsgrad=False,
            maximize=False,
            grad_scale=norm / r.clip if r.clip and size > r.clip else None,
        )
        return True

    def dump(self) -> tuple[bytes, str]:
        """The state file and its SHA-256."""
        return encode({"position": self.position, "taken": self.taken}, {"m": self.m, "v": self.v})

    def load(self, data: bytes, digest: str | None = None) -> None:
        """Take over a state file; `Corrupt` when it is not one of this adapter's shape."""
        held, tensors = decode(data, digest)
        if set(tensors) != {"m", "v"} or any(tensor.shape != self.m.shape for tensor in tensors.values()):
            raise Corrupt("The optimiser state does not fit its weights.", "Restore it from a backup.")
        self.m.copy_(tensors["m"])
        self.v.copy_(tensors["v"])
        self.position, self.taken = int(held["position"]), int(held["taken"])
