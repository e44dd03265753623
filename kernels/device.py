"""Which code path serves a tensor."""

from __future__ import annotations

import os

import torch
from torch import Tensor


def use_triton(x: Tensor) -> bool:
    """Triton on GPUs, and on CPUs where TRITON_INTERPRET=1 asks for its interpreter (whose bfloat16 dot is wrong)."""
    return x.is_cuda or (os.environ.get("TRITON_INTERPRET") == "1" and x.dtype != torch.bfloat16)
