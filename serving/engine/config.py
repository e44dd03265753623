"""What an engine may use: sequences, memory, adapters and the arithmetic it promises."""

from dataclasses import dataclass
from typing import Literal

from riverdelta.core.errors import BadInput


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Limits of one engine. Token counts include the prompt.

    `kv_blocks=None` sizes the cache for `max_batch` sequences of half of `max_model_len` each. `cpu_backend` names
    how the frozen linear layers are computed on a CPU ("auto" measures at start and takes the fastest whose
    answers agree with fp32; "fp32" is exact). `batch_invariant` promises the bits of a solo run for every
    sequence whatever its batch mates, at a price in speed; it needs an exact backend.
    """

    max_batch: int = 32
    block_size: int = 16
    kv_blocks: int | None = None
    max_model_len: int = 2048
    prefill_chunk: int = 128
    prefix_cache: bool = True
    adapter_slots: int = 64
    max_rank: int = 64
    host_adapter_bytes: int = 4 << 30
    max_queue: int = 1024
    device: str = "cpu"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    cpu_backend: str = "auto"
    batch_invariant: bool = False

    def __post_init__(self) -> None:
        for name in ("max_batch", "block_size", "max_model_len", "prefill_chunk", "adapter_slots", "max_rank"):
            if getattr(self, name) < 1:
                raise BadInput(f"The engine's {name} is {getattr(self, name)}.", "It must be at least 1.")
        if self.blocks * self.block_size < self.max_model_len:
            raise BadInput(
                f"{self.blocks} KV blocks of {self.block_size} tokens cannot hold {self.max_model_len} tokens.",
                f"Set kv_blocks to at least {-(-self.max_model_len // self.block_size)}, or lower max_model_len.",
            )
        if self.batch_invariant and self.prefill_chunk % self.block_size:
            raise BadInput(
                f"prefill_chunk={self.prefill_chunk} is no multiple of block_size={self.block_size}.",
                "Batch invariance shares prefixes at the boundaries of chunks: make it a multiple.",
            )

    @property
    def blocks(self) -> int:
        """KV blocks, however they were asked for."""
        if self.kv_blocks is not None:
            return self.kv_blocks
        per_sequence = -(-self.max_model_len // self.block_size)
        return max(per_sequence, self.max_batch * (per_sequence // 2 + 1))
