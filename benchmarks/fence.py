"""The fence under load: how long after a forget is durable until the last server has acknowledged it.

Servers in processes of their own on one ledger in SQLite, whose file they watch (wake-ups go over Kafka all the same,
to whom it may concern); clients in another process that stream answers
from every server without pause; and a hand that releases a version that saw a subject, waits until every server
answers with it, and forgets the subject. Timed is the warm process: from the return of the transaction that made
the fence durable to the last acknowledgement read; and beside it the wall time of the whole command `riverdelta
registry forget`. Servers stamp every message that they send with its weights and time: none of a revoked version
may be later than the acknowledgement.

    python -m benchmarks.fence --kafka HOST:9092 [--forgets 100] [--servers 1 4] [--clients 4] [--commands 10]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import uuid
from datetime import date
from pathlib import Path
from typing import Any

import httpx
import torch

from benchmarks.machine import here
from riverdelta.core.settings import Kafka, Serving, Settings, Topics
from riverdelta.registry.ledger import Forget, Ledger
from riverdelta.registry.operations import Operations
from riverdelta.registry.wakeups import Wakeups
from riverdelta.streams import topics
from tests.serving.asking import Load
from tests.serving.hand import Hand, random_lora
from tests.serving.stamped import Stamped, fleet_of
from tests.tiny import make_tiny

RESULT = Path(__file__).parent / "results" / "fence.json"
ADAPTERS = ("acme", "bolt", "coil", "dune")


class Timed(Ledger):
    """A ledger that says when the last fence was durable, and when its last acknowledgement had been read."""

    durable = acknowledged = 0.0

    def forget(self, *given: Any, **named: Any) -> Forget:
        """The transaction, then the time."""
        held = super().forget(*given, **named)
        self.durable = time.monotonic()
        return held

    def await_fence(self, *given: Any, **named: Any) -> list[str]:
        """The wait, then the time."""
        lost = super().await_fence(*given, **named)
        self.acknowledged = time.monotonic()
        return lost


def answering(servers: list[Stamped], model: str, digest: str) -> None:
    """Wait until every server answers with these weights."""
    for server in servers:
        with httpx.Client(base_url=server.url, timeout=60, trust_env=False) as client:
            while True:
                answer = client.post("/v1/completions", json={"model": model, "prompt": "x", "max_tokens": 1})
                if answer.status_code == 200 and answer.json()["system_fingerprint"] == digest:
                    break
                time.sleep(0.02)


def measure(settings: Settings, servers: list[Stamped], forgets: int, commands: int) -> dict[str, Any]:
    """Forget so often, in the warm process and by the command, and look at what the servers sent."""
    hand = Hand(settings)
    ledger, wakeups = Timed(hand.ledger.db), Wakeups(settings)
    acts = Operations(ledger, settings, "bench", wakeups)
    waits, walls, fenced = [], [], {}
    for number in range(forgets + commands):
        subject, adapter = f"subject {number}", ADAPTERS[number % 2]
        dirty = hand.release(adapter, [subject], random_lora(10**6 + number))
        wakeups.send(settings.topics.releases, adapter)
        answering(servers, adapter, dirty)
        time.sleep(0.05)
        if number < forgets:
            report = acts.forget(subject, [adapter])
            assert not report.lost
            fenced[dirty] = ledger.acknowledged
            waits.append(ledger.acknowledged - ledger.durable)
            print(f"{len(servers)} servers, forget {number}: {waits[-1] * 1000:.1f} ms", file=sys.stderr)
        else:
            began = time.monotonic()
            command(settings, subject, adapter)
            fenced[dirty] = time.monotonic()
            walls.append(fenced[dirty] - began)
        hand.train(adapter, random_lora(2 * 10**6 + number))
    wakeups.close()
    hand.ledger.close()
    after = sum(at > fenced.get(digest, at) for server in servers for _, at, digest in server.written())
    tokens = sum(1 for server in servers for _ in server.written())
    return {
        "forgets": forgets,
        "p50_ms": _percentile(waits, 50),
        "p99_ms": _percentile(waits, 99),
        "command_p50_ms": _percentile(walls, 50),
        "command_max_ms": _percentile(walls, 100),
        "tokens_stamped": tokens,
        "tokens_after_ack": after,
    }


def command(settings: Settings, subject: str, adapter: str) -> None:
    """The whole command, a fresh process."""
    given = {
        "RIVERDELTA_DATA": str(settings.data),
        "RIVERDELTA_KAFKA__BOOTSTRAP": settings.kafka.bootstrap,
        "RIVERDELTA_TOPICS__RELEASES": settings.topics.releases,
        "RIVERDELTA_TOPICS__JOBS": settings.topics.jobs,
    }
    words = ["registry", "forget", "--subject", subject, "--adapter", adapter, "--json"]
    subprocess.run(
        [sys.executable, "-m", "riverdelta.app.main", *words],
        env={**os.environ, **given},
        check=True,
        stdout=subprocess.DEVNULL,
    )


def run(folder: Path, options: argparse.Namespace, count: int) -> dict[str, Any]:
    """One number of servers."""
    name = uuid.uuid4().hex[:8]
    settings = Settings(
        data=folder / f"data-{count}",
        base=str(folder / "base"),
        kafka=Kafka(bootstrap=options.kafka),
        topics=Topics(
            events=f"events-{name}", control=f"control-{name}", jobs=f"jobs-{name}", releases=f"releases-{name}"
        ),
        serving=Serving(dtype="float32", max_model_len=512, kv_tokens=16384, threads=1),
    )
    topics.ensure(settings)
    hand = Hand(settings)
    for adapter in ADAPTERS:
        hand.adapter(adapter, 1)
    hand.ledger.close()
    with fleet_of(settings, count, folder) as servers:
        urls = [server.url for server in servers]
        asking = Load(urls, ADAPTERS, options.clients, options.tokens, folder / "answered")
        try:
            time.sleep(3)
            return measure(settings, servers, options.forgets, options.commands)
        finally:
            asking.stop()


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kafka", required=True, help="bootstrap servers of an Apache Kafka")
    parser.add_argument("--forgets", type=int, default=100)
    parser.add_argument("--servers", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--clients", type=int, default=4, help="streams without pause, over all servers")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--commands", type=int, default=10)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        make_tiny("llama", Path(folder) / "base")
        cells = {count: run(Path(folder), options, count) for count in options.servers}
    result = {
        "p50_ms": max(cell["p50_ms"] for cell in cells.values()),
        "p99_ms": max(cell["p99_ms"] for cell in cells.values()),
        "tokens_after_ack": sum(cell["tokens_after_ack"] for cell in cells.values()),
        "servers": cells,
        "clients": options.clients,
        "command": "python -m benchmarks.fence --kafka HOST:9092",
        "date": str(date.today()),
        "machine": here(),
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


def _percentile(seconds: list[float], share: int) -> float:
    return round(float(torch.tensor(seconds, dtype=torch.float64).quantile(share / 100)) * 1000, 2)


if __name__ == "__main__":
    main()
