"""How fast events become durable entries, beside a bare Bytewax pass-through of the same records.

`python -m benchmarks.streams [--events N] [--kafka SERVERS]` on a real Apache Kafka. The two run in turns on the same
topic; the clock of each starts when it begins to read (imports apart) and ends when the last event is durable: on the
output topic, or sealed in payloads and ledger. The last line is JSON with medians.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path

from confluent_kafka import Consumer, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic

from benchmarks.machine import write_result
from riverdelta.core.recipe import Recipe
from riverdelta.core.settings import Kafka, Settings, Streams, Topics
from riverdelta.registry.ledger import Ledger

PER_SEGMENT = 50
BARE = """
import sys
import bytewax.operators as op
from bytewax.connectors.kafka import KafkaSink, KafkaSinkMessage, KafkaSource
from bytewax.dataflow import Dataflow
from bytewax._bytewax import run_main
servers, source, sink = sys.argv[1:]
flow = Dataflow("bare")
read = op.input("read", flow, KafkaSource([servers], [source], batch_size=4096))
sent = op.map("pass", read, lambda message: KafkaSinkMessage(message.key, message.value))
op.output("write", sent, KafkaSink([servers], sink))
print("reading", file=sys.stderr, flush=True)
run_main(flow)
"""
FULL = """
import json, sys
from riverdelta.core.settings import Settings
from riverdelta.streams.cluster import run
run(Settings(**json.loads(sys.argv[1])))
"""


def main() -> None:
    """Publish once, then run both in turns."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--events", type=int, default=1_000_000)
    options.add_argument("--adapters", type=int, default=1000)
    options.add_argument("--partitions", type=int, default=4)
    options.add_argument("--workers", type=int, default=1, help="processes of the full dataflow")
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--kafka", default=os.environ.get("KAFKA_BOOTSTRAP_SERVERS", ""))
    given = options.parse_args()
    if not given.kafka:
        options.error("name a cluster with --kafka or KAFKA_BOOTSTRAP_SERVERS")
    events = given.events - given.events % (given.adapters * PER_SEGMENT)  # whole segments only
    if not events:
        options.error(f"at least {given.adapters * PER_SEGMENT} events make a segment for each adapter")
    topic = f"bench-{uuid.uuid4().hex[:8]}"
    make_topic(given.kafka, topic, given.partitions)
    size = publish(given.kafka, topic, events, given.adapters)
    print(f"{events} events of {size} bytes, {given.adapters} adapters, {given.partitions} partitions", flush=True)
    bare, full, held = [], [], []
    for number in range(given.rounds):
        bare.append(events / run_bare(given.kafka, topic, events, given.partitions)[0])
        seconds, peak = run_full(given.kafka, topic, events, given.adapters, given.partitions, given.workers)
        full.append(events / seconds)
        held.append(peak)
        print(f"round {number + 1}: bare {bare[-1]:.0f}/s, full {full[-1]:.0f}/s", flush=True)
    ratio = statistics.median(full) / statistics.median(bare)
    figures = {
        "events_per_s": round(statistics.median(full)),
        "bare_events_per_s": round(statistics.median(bare)),
        "ratio": round(ratio, 3),
        "peak_mb": round(statistics.median(held)),
        "events": events,
        "adapters": given.adapters,
        "workers": given.workers,
        "rounds": given.rounds,
    }
    name = "streams" if given.adapters == 1000 else f"streams_{given.adapters}_adapters"
    name += "" if given.workers == 1 else f"_{given.workers}_workers"
    shape = f"--events {given.events} --adapters {given.adapters} --workers {given.workers} --kafka HOST:9092"
    write_result(name, f"python -m benchmarks.streams {shape}", figures)
    print(json.dumps(figures))


def make_topic(servers: str, name: str, partitions: int) -> None:
    admin = AdminClient({"bootstrap.servers": servers})  # named: its futures die with it
    admin.create_topics([NewTopic(name, partitions, 1)])[name].result(30)


def publish(servers: str, topic: str, events: int, adapters: int) -> int:
    producer = Producer({"bootstrap.servers": servers, "linger.ms": 20, "queue.buffering.max.messages": 500_000})
    value = b""
    for number in range(events):
        event = {
            "adapter": f"a{number % adapters}",
            "subject": f"s{number % 9973}",
            "id": str(number),
            "source": "bench",
            "prompt": f"Question {number}:",
            "completion": f" answer {number} " + "x" * 70,
        }
        value = json.dumps(event).encode()
        while True:
            try:
                producer.produce(topic, key=event["adapter"], value=value)
                break
            except BufferError:
                producer.poll(0.1)
    if producer.flush(120):
        raise SystemExit("not every event arrived")
    return len(value)


def run_bare(servers: str, topic: str, events: int, partitions: int) -> tuple[float, float]:
    sink = f"{topic}-out-{uuid.uuid4().hex[:6]}"
    make_topic(servers, sink, partitions)
    consumer = Consumer({"bootstrap.servers": servers, "group.id": "bench"})

    def arrived() -> int:
        return sum(consumer.get_watermark_offsets(TopicPartition(sink, part), 10)[1] for part in range(partitions))

    took = timed([sys.executable, "-c", BARE, servers, topic, sink], arrived, events)
    consumer.close()
    return took


def run_full(
    servers: str, topic: str, events: int, adapters: int, partitions: int, workers: int
) -> tuple[float, float]:
    with tempfile.TemporaryDirectory(prefix="riverdelta-bench-") as folder:
        settings = Settings(
            data=Path(folder) / "data",
            kafka=Kafka(bootstrap=servers),
            topics=Topics(events=topic, partitions=partitions),
            streams=Streams(unknown_adapters="refuse", workers=workers),
        )
        ledger = Ledger.open(settings.ledger_url)
        recipe = Recipe.from_dict({"seal": {"count": PER_SEGMENT, "age": 3600.0, "linger": 3600.0}})
        for number in range(adapters):
            ledger.create(f"a{number}", recipe, "bench")

        def sealed() -> int:
            return sum(adapter.next_index for adapter in ledger.adapters())

        took = timed([sys.executable, "-c", FULL, settings.model_dump_json()], sealed, events)
        ledger.close()
        return took


def timed(command: list[str], count: Callable[[], int], events: int) -> tuple[float, float]:
    """Seconds from the child's word that it reads until everything is there, and the most memory that it held (MB)."""
    with tempfile.NamedTemporaryFile("w+", suffix=".log") as log:
        child = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            while "reading" not in Path(log.name).read_text():
                if child.poll() is not None:
                    raise SystemExit(Path(log.name).read_text())
                time.sleep(0.01)
            began = time.monotonic()
            while count() < events:
                if child.poll() is not None:
                    raise SystemExit(Path(log.name).read_text())
                time.sleep(0.1)
            return time.monotonic() - began, _peak(child.pid)
        finally:
            child.terminate()  # it ends its workers
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(30)
            child.kill()
            child.wait()


def _peak(pid: int) -> float:
    """Of a process and its workers together."""
    found = 0.0
    for each in (pid, *(int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split())):
        lines = Path(f"/proc/{each}/status").read_text().splitlines()
        found += sum(int(line.split()[1]) / 1000 for line in lines if line.startswith("VmHWM"))
    return found


if __name__ == "__main__":
    main()
