"""Thousands of adapters through a few device slots: time to first token under a Zipf load, beside an engine that holds
all of them on the device.

Clients ask without pause, each request for an adapter drawn by a Zipf law of exponent 1. The engines take turns; host
memory holds half of the adapters, so that some are read again from where they are stored. No request may fail.

    python -m benchmarks.adapters [--adapters 2000] [--slots 64] [--base tiny|gemma|FOLDER]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.load import base_folder, engine_of, first_token, in_parallel, linears_of, percentile, prompts
from benchmarks.machine import write_result
from riverdelta.serving.engine import Engine

CLIENTS, PROMPT, ANSWER, RANK = 16, 16, 8, 8


def zipf(count: int, adapters: int, seed: int) -> list[int]:
    """Adapter numbers, the same ones for each seed."""
    weights = 1 / torch.arange(1, adapters + 1, dtype=torch.float64)
    return torch.multinomial(weights, count, True, generator=torch.Generator().manual_seed(seed)).tolist()


def waits(engine: Engine, digests: list[str], requests: int, seed: int) -> list[float | None]:
    """Milliseconds to the first token of each request; None for one that failed."""
    found: list[float | None] = []
    numbers = iter(zipf(requests, len(digests), seed))

    def client(n: int) -> None:
        for prompt in prompts(n, PROMPT, engine.model.vocab_size):
            number = next(numbers, None)
            if number is None:
                return
            found.append(first_token(engine, prompt, ANSWER, digests[number], "", str(number)))

    in_parallel(CLIENTS, client)
    return found


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="tiny")
    parser.add_argument("--adapters", type=int, default=2000)
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--requests", type=int, default=1500, help="of each engine in each round")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    found: dict[str, list[float | None]] = {"slots": [], "resident": []}
    with tempfile.TemporaryDirectory() as folder:
        base = base_folder(options.base, Path(folder))
        engines: dict[str, Any] = {}
        for case, slots in (("resident", options.adapters), ("slots", options.slots)):
            # 4 bytes a weight, A and B of each layer; of the few slots' engine the host holds half.
            whole = options.adapters * 4 * RANK * sum(map(sum, linears_of(base).values()))
            host = whole // 2 if case == "slots" else 2 * whole
            given = {"adapter_slots": slots, "max_batch": CLIENTS, "host_adapter_bytes": host}
            engines[case] = engine_of(base, options.adapters, RANK, **given)
        for digest in engines["resident"][1]:
            first_token(engines["resident"][0], [5] * 4, 1, digest)  # brings its weights
        for number in range(options.rounds):
            for case, (engine, digests) in engines.items():
                waited = waits(engine, digests, options.requests, number)
                found[case] += waited
                done = [w for w in waited if w is not None]
                print(f"round {number}, {case}: p99 {percentile(done, 99)} ms", file=sys.stderr, flush=True)
        for engine, _ in engines.values():
            engine.stop()
    figures: dict[str, Any] = {
        "adapters": options.adapters,
        "slots": options.slots,
        "requests": len(found["slots"]),
        "failed": sum(w is None for case in found.values() for w in case),
        "base": "tiny random Llama" if options.base == "tiny" else base.name,
    }
    for case, waited in found.items():
        done = [w for w in waited if w is not None]
        figures |= {f"{case}_p50_ms": percentile(done, 50), f"{case}_p99_ms": percentile(done, 99)}
    figures["p50_ratio"] = round(figures["slots_p50_ms"] / figures["resident_p50_ms"], 2)
    figures["p99_ratio"] = round(figures["slots_p99_ms"] / figures["resident_p99_ms"], 2)
    write_result("adapters", f"python -m benchmarks.adapters {' '.join(sys.argv[1:])}".strip(), figures)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
