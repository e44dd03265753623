"""Batched multi-adapter LoRA and paged attention, for GPUs (Triton) and CPUs."""
