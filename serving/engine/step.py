"""From a plan to tensors: rows in order, where they live in the cache, which adapter each has, which to sample."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from riverdelta.kernels import Segments

from .attention import Chunk, KVCache, StepContext
from .scheduler import Work
from .slots import SlotTable


@dataclass(frozen=True, slots=True)
class Step:
    """One packed forward. `sampled` is the work whose logits the step returns, in that order."""

    work: list[Work]
    tokens: Tensor
    positions: Tensor
    context: StepContext
    segments: Segments
    keep: Tensor
    sampled: list[Work]


def build_step(work: Sequence[Work], slots: SlotTable, cache: KVCache, exact: bool = False) -> Step:
    """Decoding sequences first, then chunks, each by slot, so that equal adapters lie side by side.

    `exact`: compute every row as it would be computed alone.
    """

    def slot(item: Work) -> int:
        found = None if item.seq.digest is None else slots.slot(item.seq.digest)
        return -1 if found is None else found

    order = sorted(work, key=lambda w: (w.count > 1, slot(w)))
    decodes = [w for w in order if w.count == 1]
    size, device = cache.block_size, cache.device
    tokens: list[int] = []
    positions: list[int] = []
    places: list[int] = []
    runs: list[tuple[int, int]] = []
    keep: list[int] = []
    chunks = []
    for item in order:
        blocks, first = item.seq.blocks, len(tokens)
        span = range(item.start, item.start + item.count)
        tokens += item.seq.tokens[item.start : item.start + item.count]
        positions += span
        places += [blocks[p // size] * size + p % size for p in span]
        if item.count > 1:
            seen = _flat(blocks, item.start + item.count, size, device)
            chunks.append(Chunk(first, item.count, item.start, seen))
        at = slot(item)
        # On a CPU a row's bits can depend on its place in its run: exact, each sequence is a run of its own.
        if runs and runs[-1][0] == at and not (exact and device.type == "cpu"):
            runs[-1] = (at, runs[-1][1] + item.count)
        else:
            runs.append((at, item.count))
        if item.samples:
            keep.append(len(tokens) - 1)
    width = max((len(w.seq.blocks) for w in decodes), default=0)
    tables = [w.seq.blocks + [0] * (width - len(w.seq.blocks)) for w in decodes]
    context = StepContext(
        cache=cache,
        positions=torch.tensor(places, device=device),
        tables=torch.tensor(tables, dtype=torch.int32, device=device).view(len(decodes), width),
        lengths=torch.tensor([w.start + 1 for w in decodes], dtype=torch.int32, device=device),
        chunks=chunks,
        exact=exact,
    )
    return Step(
        work=order,
        tokens=torch.tensor(tokens, device=device),
        positions=torch.tensor(positions, device=device),
        context=context,
        segments=Segments.build(runs, device, exact=exact),
        keep=torch.tensor(keep, dtype=torch.int64, device=device),
        sampled=[w for w in order if w.samples],
    )


def _flat(blocks: Sequence[int], length: int, size: int, device: torch.device) -> Tensor:
    """Flat cache positions of tokens 0 to `length`."""
    starts = torch.tensor(blocks[: -(-length // size)], device=device) * size
    return (starts[:, None] + torch.arange(size, device=device)).flatten()[:length]
