"""Engines over tiny models, started and stopped."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from riverdelta.serving.engine import Engine, EngineConfig, FinishEvent, GenerationRequest, SamplingParams, TokenEvent
from riverdelta.serving.engine.model import PagedModel

from . import models

torch.set_num_threads(1)

SMALL = {"max_batch": 6, "block_size": 4, "max_model_len": 96, "prefill_chunk": 8, "adapter_slots": 4, "max_rank": 8}


@pytest.fixture
def engines() -> Iterator[Callable[..., Engine]]:
    """Makes running engines: `engines("llama", max_batch=2)`."""
    made: list[Engine] = []

    def make(family: str = "llama", **options: Any) -> Engine:
        config = EngineConfig(**{**SMALL, "cpu_backend": "fp32", **options})
        engine = Engine(PagedModel(models.base(family), config), models.tokenizer(), config)
        engine.start()
        made.append(engine)
        return engine

    yield make
    for engine in made:
        engine.stop()


class Asker:
    """Submits greedy requests and collects answers."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.count = 0

    def submit(self, prompt: list[int], digest: str | None = None, **sampling: Any) -> Any:
        self.count += 1
        params = SamplingParams(**{"temperature": 0.0, "max_tokens": 12, "ignore_eos": True, **sampling})
        return self.engine.submit(
            GenerationRequest(request_id=f"r{self.count}", prompt_ids=prompt, digest=digest, sampling=params)
        )


def collect(handle: Any) -> tuple[list[TokenEvent], FinishEvent]:
    """All events of a handle."""
    events = list(handle)
    return events[:-1], events[-1]


def tokens(handle: Any) -> list[int]:
    """The answer's token ids."""
    return [e.token_id for e in collect(handle)[0]]
