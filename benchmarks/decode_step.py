"""One decode step of an 8B-shaped random Llama on a GPU: the engine's model in a CUDA graph, 0 to 32 adapters.

32 sequences with 512 tokens behind them, rank 16 on every linear layer. Against the same step without adapters
("base"), and against transformers + peft with the same shapes (its mixed batch, eager: it indexes with host lists,
which a graph cannot capture). Weights are random: only time is measured, and that our two LoRA paths agree.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Callable
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from torch import Tensor

from benchmarks.lora_kernels import machine
from riverdelta.kernels import Segments, lora
from riverdelta.kernels.timing import capture
from riverdelta.serving.engine import EngineConfig
from riverdelta.serving.engine.attention import StepContext
from riverdelta.serving.engine.head import Scores
from riverdelta.serving.engine.model import PagedModel

BATCH, CONTEXT, RANK, ADAPTERS = 32, 512, 16, (0, 1, 8, 32)
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RESULT = Path(__file__).parent / "results" / "decode_step.json"


def llama(layers: int) -> Any:
    """Llama-3-8B's shape with random weights, made on the GPU."""
    config = transformers.LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        max_position_embeddings=8192,
        rope_theta=500000.0,
        attn_implementation="sdpa",
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            return transformers.LlamaForCausalLM(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


def seconds(call: Callable[[], object], rounds: int) -> float:
    """Median device time of a call."""
    samples = []
    for _ in range(rounds):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        end.synchronize()
        samples.append(begin.elapsed_time(end) / 1e3)
    return median(samples)


class Ours:
    """The engine's model, its cache filled and an adapter in each of 32 slots."""

    def __init__(self, layers: int) -> None:
        config = EngineConfig(
            max_batch=BATCH,
            max_model_len=2 * CONTEXT,
            adapter_slots=max(ADAPTERS),
            max_rank=RANK,
            device="cuda",
            dtype="bfloat16",
        )
        self.model = PagedModel(llama(layers), config)
        gc.collect()
        torch.cuda.empty_cache()
        for pool in self.model.sites.values():
            for slot in range(pool.slots):
                a = [torch.randn(RANK, pool.in_features, device="cuda") * pool.in_features**-0.5 for _ in pool.parts]
                b = [torch.randn(width, RANK, device="cuda") * 0.02 for width in pool.parts]
                pool.write(slot, a, b, 2.0)
        size = config.block_size
        blocks = CONTEXT // size + 1
        tables = torch.randperm(BATCH * blocks, device="cuda", dtype=torch.int32).view(BATCH, blocks)
        self.tokens = torch.randint(0, self.model.vocab_size, (BATCH,), device="cuda")
        self.positions = torch.full((BATCH,), CONTEXT, device="cuda")
        places = tables[:, CONTEXT // size].long() * size + CONTEXT % size
        lengths = torch.full((BATCH,), CONTEXT + 1, dtype=torch.int32, device="cuda")
        self.context = StepContext(self.model.cache, places, tables, lengths)
        self.keep = torch.arange(BATCH, device="cuda")
        self.captured: list[Segments] = []
        self.logits([(-1, BATCH)])  # makes the cache's layers
        with torch.inference_mode():
            for pair in self.model.cache.layers.values():
                for cached in pair:
                    cached.normal_()

    def runs(self, adapters: int) -> list[tuple[int, int]]:
        return [(slot, BATCH // adapters) for slot in range(adapters)] if adapters else [(-1, BATCH)]

    def step(self, segments: Segments) -> Scores:
        return self.model.step(self.tokens, self.positions, self.context, segments, self.keep)

    def logits(self, runs: list[tuple[int, int]]) -> Tensor:
        return self.step(Segments.build(runs, "cuda")).logits(list(range(BATCH)))

    def graph(self, adapters: int) -> Callable[[], object]:
        """A captured step, whose segments must live as long."""
        segments = Segments.build(self.runs(adapters), "cuda")
        self.captured.append(segments)
        return capture([lambda: self.step(segments)]).replay

    def disagreement(self, adapters: int) -> float:
        """Relative difference of the logits when LoRA goes through PyTorch's operators instead of Triton."""
        runs = self.runs(adapters)
        triton_logits = self.logits(runs)
        chosen = lora.use_triton
        lora.use_triton = lambda _: False
        try:
            torch_logits = self.logits(runs)
        finally:
            lora.use_triton = chosen
        return float((triton_logits - torch_logits).norm() / torch_logits.norm())


def ours(layers: int) -> dict[str, Any]:
    """Milliseconds a step, and tokens/s relative to the base."""
    engine = Ours(layers)
    found: dict[str, Any] = {"disagreement": engine.disagreement(8)}
    replays = {n: engine.graph(n) for n in ADAPTERS}
    for replay in replays.values():
        replay()
    samples: dict[int, list[float]] = {n: [] for n in ADAPTERS}
    for _ in range(5):
        for n, replay in replays.items():
            samples[n].append(seconds(replay, 8))
    found["ms"] = {n: median(times) * 1e3 for n, times in samples.items()}
    found["of_base"] = {n: found["ms"][0] / ms for n, ms in found["ms"].items() if n}
    found["tokens_per_s"] = {n: BATCH / ms * 1e3 for n, ms in found["ms"].items()}
    return found


def peft_mixed(layers: int) -> dict[str, float]:
    """transformers + peft, eager: milliseconds a step with 0 adapters and with each count, mixed in one batch."""
    from peft import LoraConfig, get_peft_model

    model = llama(layers)
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=TARGETS, init_lora_weights=False)
    mixed = get_peft_model(model, config, adapter_name="0").eval()
    tokens = torch.randint(0, model.config.vocab_size, (BATCH, 1), device="cuda")
    cache = transformers.DynamicCache()
    shape = (BATCH, 8, CONTEXT, 128)
    for layer in range(layers):
        cache.update(*torch.randn(2, *shape, device="cuda", dtype=torch.bfloat16), layer)

    @torch.inference_mode()
    def step(names: list[str]) -> None:
        mixed(input_ids=tokens, past_key_values=cache, use_cache=True, adapter_names=names)
        cache.crop(-1)

    found: dict[str, float] = {}
    loaded = 1
    for adapters in ADAPTERS:
        while loaded < adapters:
            mixed.add_adapter(str(loaded), config)
            loaded += 1
        mixed.to(torch.bfloat16).eval()
        names = [str(i * adapters // BATCH) if adapters else "__base__" for i in range(BATCH)]
        step(names)
        found[str(adapters)] = seconds(lambda names=names: step(names), 3) * 1e3
    return found


def main() -> None:
    """Measure, keep the results, print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--no-peft", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    torch.manual_seed(0)
    found: dict[str, Any] = {"layers": args.layers, "batch": BATCH, "context": CONTEXT, "rank": RANK}
    found["ours"] = ours(args.layers)
    print(found, flush=True)
    gc.collect()
    torch.cuda.empty_cache()
    if not args.no_peft:
        import peft

        found["peft_ms"] = peft_mixed(args.layers)
        found["versions"] = {"transformers": transformers.__version__, "peft": peft.__version__}
    args.out.parent.mkdir(exist_ok=True)
    report = {"command": "python -m benchmarks.decode_step", "date": str(date.today()), "machine": machine()}
    args.out.write_text(json.dumps(report | found, indent=1) + "\n")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
