"""Greedy answers equal those of transformers' generate(), and of peft for adapters, alone and in mixed batches."""

import pytest

from . import models
from .conftest import Asker, tokens

FAMILIES = ["llama", "qwen3", "mistral", "gemma3"]


@pytest.mark.parametrize("family", FAMILIES)
def test_base_alone(engines, family):
    engine = engines(family)
    model = models.base(family)
    for seed, length in enumerate((1, 5, 23, 40)):
        prompt = models.prompt(seed, length)
        assert tokens(Asker(engine).submit(prompt, max_tokens=20)) == models.answer(model, prompt, 20)


@pytest.mark.parametrize("family", FAMILIES)
def test_mixed_batch_of_adapters(engines, family):
    engine = engines(family)
    fleet = {
        None: models.base(family),
        "a" * 64: models.adapter(family, 1, 4, models.LINEAR),
        "b" * 64: models.adapter(family, 2, 4, models.LINEAR),
        "c" * 64: models.adapter(family, 3, 8, ["q_proj", "v_proj"], use_rslora=True),
        "d" * 64: models.adapter(family, 4, 1, ["up_proj", "o_proj"]),
    }
    for digest, model in fleet.items():
        if digest is not None:
            engine.load(digest, lambda m=model: models.exported(m))
    asker = Asker(engine)
    asked = []
    for n in range(12):
        digest = list(fleet)[n % len(fleet)]
        prompt = models.prompt(n, 3 + 4 * (n % 7))
        asked.append((digest, prompt, asker.submit(prompt, digest, max_tokens=10 + n % 5)))
    for n, (digest, prompt, handle) in enumerate(asked):
        assert tokens(handle) == models.answer(fleet[digest], prompt, 10 + n % 5), (n, digest)
    assert any(models.answer(fleet["a" * 64], p, 8) != models.answer(fleet[None], p, 8) for _, p, _ in asked)
