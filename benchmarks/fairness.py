"""What a flood costs others: time to a tenant's first tokens alone, beside a neighbour who asks for as much, and beside
one who floods the server from many adapters at once.

The tenant's requests are few and short; the neighbour's prompts are longer than a step takes, so that its steps are as
expensive as they get. The phases take turns in one run. `flood_ratio` is the p99 beside the flood over the p99 beside
the neighbour who asks for as much: being alone is no tenant's right, being no worse off for another's greed is.

    python -m benchmarks.fairness [--base tiny|gemma|FOLDER] [--rounds 5]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

from benchmarks.load import ask, base_folder, engine_of, first_token, in_parallel, percentile, prompts
from benchmarks.machine import write_result
from riverdelta.serving.engine import Engine, QueueFull

CLIENTS, ANSWER, PROMPT = 2, 8, 24
NEIGHBOUR_PROMPT, NEIGHBOUR_ANSWER, FLOOD, FLOOD_ADAPTERS = 300, 32, 64, 8


def phase(engine: Engine, digests: list[str], neighbours: int, adapters: int, requests: int) -> list[float]:
    """The tenant's milliseconds to its first tokens while a neighbour keeps so many requests in flight."""
    stop, waits = threading.Event(), list[float]()
    vocabulary = engine.model.vocab_size

    def crowd(n: int) -> None:
        for prompt in prompts(1000 + n, NEIGHBOUR_PROMPT, vocabulary):
            if stop.is_set():
                return
            number = 1 + n % adapters
            try:
                list(ask(engine, prompt, NEIGHBOUR_ANSWER, digests[number], "neighbour", str(number)))
            except QueueFull:
                stop.wait(0.01)

    others = [threading.Thread(target=crowd, args=(n,)) for n in range(neighbours)]
    for thread in others:
        thread.start()
    stop.wait(1.0 if neighbours else 0.0)

    def client(n: int) -> None:
        for prompt, _ in zip(prompts(n, PROMPT, vocabulary), range(requests // CLIENTS), strict=False):
            waited = first_token(engine, prompt, ANSWER, digests[0], "tenant", "0")
            assert waited is not None, "a request failed"
            waits.append(waited)

    in_parallel(CLIENTS, client)
    stop.set()
    for thread in others:
        thread.join()
    return waits


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="tiny")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=100, help="the tenant's, in each phase of each round")
    options = parser.parse_args()
    cases = {"alone": (0, 1), "neighbour": (CLIENTS, 1), "flood": (FLOOD, FLOOD_ADAPTERS)}
    waits: dict[str, list[float]] = {case: [] for case in cases}
    with tempfile.TemporaryDirectory() as folder:
        base = base_folder(options.base, Path(folder))
        engine, digests = engine_of(base, 1 + FLOOD_ADAPTERS, 8, adapter_slots=16, prefix_cache=False)
        for digest in digests:
            list(ask(engine, [5] * 8, 2, digest))  # its weights are brought
        for number in range(options.rounds):
            for case, (neighbours, adapters) in cases.items():
                found = phase(engine, digests, neighbours, adapters, options.requests)
                waits[case] += found
                print(f"round {number}, {case}: p99 {percentile(found, 99)} ms", file=sys.stderr, flush=True)
        engine.stop()
    figures: dict[str, Any] = {}
    for case, found in waits.items():
        figures |= {f"{case}_p50_ms": percentile(found, 50), f"{case}_p99_ms": percentile(found, 99)}
    figures["flood_ratio"] = round(figures["flood_p99_ms"] / figures["neighbour_p99_ms"], 2)
    figures["flood_to_alone"] = round(figures["flood_p99_ms"] / figures["alone_p99_ms"], 2)
    figures |= {"base": base.name if options.base != "tiny" else "tiny random Llama", "flood": FLOOD}
    write_result("fairness", f"python -m benchmarks.fairness {' '.join(sys.argv[1:])}".strip(), figures)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
