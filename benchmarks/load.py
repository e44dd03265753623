"""Engines under load in this process: bases, random adapters, and clients that keep requests in flight."""

from __future__ import annotations

import itertools
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers

from riverdelta.core import weights
from riverdelta.serving.engine import Engine, EngineConfig, FinishEvent, GenerationRequest, SamplingParams, TokenEvent
from tests.serving.hand import Linears, random_lora
from tests.tiny import make_tiny

_ids = itertools.count()


def base_folder(base: str, scratch: Path) -> Path:
    """`tiny`: a random Llama in `scratch`; `gemma`: the demo's base; else a folder."""
    if base == "tiny":
        return make_tiny("llama", scratch / "base")
    if base == "gemma":
        from riverdelta.app.gemma import gemma_folder

        return gemma_folder()
    return Path(base)


def linears_of(base: Path) -> Linears:
    """The linear layers of a base, without its weights."""
    config = transformers.AutoConfig.from_pretrained(base)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings()
    return {
        path: (module.in_features, module.out_features)
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    }


def engine_of(base: Path, adapters: int, rank: int, **options: Any) -> tuple[Engine, list[str]]:
    """A started engine with random adapters of all linear layers, which it reads from memory as from a store."""
    engine = Engine.from_pretrained(base, EngineConfig(**{"max_model_len": 512, "max_rank": rank, **options}))
    linears = linears_of(base)
    digests = []
    for n in range(adapters):
        data, digest = random_lora(n, rank, 0.05, linears)
        engine.load(digest, lambda data=data, digest=digest: weights.decode(data, digest))
        digests.append(digest)
    engine.start()
    return engine, digests


def ask(engine: Engine, prompt: list[int], answer: int, digest: str | None, tenant: str = "", key: str = "") -> Any:
    """Submit a greedy request."""
    return engine.submit(
        GenerationRequest(
            request_id=f"{next(_ids)}",
            prompt_ids=prompt,
            digest=digest,
            sampling=SamplingParams(temperature=0.0, max_tokens=answer, ignore_eos=True),
            cache_salt=tenant,
            tenant=tenant,
            fairness_key=key,
        )
    )


def first_token(engine: Engine, *asked: Any) -> float | None:
    """Milliseconds from submitting a request to its first token, once it has ended; None if it failed."""
    began = time.monotonic()
    events = list(ask(engine, *asked))
    end, first = events[-1], events[0]
    if isinstance(end, FinishEvent) and end.finish_reason == "length" and isinstance(first, TokenEvent):
        return (first.emitted_at - began) * 1000
    return None


def in_parallel(clients: int, work: Callable[[int], None]) -> None:
    """Run `work(n)` in that many threads."""
    threads = [threading.Thread(target=work, args=(n,)) for n in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def prompts(seed: int, length: int, vocabulary: int) -> Iterator[list[int]]:
    """Random prompts without end; no two begin alike."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randint(3, vocabulary, (length,), generator=generator).tolist()


def percentile(values: list[float], share: int) -> float:
    """Of at least two values, rounded."""
    return round(statistics.quantiles(values, n=100, method="inclusive")[share - 1], 2)
