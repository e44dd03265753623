"""What batch invariance costs: tokens a second of 32 greedy requests over 16 adapters, with the promise and without.

The same load by engines that take turns: the fastest arithmetic of this CPU, fp32, and fp32 with `batch_invariant`.

    python -m benchmarks.invariance [--base gemma|tiny|FOLDER] [--rounds 3]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from benchmarks.load import ask, base_folder, engine_of, prompts
from benchmarks.machine import write_result
from riverdelta.serving.engine import Engine, FinishEvent

REQUESTS, PROMPT, ANSWER, ADAPTERS, RANK = 32, 16, 64, 16, 16
CASES = {
    "fastest": {"cpu_backend": "auto"},
    "fp32": {"cpu_backend": "fp32"},
    "batch_invariant": {"cpu_backend": "fp32", "batch_invariant": True},
}


def tokens_per_second(engine: Engine, digests: list[str], seed: int) -> float:
    """One round."""
    asked = list(zip(range(REQUESTS), prompts(seed, PROMPT, min(engine.model.vocab_size, 50_000)), strict=False))
    began = time.perf_counter()
    handles = [ask(engine, prompt, ANSWER, digests[n % ADAPTERS]) for n, prompt in asked]
    ends = [list(handle)[-1] for handle in handles]
    seconds = time.perf_counter() - began
    assert all(isinstance(end, FinishEvent) and end.finish_reason == "length" for end in ends)
    return REQUESTS * ANSWER / seconds


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="gemma")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    rates: dict[str, list[float]] = {case: [] for case in CASES}
    with tempfile.TemporaryDirectory() as folder:
        base = base_folder(options.base, Path(folder))
        engines = {
            case: engine_of(base, ADAPTERS, RANK, prefix_cache=False, adapter_slots=ADAPTERS, **given)
            for case, given in CASES.items()
        }
        for number in range(-1, options.rounds):
            for case, (engine, digests) in engines.items():
                rate = tokens_per_second(engine, digests, number + 1)
                print(f"round {number}, {case}: {rate:.1f} tokens/s", file=sys.stderr, flush=True)
                if number >= 0:  # the first brings weights
                    rates[case].append(rate)
        for engine, _ in engines.values():
            engine.stop()
    figures: dict[str, object] = {f"{case}_tokens_per_s": round(median(found), 1) for case, found in rates.items()}
    of = {
        case: median(mine / other for mine, other in zip(rates["batch_invariant"], rates[case], strict=True))
        for case in ("fp32", "fastest")
    }
    figures |= {f"of_{case}": round(share, 3) for case, share in of.items()}
    figures["base"] = "tiny random Llama" if options.base == "tiny" else base.name
    figures["fastest"] = engines["fastest"][0].model.mode
    write_result("invariance", f"python -m benchmarks.invariance {' '.join(sys.argv[1:])}".strip(), figures)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
