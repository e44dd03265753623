"""What training many adapters in one step saves, beside the same steps with transformers + peft one after the other.

    python -m benchmarks.packed_training [--base gemma|tiny|FOLDER] [--device cpu|cuda] [--dtype float32] [--steps 2]
    python -m benchmarks.packed_training --shape 8b --device cuda --dtype bfloat16      # wants a GPU

1, 4 and 16 adapters (rank 16, all linear layers), each with its own rows, loss and AdamW: short rows (16 tokens, loss
on the last two) and long ones (64 tokens, loss on the last 8), 4 rows an adapter. The ways take turns; a step's time
is the median. `alone` is ours with a pack of one after the other; `loose` is ours packed without what keeps its bits
equal to alone (attention per adapter). `floor` is the base's products, forward and backward, at the rate of a large
product on this machine. On a CPU the peer computes in float32 whatever ours does, its fastest there. The last line is
JSON: `speedup_16` is peft's time over ours, short rows.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from benchmarks.machine import write_result
from riverdelta.app.gemma import gemma_folder
from riverdelta.core.recipe import Recipe
from riverdelta.core.template import IGNORE
from riverdelta.trainer import base as trainer_base
from riverdelta.trainer.base import Base
from riverdelta.trainer.increment import Inputs, Learner, step
from riverdelta.trainer.layout import Block, Row
from tests.tiny import make_tiny, make_tokenizer

ROWS = 4
LENGTHS = {"short": (16, 2), "long": (64, 8)}
RECIPE = Recipe.from_dict({"training": {"passes": 1, "steps": 1, "micro_batch": ROWS, "rehearse": 0}})


def rows_of(seed: int, length: int, learned: int, vocabulary: int) -> list[Row]:
    """Random rows with loss on their last tokens."""
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.randint(10, vocabulary, (ROWS, length), generator=draw).tolist()
    return [Row(tuple(row), (*[IGNORE] * (length - learned), *row[-learned:])) for row in tokens]


class Ours:
    """Learners that take the same micro-batch again and again."""

    def __init__(self, base: Base, adapters: int, length: int, learned: int) -> None:
        self._base = base
        filler: list[bytes | None] = [b'{"text":"a b c"}'] * ROWS
        self._learners = [Learner(base, Inputs(RECIPE, seed, filler)) for seed in range(adapters)]
        for seed, learner in enumerate(self._learners):
            learner.rows = list(rows_of(seed, length, learned, base.config.vocab_size))

    def packed(self) -> None:
        """One step of all."""
        self._rewind()
        step(self._base, self._learners)

    def alone(self) -> None:
        """A step of each."""
        self._rewind()
        for learner in self._learners:
            step(self._base, [learner])

    def loose(self) -> None:
        """One step of all, where bits may depend on the others."""
        with _loose():
            self.packed()

    def _rewind(self) -> None:
        for learner in self._learners:
            learner.place = 0


@contextmanager
def _loose() -> Iterator[None]:
    attend = trainer_base._attend

    def merged(*given: Any, blocks: Any = None, **named: Any) -> Any:
        rows = sum(block.rows for block in blocks)
        return attend(*given, blocks=[Block(0, rows, blocks[0].length)], **named)

    from transformers import AttentionInterface

    AttentionInterface.register(trainer_base.ATTENTION, merged)
    try:
        yield
    finally:
        AttentionInterface.register(trainer_base.ATTENTION, attend)


class Peft:
    """transformers + peft: one adapter set active, its step, the next; torch's fused AdamW."""

    def __init__(self, model: Any, adapters: int, length: int, learned: int, device: str) -> None:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        self._names = [f"a{number}" for number in range(adapters)]
        self._model = get_peft_model(model, config, adapter_name="a0")
        for name in self._names[1:]:
            self._model.add_adapter(name, config)
        self._learned = learned
        vocabulary = model.config.vocab_size
        self._tokens = [
            torch.tensor([row.tokens for row in rows_of(seed, length, learned, vocabulary)], device=device)
            for seed in range(adapters)
        ]
        self._optimisers = []
        for name in self._names:
            weights = [w for path, w in self._model.named_parameters() if f".{name}." in path]
            self._optimisers.append(torch.optim.AdamW(weights, lr=2e-3, betas=(0.9, 0.99), weight_decay=0, fused=True))

    def sequential(self) -> None:
        """A step of each adapter. Logits only where there is loss, as ours."""
        for name, tokens, optimiser in zip(self._names, self._tokens, self._optimisers, strict=True):
            self._model.set_adapter(name)
            out = self._model(input_ids=tokens, logits_to_keep=self._learned + 1, use_cache=False)
            logits = out.logits[:, :-1].float().reshape(-1, out.logits.shape[-1])
            loss = cross_entropy(logits, tokens[:, -self._learned :].reshape(-1))
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(optimiser.param_groups[0]["params"], 1.0)
            optimiser.step()

    def close(self) -> None:
        """Give the base back without adapters."""
        self._model.unload()


