"""The start-up check of batch invariance: the same sequences alone and together, on the real shapes, bit for bit.

Batch invariance after He et al., "Defeating nondeterminism in LLM inference" (2025).
"""

import torch
from torch import Tensor

from riverdelta.core.errors import Unsupported

from .adapters import DeviceTier, HostAdapter
from .blocks import BlockPool
from .config import EngineConfig
from .model import PagedModel
from .scheduler import Limits, Scheduler, Sequence
from .slots import SlotTable
from .step import build_step

# Without the promise, by backend: two tokens whose scores are closer than this may change places with the batch.
# In bf16 it is two steps of that format between 16 and 32.
MARGIN = {"fp32": 1e-3, "torch": 1e-3, "fp16w": 1e-2, "bf16": 0.25}

_ANSWER = 3
_RANKS = (2, 8, 16, 1)


def check_invariance(model: PagedModel, config: EngineConfig) -> None:
    """Raise `Unsupported` if any sequence's scores differ between running alone and with others."""
    longest = min(config.prefill_chunk + 7, config.max_model_len - _ANSWER)
    lengths = [min(n, longest) for n in (1, 2, 5, 16, 17, 40, longest, longest // 2)]
    ranks = [min(r, config.max_rank) for r in _RANKS[: config.adapter_slots]]
    tier = DeviceTier(model.sites)
    for slot, rank in enumerate(ranks):
        tier.write(slot, _random_adapter(model, slot, rank))
    try:
        alone: dict[tuple[int, int], Tensor] = {}
        for n in range(len(lengths)):
            alone |= _run(model, config, lengths, [n], len(ranks))
        together = _run(model, config, lengths, list(range(len(lengths))), len(ranks))
    finally:
        for slot in range(len(ranks)):
            tier.clear(slot)
        model.cache.zero(list(range(config.blocks)))
    different = {key for key, scores in alone.items() if not torch.equal(scores, together[key])}
    if different:
        raise Unsupported(
            f"This machine computes {len(different)} of {len(alone)} rows to other bits in a batch than alone.",
            "Start without batch_invariant, or with the exact CPU backend fp32.",
        )


def _run(
    model: PagedModel, config: EngineConfig, lengths: list[int], which: list[int], adapters: int
) -> dict[tuple[int, int], Tensor]:
    """The scores [vocab] of every answer position of the sequences `which`, scheduled as the engine would."""
    pool, slots = BlockPool(config.blocks), SlotTable(adapters)
    for slot in range(adapters):  # the table hands out slots in order
        slots.acquire(str(slot))
        slots.loaded(str(slot))
    scheduler = Scheduler(Limits.of(config), pool, slots)
    for n in which:
        tokens = [(7919 * n + 31 * i) % model.vocab_size for i in range(lengths[n])]
        digest = str(n % adapters) if n % 4 else None
        scheduler.add(Sequence(str(n), "", "", digest, str(n), tokens, len(tokens)))
    found: dict[tuple[int, int], Tensor] = {}
    while work := scheduler.plan():
        model.cache.zero(pool.drain_fresh())
        step = build_step(work, slots, model.cache, exact=True)
        scores = model.step(step.tokens, step.positions, step.context, step.segments, step.keep)
        logits = scores.logits(list(range(len(step.sampled))))
        scheduler.commit(step.work)
        for row, item in zip(logits, step.sampled, strict=True):
            seq = item.seq
            found[int(seq.request_id), seq.answer_len] = row.cpu()
            seq.tokens.append((seq.tokens[-1] + 1) % model.vocab_size)
            if seq.answer_len == _ANSWER:
                scheduler.finish(seq)
    return found


def _random_adapter(model: PagedModel, seed: int, rank: int) -> HostAdapter:
    generator = torch.Generator().manual_seed(seed)
    sites = {
        path: (
            torch.randn(rank, into, generator=generator).to(model.dtype) / into**0.5,
            torch.randn(out, rank, generator=generator).to(model.dtype) * 0.1,
            1.0,
        )
        for path, (into, out) in model.linears.items()
    }
    return HostAdapter(sites, rank, 0)
