"""How soon a dataflow that was killed decides its first event again, on a real Apache Kafka.

`python -m benchmarks.restarts --kafka SERVERS [--starts 20]`. Each start finds events waiting and is killed (SIGKILL)
once it has decided some. The last line is JSON: seconds from the dataflow's own beginning, and its imports before it.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from datetime import datetime
from pathlib import Path
from typing import Any

from benchmarks.machine import write_result
from benchmarks.streams import FULL, make_topic, publish
from riverdelta.core.recipe import Recipe
from riverdelta.core.settings import Kafka, Settings, Streams, Topics
from riverdelta.registry.ledger import Ledger

ADAPTERS = 20
EVENTS_A_START = 400


def main() -> None:
    """Start, kill, and say how long it took."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--starts", type=int, default=20)
    options.add_argument("--kafka", default=os.environ.get("KAFKA_BOOTSTRAP_SERVERS", ""))
    given = options.parse_args()
    if not given.kafka:
        options.error("name a cluster with --kafka or KAFKA_BOOTSTRAP_SERVERS")
    if given.starts < 2:
        options.error("at least two starts have percentiles")
    topic = f"bench-{uuid.uuid4().hex[:8]}"
    make_topic(given.kafka, topic, 4)
    with tempfile.TemporaryDirectory(prefix="riverdelta-bench-") as folder:
        settings = Settings(
            data=Path(folder) / "data",
            kafka=Kafka(bootstrap=given.kafka),
            topics=Topics(events=topic, partitions=4),
            streams=Streams(unknown_adapters="refuse"),
        )
        ledger = Ledger.open(settings.ledger_url)
        recipe = Recipe.from_dict({"seal": {"count": 50, "age": 0.5}})
        for number in range(ADAPTERS):
            ledger.create(f"a{number}", recipe, "bench")
        ledger.close()
        own, imports = [], []
        for number in range(given.starts):
            publish(given.kafka, topic, EVENTS_A_START, ADAPTERS)
            took, before = start(settings, Path(folder) / f"{number}.log")
            own.append(took)
            imports.append(before)
            print(f"start {number + 1}: {took:.3f} s after {before:.3f} s of imports", flush=True)
    found: dict[str, Any] = {"starts": len(own), "first_event_p50_s": round(statistics.median(own), 3)}
    found["first_event_p99_s"] = round(statistics.quantiles(own, n=100, method="inclusive")[98], 3)
    found["imports_p50_s"] = round(statistics.median(imports), 3)
    found["imports_p99_s"] = round(statistics.quantiles(imports, n=100, method="inclusive")[98], 3)
    write_result("restarts", f"python -m benchmarks.restarts --starts {given.starts} --kafka HOST:9092", found)
    print(json.dumps(found))


def start(settings: Settings, log: Path) -> tuple[float, float]:
    """Seconds to the first event, and those of the imports before; then it is killed."""
    with log.open("wb") as sink:
        spawned = time.time()
        child = subprocess.Popen(
            [sys.executable, "-c", FULL, settings.model_dump_json()],
            env={**os.environ, "RIVERDELTA_LOG_JSON": "1"},
            stdout=sink,
            stderr=sink,
        )
    try:
        while (decided := said(log, "first events decided")) is None:
            if child.poll() is not None:
                raise SystemExit(log.read_text())
            time.sleep(0.02)
        began = said(log, "starting")
        assert began is not None
        time.sleep(0.3)
        return decided["seconds"], datetime.fromisoformat(began["at"]).timestamp() - spawned
    finally:
        child.kill()
        child.wait()


def said(log: Path, message: str) -> dict[str, Any] | None:
    """The first line of a log with this message."""
    for line in log.read_text().splitlines():
        if message in line and line.startswith("{"):
            found: dict[str, Any] = json.loads(line)
            if found.get("message") == message:
                return found
    return None


if __name__ == "__main__":
    main()
