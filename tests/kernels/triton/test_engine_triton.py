"""The serving engine decodes end to end through the Triton kernels."""

from __future__ import annotations

import pytest

from riverdelta.kernels import attention_triton, lora_triton
from riverdelta.serving.engine import Engine, EngineConfig, GenerationRequest, SamplingParams, TokenEvent
from riverdelta.serving.engine.model import PagedModel
from tests.serving.engine import models

ADAPTERS = {"a" * 64: (1, 8), "b" * 64: (2, 3)}


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_mixed_answers_equal_generate(family, device, monkeypatch):
    launched = {"lora": 0, "attention": 0}

    def counted(name, call):
        def run(*args):
            launched[name] += 1
            return call(*args)

        return run

    monkeypatch.setattr(lora_triton, "delta", counted("lora", lora_triton.delta))
    monkeypatch.setattr(attention_triton, "decode", counted("attention", attention_triton.decode))
    config = EngineConfig(
        max_batch=4,
        block_size=4,
        max_model_len=64,
        prefill_chunk=8,
        adapter_slots=2,
        max_rank=8,
        device=device,
        cpu_backend="fp32",
    )
    engine = Engine(PagedModel(models.base(family), config), models.tokenizer(), config)
    engine.start()
    try:
        wanted = {None: models.base(family)}
        for digest, (seed, rank) in ADAPTERS.items():
            wanted[digest] = models.adapter(family, seed, rank, models.LINEAR)
            engine.load(digest, lambda model=wanted[digest]: models.exported(model))
        prompt = models.prompt(3, 13)
        greedy = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True)
        handles = [
            engine.submit(GenerationRequest(request_id=str(n), prompt_ids=prompt, digest=digest, sampling=greedy))
            for n, digest in enumerate(wanted)
        ]
        for handle, model in zip(handles, wanted.values(), strict=True):
            assert [e.token_id for e in handle if isinstance(e, TokenEvent)] == models.answer(model, prompt, 5)
    finally:
        engine.stop()
    assert all(launched.values())
