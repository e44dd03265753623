"""Thousands of adapters from one base: registered lazily, a few in device slots, nobody refused."""

import itertools
import statistics
import threading
import time

import pytest

from .conftest import Running, small_settings
from .hand import Hand, random_lora
from .test_swap import streamed

ADAPTERS, SLOTS, REQUESTS, ASKERS = 2000, 64, 3000, 16


def zipf(count):
    """Adapter numbers by a Zipf law of exponent 1, the same ones each time."""
    import torch

    weights = 1 / torch.arange(1, ADAPTERS + 1, dtype=torch.float64)
    drawn = torch.multinomial(weights, count, replacement=True, generator=torch.Generator().manual_seed(1))
    return drawn.tolist()


def first_tokens(running, numbers, digests):
    """Milliseconds to the first token of each request; every one must be answered by its adapter's own weights."""
    waits, wrong, turns = [], [], iter(list(numbers))
    lock = threading.Lock()

    def ask():
        while True:
            with lock:
                number = next(turns, None)
            if number is None:
                return
            began = time.monotonic()
            events = list(itertools.islice(streamed(running, f"tenant-{number}", max_tokens=4), 1))
            waits.append((time.monotonic() - began) * 1000)
            if not events or events[0].get("system_fingerprint") != digests[number]:
                wrong.append((number, events))

    threads = [threading.Thread(target=ask) for _ in range(ASKERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    return waits


@pytest.mark.soak
def test_two_thousand_adapters(tmp_path, tiny_base):
    settings = small_settings(tmp_path, tiny_base, adapter_slots=SLOTS, max_batch=16, max_queue=256)
    hand = Hand(settings)
    digests = []
    for number in range(ADAPTERS):
        name = hand.adapter(f"tenant-{number}")
        digests.append(hand.release(name, data=random_lora(number, rank=8)))
    running = Running(settings)
    try:
        spread = first_tokens(running, zipf(REQUESTS), digests)
        resident = first_tokens(running, [n % (SLOTS // 2) for n in range(REQUESTS // 4)], digests)
        listed = running.client.get("/v1/adapters").json()["data"]
    finally:
        running.stop()
    assert len(listed) == ADAPTERS
    assert sum(item["versions"][0]["tier"] == "device" for item in listed) <= SLOTS
    for what, waits in (("Zipf over 2,000", spread), ("resident", resident)):
        cuts = statistics.quantiles(waits, n=100)
        print(f"time to first token, {what}: p50 {cuts[49]:.1f} ms, p99 {cuts[98]:.1f} ms")
