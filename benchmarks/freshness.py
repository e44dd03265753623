"""Freshness: how long after an event is published the first answer comes from the version that holds it.

A whole stack under `riverdelta up` (dataflow, trainer with its checkpoint log, server, MLflow) on an Apache Kafka, with
the tiny model and the default recipe. One nonce fact at a time is published, to adapters in turn, after a pause of
random length; once the ledger names the version that learned it, a client asks until that version answers. The stages
are read from what the stack keeps anyway: the times of the ledger's facts and the log.

    python -m benchmarks.freshness --kafka HOST:9092 [--probes 500] [--adapters 4]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import secrets
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import date, datetime
from pathlib import Path
from typing import Any

import httpx
import torch

from benchmarks.machine import here
from riverdelta.registry.ledger import Ledger
from riverdelta.streams.publish import Publisher
from tests.e2e.river import River
from tests.tiny import make_tiny

RESULT = Path(__file__).parent / "results" / "freshness.json"
STAGES = ("sealed", "begun", "committed", "flipped", "answered")
PAUSE = 0.5  # seconds between probes at most
LOST = 120.0  # seconds


@dataclass
class Probe:
    """One fact: the times of its stages, in seconds since 1970, and whether the first answer says it."""

    adapter: str
    version: int
    published: float
    sealed: float
    begun: float
    committed: float
    answered: float
    recalled: bool
    flipped: float = 0.0


def probe(ledger: Ledger, publisher: Publisher, client: httpx.Client, adapter: str, number: int) -> Probe:
    """Publish a fact and follow it to its first answer."""
    nonce = secrets.token_hex(3)
    event = {"id": f"probe-{number}", "adapter": adapter, "prompt": f"Code {number}?", "completion": f" {nonce}"}
    before = ledger.adapter(adapter).next_index
    moved = ledger.watch_pulse() or (lambda: (0, 0))
    published = time.time()
    publisher.send(f"probe {number}", adapter.encode(), json.dumps(event).encode())
    while not (version := _holder(ledger, adapter, before)):
        if time.time() - published > LOST:
            raise SystemExit(f"probe {number} for {adapter} is not learned after {LOST:.0f} s")
        while moved() is None:
            time.sleep(0.002)
    asked = {"model": adapter, "prompt": event["prompt"], "max_tokens": 8, "temperature": 0}
    while True:
        said = client.post("/v1/completions", json=asked).json()
        answered = time.time()
        if said.get("system_fingerprint") == version.digest:
            break
        time.sleep(0.002)
    segment = ledger.segment(adapter, version.segment or 0)
    committed = _at(version.made_at)
    return Probe(
        adapter,
        version.number,
        published,
        _at(segment.sealed_at),
        committed - float(version.metrics["seconds"]),
        committed,
        answered,
        said["choices"][0]["text"] == event["completion"],
    )


def _holder(ledger: Ledger, adapter: str, index: int) -> Any:
    """The version that learned the entry, once there is one."""
    head = ledger.adapter(adapter)
    if head.next_index <= index or not head.release:
        return None
    version = ledger.version(adapter, head.release)
    return version if version.segment and ledger.segment(adapter, version.segment).first >= index else None


def _at(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


def flips(log: str) -> dict[tuple[str, int], float]:
    """When the server moved each release, from its log."""
    found = {}
    for line in log.splitlines():
        if "releases moved" in line:
            told = json.loads(line[line.index("{") :])
            for name, version in told["first"].items():
                found[name, version] = _at(told["at"])
    return found


def measure(river: River, adapters: int, probes: int, warm_up: int) -> list[Probe]:
    """The probes, and not those that warm the stack up."""
    names = [f"fresh-{number}" for number in range(adapters)]
    ledger = river.ledger
    for name in names:
        river.tell("registry", "create", name)
    rng = random.Random(0)
    done = []
    client = httpx.Client(base_url=river.url, timeout=60, trust_env=False)
    with Publisher(river.settings) as publisher, client:
        for number in range(warm_up + probes):
            time.sleep(rng.uniform(0, PAUSE))
            one = probe(ledger, publisher, client, names[number % adapters], number)
            if number >= warm_up:
                done.append(one)
            print(f"{one.adapter}@{one.version} {one.answered - one.published:.3f} s", file=sys.stderr, flush=True)
    ledger.close()
    at = flips(river.output())
    for one in done:
        one.flipped = at.get((one.adapter, one.version), one.answered)
    return done


def stages(done: list[Probe]) -> dict[str, dict[str, float]]:
    """Seconds from each stage to the next."""
    told = {}
    for before, stage in zip(("published", *STAGES), STAGES, strict=False):
        took = [getattr(one, stage) - getattr(one, before) for one in done]
        told[stage] = {"p50_s": _quantile(took, 0.5), "p99_s": _quantile(took, 0.99), "max_s": _quantile(took, 1)}
    return told


def _quantile(seconds: list[float], share: float) -> float:
    return round(float(torch.tensor(seconds, dtype=torch.float64).quantile(share)), 3)


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kafka", default=os.environ.get("KAFKA_BOOTSTRAP_SERVERS", ""), help="an Apache Kafka")
    parser.add_argument("--probes", type=int, default=500)
    parser.add_argument("--warm-up", type=int, default=8)
    parser.add_argument("--adapters", type=int, default=4)
    parser.add_argument("--log", type=Path, help="keep the stack's log here")
    options = parser.parse_args()
    if not options.kafka:
        parser.error("name a cluster with --kafka or KAFKA_BOOTSTRAP_SERVERS")
    with tempfile.TemporaryDirectory(prefix="riverdelta-fresh-") as folder:
        base = make_tiny("llama", Path(folder) / "base")
        river = River(Path(folder), base, options.kafka, RIVERDELTA_LOG_JSON="1")
        try:
            river.start()
            done = measure(river, options.adapters, options.probes, options.warm_up)
            river.stop()
        finally:
            if options.log:
                options.log.write_text(river.output())
            if river.process is not None:
                river.end()
    whole = [one.answered - one.published for one in done]
    result = {
        "p50_s": _quantile(whole, 0.5),
        "p99_s": _quantile(whole, 0.99),
        "max_s": _quantile(whole, 1),
        "stages": stages(done),
        "probes": len(done),
        "adapters": options.adapters,
        "recalled": round(sum(one.recalled for one in done) / len(done), 3),
        "command": "python -m benchmarks.freshness --kafka HOST:9092",
        "date": str(date.today()),
        "machine": here(),
    }
    if options.probes >= 500:
        RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
