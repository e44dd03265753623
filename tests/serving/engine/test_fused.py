"""Decoder layers in one call: what the modules that they replace compute, with adapters, in any batch."""

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, MistralConfig, Qwen3Config

from riverdelta.kernels import Segments, native
from riverdelta.serving.engine import EngineConfig
from riverdelta.serving.engine.adapters import DeviceTier, HostAdapter
from riverdelta.serving.engine.attention import Chunk, StepContext
from riverdelta.serving.engine.fused import FusedLayer
from riverdelta.serving.engine.model import PagedModel

pytestmark = pytest.mark.skipif(
    native.products() is None, reason="this CPU has no bf16 arithmetic, or there is no C compiler"
)

SHAPE = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
}
FAMILIES = {
    "llama": LlamaConfig(**SHAPE, attention_bias=True),
    "qwen3": Qwen3Config(**SHAPE),
    "mistral": MistralConfig(**SHAPE, sliding_window=11),
    "gemma3": Gemma3TextConfig(
        **SHAPE,
        sliding_window=9,
        query_pre_attn_scalar=40,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
}
RANKS = (8, 3, 16, 1)


def model(family):
    torch.manual_seed(7)
    made = AutoModelForCausalLM.from_config(FAMILIES[family], dtype=torch.float32)
    with torch.no_grad():
        for p in made.parameters():
            p.normal_(0, 0.12) if p.ndim == 2 else p.add_(torch.randn_like(p) * 0.2)
    config = EngineConfig(max_batch=8, max_model_len=64, kv_blocks=40, adapter_slots=4, max_rank=16, cpu_backend="bf16")
    paged = PagedModel(made, config)
    tier, generator = DeviceTier(paged.sites), torch.Generator().manual_seed(1)
    for slot, rank in enumerate(RANKS):
        sites = {
            path: (torch.randn(rank, i, generator=generator) / 8, torch.randn(o, rank, generator=generator) / 4, 1.5)
            for n, (path, (i, o)) in enumerate(paged.linears.items())
            if slot != 1 or n % 3
        }
        tier.write(slot, HostAdapter(sites, rank, 0))
    return paged


@torch.inference_mode()
def step(paged, runs, whole):
    """A decode step of a row for each of `runs` (slot, rows), 20 to 20 + rows tokens behind them: the next hidden
    states and what the cache then holds. `whole`: by whole layers."""
    rows = sum(n for _, n in runs)
    generator = torch.Generator().manual_seed(5)
    for k, v in paged.cache.layers.values():
        k.copy_(torch.randn(k.shape, generator=generator))
        v.copy_(torch.randn(v.shape, generator=generator))
    tables = torch.arange(4 * rows, dtype=torch.int32).view(rows, 4)
    positions = torch.arange(20, 20 + rows)
    places = tables[torch.arange(rows), positions // 16] * 16 + positions % 16
    context = StepContext(paged.cache, places.long(), tables, (positions + 1).int())
    layers = paged.hf.model.layers
    fused = list(layers)
    try:
        if not whole:
            for n, layer in enumerate(fused):
                layers[n] = layer.inner
        paged.runtime.segments = Segments.build(runs, "cpu")
        ids = torch.randint(3, 512, (1, rows), generator=generator)
        out = paged.hf.get_decoder()(input_ids=ids, position_ids=positions[None], use_cache=False, paged=context)
    finally:
        for n, layer in enumerate(fused):
            layers[n] = layer
        paged.runtime.end_step()
    return out.last_hidden_state[0], [t.clone() for pair in paged.cache.layers.values() for t in pair]


@pytest.mark.parametrize("family", FAMILIES)
def test_whole_layers_compute_what_their_modules_do(family):
    paged = model(family)
    assert all(isinstance(layer, FusedLayer) for layer in paged.hf.model.layers)
    for runs in ([(-1, 1)], [(-1, 3), (0, 2)], [(0, 1), (1, 5), (2, 1), (3, 1)], [(2, 8)]):
        wanted, cached = step(paged, runs, whole=False)
        got, filled = step(paged, runs, whole=True)
        assert (got - wanted).norm() / wanted.norm() < 2e-2, runs
        for one, other in zip(filled, cached, strict=True):
            assert (one.float() - other.float()).norm() / other.float().norm() < 1e-2


def test_a_rows_bits_are_its_own():
    paged = model("gemma3")
    mates, _ = step(paged, [(-1, 2), (0, 3), (2, 3)], whole=True)
    others, _ = step(paged, [(-1, 2), (1, 6)], whole=True)
    assert torch.equal(mates[:2], others[:2])
    assert not torch.equal(mates[2:], others[2:])


def test_a_prompt_by_rows_fills_the_cache_as_by_chunks(monkeypatch):
    paged = model("mistral")
    blocks = torch.tensor([5, 2, 9, 30])
    flat = (blocks[:, None] * 16 + torch.arange(16)).flatten()
    tokens = torch.randint(3, 512, (45,), generator=torch.Generator().manual_seed(2))

    def run(limit):
        monkeypatch.setattr("riverdelta.serving.engine.attention._BY_ROW", limit)
        paged.cache.zero(list(range(40)))
        found = []
        for begin, end in ((0, 20), (20, 21), (21, 45)):
            at = torch.arange(begin, end)
            context = StepContext(
                paged.cache,
                flat[at],
                blocks[None, : -(-end // 16)].int()[: int(end == 21)],
                torch.tensor([end] * int(end == 21), dtype=torch.int32),
                [] if end == 21 else [Chunk(0, end - begin, begin, flat[:end])],
            )
            runs = [(2, 1)] if end == 21 else [(0, 5), (2, end - begin - 5)]
            scores = paged.step(tokens[at], at, context, Segments.build(runs, "cpu"), torch.arange(end - begin))
            found.append(scores.logits(list(range(end - begin))))
        return torch.cat(found), [t.clone() for pair in paged.cache.layers.values() for t in pair]

    wanted, cached = run(0)
    got, filled = run(10**6)
    assert (got - wanted).norm() / wanted.norm() < 2e-2
    for one, other in zip(filled, cached, strict=True):
        assert (one.float() - other.float()).norm() / other.float().norm() < 3e-2