def timed(action: Callable[[], None], device: str) -> float:
    """Seconds of one call."""
    began = time.perf_counter()
    action()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def floor(base: Base, tokens: int, targets: int, device: str) -> float:
    """Seconds of the base's products alone in a step, at the rate of a large one."""
    dtype = getattr(torch, base.dtype)
    x, w = (torch.randn(*shape, device=device).to(dtype) for shape in ((1024, 2048), (2048, 2048)))
    rate = 2 * 1024 * 2048 * 2048 / min(timed(lambda: torch.nn.functional.linear(x, w), device) for _ in range(50))
    head = base._model.get_output_embeddings()
    sizes = [(site is head, site.in_features * site.out_features) for site in base.sites()]
    return sum(4 * size * (targets if is_head else tokens) for is_head, size in sizes) / rate


def load(given: argparse.Namespace, scratch: Path) -> tuple[Base, Any]:
    """The base as ours and, a second copy of it, as the peer holds it."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    dtype = torch.float32 if given.device == "cpu" else getattr(torch, given.dtype)
    if given.shape == "8b":
        trainer_base._fix_arithmetic(given.device, given.dtype, torch.get_num_threads())
        config = LlamaConfig(
            hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
            num_key_value_heads=8, vocab_size=128256, tie_word_embeddings=False,
        )  # fmt: skip
        with torch.device(given.device):
            torch.set_default_dtype(dtype)
            model = AutoModelForCausalLM.from_config(config)
            torch.set_default_dtype(torch.float32)
        peer = AutoModelForCausalLM.from_config(config, dtype=dtype).to(given.device)
        return Base(model, make_tokenizer(), "random", given.device, given.dtype, torch.get_num_threads()), peer
    if given.base == "tiny":
        folder = make_tiny("llama", scratch / "tiny")
    else:
        folder = gemma_folder(print) if given.base == "gemma" else Path(given.base)
    base = Base.load(folder, given.device, given.dtype)
    return base, AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(given.device)


def main() -> None:
    """Measure."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--base", default="gemma")
    options.add_argument("--shape", choices=["", "8b"], default="")
    options.add_argument("--device", default="cpu")
    options.add_argument("--dtype", default="float32")
    options.add_argument("--steps", type=int, default=2)
    options.add_argument("--adapters", type=int, nargs="+", default=[1, 4, 16])
    given = options.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        base, model = load(given, Path(scratch))
        for kind, (length, learned) in LENGTHS.items():
            for adapters in given.adapters:
                ours, peft = Ours(base, adapters, length, learned), Peft(model, adapters, length, learned, given.device)
                ways = {"packed": ours.packed, "alone": ours.alone, "loose": ours.loose, "peft": peft.sequential}
                times: dict[str, list[float]] = {way: [] for way in ways}
                for number in range(given.steps + 1):
                    for way, action in ways.items():
                        took = timed(action, given.device)
                        if number:  # the first warms up
                            times[way].append(took)
                peft.close()
                held = {f"{way}_s": round(median(each), 4) for way, each in times.items()}
                row = {"rows": kind, "tokens": length * ROWS, "adapters": adapters, **held}
                row["speedup"] = round(held["peft_s"] / held["packed_s"], 2)
                row["floor_s"] = round(
                    floor(base, row["tokens"] * adapters, learned * ROWS * adapters, given.device), 4
                )
                row["bits_cost_pct"] = round(100 * (held["packed_s"] / held["loose_s"] - 1), 1)
                rows.append(row)
                print(row, flush=True)
    last = max(given.adapters)
    figures = {
        "base": given.shape or given.base,
        "device": given.device,
        "dtype": given.dtype,
        "rows": rows,
        **{f"speedup_{row['adapters']}" + ("" if row["rows"] == "short" else "_long"): row["speedup"] for row in rows},
        "bits_cost_pct": next(row["bits_cost_pct"] for row in rows if row["adapters"] == last),
    }
    name = f"packed_training_{given.device if given.device != 'cpu' else given.dtype}"
    write_result(name, f"python -m benchmarks.packed_training --dtype {given.dtype}", figures)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
