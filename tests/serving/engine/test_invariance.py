"""Batch invariance: the same log-probabilities, to the last bit, whatever else is in the batch or in the cache."""

import random

import pytest

from riverdelta.core.errors import Unsupported
from riverdelta.serving.engine import EngineConfig
from riverdelta.serving.engine.invariance import check_invariance
from riverdelta.serving.engine.model import PagedModel

from . import models
from .conftest import SMALL, Asker, collect

DIGESTS = [None, "a" * 64, "b" * 64, "c" * 64]


def bits(handle):
    events, end = collect(handle)
    assert end.finish_reason == "length"
    return [(e.token_id, e.logprob, e.top_logprobs) for e in events]


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_answers_are_those_of_solo_runs_to_the_bit(engines, family):
    chosen = {"batch_invariant": True, "max_batch": 8, "prefill_chunk": 8, "kv_blocks": 60}
    alone, mixed = engines(family, **chosen, prefix_cache=False), engines(family, **chosen)
    for n, digest in enumerate(DIGESTS[1:]):
        adapter = models.exported(models.adapter(family, n, 2 + 3 * (n % 2), models.LINEAR))
        alone.load(digest, lambda a=adapter: a)
        mixed.load(digest, lambda a=adapter: a)
    rng = random.Random(1)
    asked = []
    for n in range(24):
        # Some prompts are prefixes of others, so that the cache is used at every kind of boundary.
        prompt = models.prompt(n % 3, 40)[: rng.randint(1, 40)]
        digest = rng.choice(DIGESTS)
        params = {"logprobs": 3, "max_tokens": rng.randint(1, 20), "temperature": rng.choice([0.0, 0.9]), "seed": n}
        asked.append((prompt, digest, params, Asker(mixed).engine))
    asker = Asker(mixed)
    handles = [asker.submit(p, d, **params) for p, d, params, _ in asked]
    together = [bits(h) for h in handles]
    assert mixed.stats()["totals"]["cached_tokens"] > 0
    assert mixed.stats()["preemptions"] > 0
    solo = Asker(alone)
    assert together == [bits(solo.submit(p, d, **params)) for p, d, params, _ in asked]


def test_the_start_up_check_passes():
    config = EngineConfig(**SMALL, cpu_backend="fp32", batch_invariant=True)
    check_invariance(PagedModel(models.base("mistral"), config), config)


def test_a_model_whose_rows_depend_on_their_mates_is_refused(monkeypatch):
    config = EngineConfig(**SMALL, cpu_backend="fp32", batch_invariant=True)
    model = PagedModel(models.base("llama"), config)
    site = model.hf.model.layers[1].mlp.down_proj
    forward = site.forward
    monkeypatch.setattr(site, "forward", lambda x: forward(x) * (1 + 1e-6 * (x.shape[1] > 4)))
    with pytest.raises(Unsupported, match="other bits"):
        check_invariance(model, config)
