"""Many mixed requests of 16 adapters, two more than there are slots: every answer is its own adapter's, token for
token, but where two tokens are closer than the stated margin."""

import random
import threading
from dataclasses import dataclass, field
from functools import cache

import pytest

from riverdelta.kernels.cpu_linear import has_bf16
from riverdelta.serving.engine import Engine
from riverdelta.serving.engine.invariance import MARGIN

from . import models
from .conftest import Asker, collect, tokens

ADAPTERS, PROMPTS, LONGEST = 16, 12, 10
DIGESTS = [f"{n:064x}" for n in range(ADAPTERS)]


@cache
def adapter(n: int):
    return models.exported(models.adapter("llama", n, (1, 4, 8)[n % 3], models.LINEAR if n % 2 else models.ATTENTION))


def prompt_of(number: int) -> list[int]:
    """Some prompts begin others, so that cached prefixes end everywhere."""
    return models.prompt(number % 4, 60)[: 1 + 17 * number % 53]


@dataclass
class Solo:
    """What an adapter says alone, each answer computed once: an engine that shares no prefix and no batch."""

    engine: Engine
    known: dict = field(default_factory=dict)

    def answer(self, digest: str, prompt: list[int]) -> list[tuple[int, dict[int, float]]]:
        """Each token with the scores of the likeliest ones."""
        key = digest, tuple(prompt)
        if key not in self.known:
            events, _ = collect(Asker(self.engine).submit(prompt, digest, max_tokens=LONGEST, logprobs=20))
            self.known[key] = [(e.token_id, dict(e.top_logprobs)) for e in events]
        return self.known[key]

    def margins(self, digest: str, prompt: list[int], answer: list[int]) -> list[float]:
        """By how much the answer's tokens were not the likeliest, wherever it left the solo answer."""
        found, at = [], 0
        while at < len(answer):
            solo = self.answer(digest, prompt + answer[:at])
            for token, (best, scores) in zip(answer[at:], solo, strict=False):
                at += 1
                if token != best:
                    found.append(scores[best] - scores.get(token, float("-inf")))
                    break
        return found


def run(engines, backend: str, requests: int) -> tuple[list[float], dict]:
    """Submit the requests from four threads, give some of them up, and compare each distinct answer once."""
    # Blocks for a third of what 32 of the longest hold, so that some are preempted.
    options = {
        "max_batch": 32,
        "kv_blocks": 160,
        "prefill_chunk": 64,
        "adapter_slots": 14,
        "host_adapter_bytes": 150_000,
    }
    engine = engines(cpu_backend=backend, **options)
    solo = Solo(engines(cpu_backend=backend, max_batch=1, prefix_cache=False, adapter_slots=ADAPTERS))
    for n, digest in enumerate(DIGESTS):
        engine.load(digest, lambda n=n: adapter(n))
        solo.engine.load(digest, lambda n=n: adapter(n))
    assert len({tuple(tokens(Asker(solo.engine).submit(prompt_of(3), digest))) for digest in DIGESTS}) == ADAPTERS
    answers: set[tuple[str, int, tuple[int, ...]]] = set()
    failures: list[BaseException] = []
    counts = iter(range(requests))
    lock = threading.Lock()

    def ask(number: int) -> None:
        rng, asker = random.Random(number), Asker(engine)
        asker.count = number * 10**9
        try:
            while True:
                batch = []
                with lock:
                    taken = [n for _, n in zip(range(16), counts, strict=False)]
                if not taken:
                    return
                for _ in taken:
                    n, which = rng.randrange(ADAPTERS), rng.randrange(PROMPTS)
                    handle = asker.submit(prompt_of(which), DIGESTS[n], max_tokens=rng.randint(1, LONGEST))
                    batch.append((DIGESTS[n], which, handle))
                    if rng.random() < 0.05:
                        handle.cancel()
                for digest, which, handle in batch:
                    events, end = collect(handle)
                    assert end.finish_reason in ("length", "cancelled"), end
                    assert {e.digest for e in events} <= {digest}
                    with lock:
                        answers.add((digest, which, tuple(e.token_id for e in events)))
        except BaseException as error:
            failures.append(error)
            raise

    askers = [threading.Thread(target=ask, args=(n,)) for n in range(4)]
    for thread in askers:
        thread.start()
    for thread in askers:
        thread.join()
    assert failures == []
    found = [m for digest, which, said in sorted(answers) for m in solo.margins(digest, prompt_of(which), list(said))]
    return found, engine.stats()


BF16 = pytest.mark.skipif(not has_bf16(), reason="this CPU has no bf16 arithmetic")


@pytest.mark.parametrize(
    ("backend", "requests"),
    [
        ("fp32", 400),
        pytest.param("fp32", 100_000, marks=[pytest.mark.soak, pytest.mark.timeout(3600)]),
        pytest.param("fp16w", 20_000, marks=[pytest.mark.soak, pytest.mark.timeout(3600)]),
        pytest.param("bf16", 20_000, marks=[pytest.mark.soak, pytest.mark.timeout(3600), BF16]),
    ],
)
def test_every_answer_is_its_own_adapters(engines, backend, requests):
    margins, stats = run(engines, backend, requests)
    print(f"{backend}: {requests} requests, {len(margins)} tokens differ, by {max(margins, default=0.0):.2g} at most")
    assert all(m <= MARGIN[backend] for m in margins), sorted(margins)[-5:]
    assert stats["preemptions"] > 0
    assert stats["totals"]["cached_tokens"] > 0
