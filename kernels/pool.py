"""The adapters' LoRA weights of one linear site, one slot per adapter version."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class SlotLayout:
    """What one slot holds, on the host: where each part's rank rows begin and end, and its scale."""

    offsets: tuple[int, ...]
    scales: tuple[float, ...]

    @property
    def rank(self) -> int:
        """Rank rows over all parts."""
        return self.offsets[-1]


class LoraPool:
    """Weights of one linear site, or of several that read the same input (q/k/v, gate/up): one *part* each.

    A site's output is the parts' outputs side by side, widths ``parts``. A slot keeps each part at its true rank:
    ``a[slot]`` stacks the parts' A row by row without gaps, ``b[slot]`` holds a block [max_rank, width] of transposed B
    per part, so that both matrices are read in whole contiguous rows and never beyond the rank.

    Shapes: ``a`` [slots, n_parts * max_rank, in], ``b`` [slots, max_rank * out], ``offsets`` int32
    [slots, n_parts + 1], ``scales`` float32 [slots, n_parts].
    """

    def __init__(
        self,
        slots: int,
        in_features: int,
        out_features: int,
        max_rank: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        *,
        parts: Sequence[int] | None = None,
    ) -> None:
        """`parts`: the merged sites' output widths, which sum to `out_features`; None means one part."""
        widths = tuple(parts) if parts is not None else (out_features,)
        if sum(widths) != out_features or min(widths, default=0) < 1:
            raise ValueError(f"parts {widths} do not sum to out_features {out_features}; pass each site's width")
        if slots < 1 or max_rank < 1:
            raise ValueError(f"a pool needs slots >= 1 and max_rank >= 1, got {slots} and {max_rank}")
        self.slots, self.in_features, self.out_features = slots, in_features, out_features
        self.max_rank, self.parts, self.dtype = max_rank, widths, dtype
        self.device = torch.device(device)
        self.columns = tuple(sum(widths[:i]) for i in range(len(widths) + 1))
        self.host_columns = torch.tensor(self.columns)
        self.a = torch.zeros(slots, len(widths) * max_rank, in_features, dtype=dtype, device=device)
        self.b = torch.zeros(slots, max_rank * out_features, dtype=dtype, device=device)
        self.offsets = torch.zeros(slots, len(widths) + 1, dtype=torch.int32, device=device)
        self.scales = torch.zeros(slots, len(widths), dtype=torch.float32, device=device)
        self._empty = SlotLayout((0,) * (len(widths) + 1), (0.0,) * len(widths))
        self._layouts = [self._empty] * slots
        self._asked: tuple[object, tuple[SlotLayout, ...]] = (None, ())

    def layout(self, slot: int) -> SlotLayout:
        """What the slot holds; rank 0 when it is clear."""
        return self._layouts[slot]

    def layouts(self, runs: tuple[tuple[int, int], ...]) -> tuple[SlotLayout, ...]:
        """What each run's slot holds."""
        asked = self._asked  # a thread that fills another slot may replace it
        if asked[0] is not runs:  # the same step asks again and again
            asked = (runs, tuple(self._empty if slot < 0 else self._layouts[slot] for slot, _ in runs))
            self._asked = asked
        return asked[1]

    def part_b(self, part: int) -> Tensor:
        """The part's B of every slot, transposed: a view [slots, max_rank, width]."""
        begin, end = (self.max_rank * column for column in self.columns[part : part + 2])
        return self.b[:, begin:end].view(self.slots, self.max_rank, self.parts[part])

    def write(
        self,
        slot: int,
        a: Tensor | Sequence[Tensor | None],
        b: Tensor | Sequence[Tensor | None],
        scale: float | Sequence[float],
    ) -> None:
        """Fill a clear slot: A [rank, in], B [out, rank], their product times `scale`.

        A merged pool takes one A, B and scale per part, None where the adapter leaves that part alone; ranks may
        differ. A slot's weights are immutable: writing to one that is not clear is an error.
        """
        if self._layouts[slot] != self._empty:
            raise ValueError(f"slot {slot} holds weights, which are immutable; clear() it once nothing refers to it")
        a_parts = [a] if isinstance(a, Tensor) else list(a)
        b_parts = [b] if isinstance(b, Tensor) else list(b)
        scales = [float(s) for s in scale] if isinstance(scale, Sequence) else [float(scale)] * len(self.parts)
        if not len(a_parts) == len(b_parts) == len(scales) == len(self.parts):
            raise ValueError(f"this site merges {len(self.parts)} parts; give an A, a B and a scale for each")
        offsets = [0]
        for part, (pa, pb) in enumerate(zip(a_parts, b_parts, strict=True)):
            offsets.append(offsets[-1] + self._check(part, pa, pb))
        for part, (pa, pb) in enumerate(zip(a_parts, b_parts, strict=True)):
            if pa is None or pb is None:
                continue
            begin, end = offsets[part], offsets[part + 1]
            self.a[slot, begin:end].copy_(pa, non_blocking=True)
            self.part_b(part)[slot, : end - begin].copy_(pb.to(self.device, non_blocking=True).t())
        self._set_layout(slot, SlotLayout(tuple(offsets), tuple(scales)))

    def clear(self, slot: int) -> None:
        """Forget what the slot held, weights included, so that it can be written again."""
        self.a[slot].zero_()
        self.b[slot].zero_()
        self._set_layout(slot, self._empty)

    def _set_layout(self, slot: int, layout: SlotLayout) -> None:
        self._layouts[slot] = layout
        self._asked = (None, ())
        self.offsets[slot].copy_(torch.tensor(layout.offsets, dtype=torch.int32))
        self.scales[slot].copy_(torch.tensor(layout.scales, dtype=torch.float32))

    def _check(self, part: int, a: Tensor | None, b: Tensor | None) -> int:
        if a is None or b is None:
            if a is not b:
                raise ValueError(f"part {part} has only one of A and B; give both, or None for both")
            return 0
        rank = a.shape[0]
        if tuple(a.shape) != (rank, self.in_features) or tuple(b.shape) != (self.parts[part], rank):
            raise ValueError(
                f"part {part} wants A [r, {self.in_features}] and B [{self.parts[part]}, r], "
                f"got {list(a.shape)} and {list(b.shape)}"
            )
        if not 1 <= rank <= self.max_rank:
            raise ValueError(f"rank {rank} does not fit this pool's max_rank {self.max_rank}; build a larger pool")
        return rank
