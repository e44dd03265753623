"""Batched multi-adapter LoRA and paged attention, for GPUs (Triton) and CPUs."""

from riverdelta.kernels.attention import paged_attention_decode
from riverdelta.kernels.cpu_linear import PackedLinear, choose_backend
from riverdelta.kernels.device import use_triton
from riverdelta.kernels.lora import lora_delta
from riverdelta.kernels.pool import LoraPool
from riverdelta.kernels.segments import Segments

__all__ = [
    "LoraPool",
    "PackedLinear",
    "Segments",
    "choose_backend",
    "lora_delta",
    "paged_attention_decode",
    "use_triton",
]
