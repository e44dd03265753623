"""Live random histories and hold each to its control.

    python -m tests.histories [--base tiny|gemma] [--count 200] [--seed 0] [--jobs 1]

The last line is JSON: how many were equal, bit for bit, and what happened in them. The exit code says whether all were.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from .check import one

# What a base that takes a second a step is given.
SMALL: dict[str, Any] = {
    "lora": {"rank": 2, "alpha": 4.0, "targets": ["q_proj", "v_proj"]},
    "training": {"passes": 1, "micro_batch": 2, "rehearse": 1, "max_length": 24},
    "gate": {"on": False},
}


def main() -> None:
    """Run them."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--base", choices=["tiny", "gemma"], default="tiny")
    options.add_argument("--count", type=int, default=200)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--jobs", type=int, default=1)
    asked = options.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    began, counts, wrong = time.monotonic(), Counter[str](), dict[int, list[str]]()
    with tempfile.TemporaryDirectory(prefix="histories-") as folder:
        given: dict[str, Any] = {}
        if asked.base == "gemma":
            from riverdelta.app.gemma import gemma_folder

            base, given = gemma_folder(), {"size": 24, "small": SMALL}
        else:
            from tests.tiny import make_tiny

            base = make_tiny("llama", Path(folder) / "base")
        threads = 1 if asked.base == "tiny" else 2
        with ProcessPoolExecutor(asked.jobs, get_context("spawn")) as pool:
            seeds = range(asked.seed, asked.seed + asked.count)
            for done in as_completed(pool.submit(one, seed, os.fspath(base), folder, threads, given) for seed in seeds):
                seed, differ, happened = done.result()
                counts += happened
                if differ:
                    wrong[seed] = differ
                told = dict(sorted(happened.items()))
                print(f"{seed}: {differ or 'equal'} {told}", file=sys.stderr, flush=True)
    result = {
        "base": asked.base,
        "histories": asked.count,
        "equal": asked.count - len(wrong),
        "differ": wrong,
        "seconds": round(time.monotonic() - began, 1),
        "happened": dict(sorted(counts.items())),
    }
    print(json.dumps(result))
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
