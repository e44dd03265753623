"""The kill harness: `python -m tests.soak --seed N --kills K [--minutes M] [--kafka ADDRESS]`.

A producer publishes while dataflow workers, trainers, the server and the broker are killed with SIGKILL, or stopped for
so long that others take over and then let go on, by a schedule that the seed fixes. After quiet it holds the ledger to
what was published: every valid event one entry, every entry one outcome, the dead letters what was no event, and the
weights those of a control that nobody disturbed, trained from the raw events and the same boundaries.
"""

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from confluent_kafka import Producer

from riverdelta.core.recipe import Recipe
from riverdelta.core.settings import Settings
from riverdelta.core.store import ObjectStore
from riverdelta.registry.keystore import KeyStore
from riverdelta.registry.ledger import Ledger, Outcome
from riverdelta.registry.verify import verify
from riverdelta.streams import topics
from riverdelta.streams.dead_letters import list_dead_letters
from tests.brokers import Broker, GivenBroker, free_port, start_broker
from tests.e2e.river import COMMAND, River
from tests.streams.flow import entries
from tests.tiny import make_tiny

ADAPTERS = ("ada", "bob", "cyd", "dee")
RECIPE = Recipe.from_dict(
    {
        "lora": {"rank": 2, "alpha": 4.0, "targets": ["q_proj", "v_proj"]},
        "training": {"passes": 1, "steps": 1, "micro_batch": 8, "rehearse": 4, "max_length": 64},
        "seal": {"count": 12, "age": 2.0},
    }
)
VICTIMS = {"stream": 8, "train-1": 3, "train-2": 3, "serve": 2, "broker": 2}
BEGUN = {
    "stream": "first events decided",
    "train-1": "Ready to train",
    "train-2": "Ready to train",
    "serve": "the base model answers",
}
EVENTS_PER_KILL = 24
QUIET_SECONDS = 300.0
JUNK = (b"not json", b'{"adapter":"NO","text":"x"}', b'{"adapter":"ada"}', b"")


@dataclass
class Published:
    """What the producer has sent."""

    valid: dict[str, Counter[str]] = field(default_factory=lambda: {name: Counter() for name in ADAPTERS})
    junk: int = 0
    records: int = 0


class Soak:
    """One run: a broker, the processes, and what they are told."""

    def __init__(self, seed: int, kills: int, folder: Path, broker: Broker, minutes: float = float("inf")) -> None:
        """After so many `minutes` nobody is killed any more."""
        self.rng, self.kills, self.broker = random.Random(seed), kills, broker
        self.seconds = minutes * 60
        self.river = River(
            folder, make_tiny("llama", folder / "base"), broker.bootstrap,
            RIVERDELTA_STREAMS__METRICS_PORT="0", RIVERDELTA_LOG_JSON="1", RIVERDELTA_TOPICS__PARTITIONS="4",
            RIVERDELTA_SERVING__PORT=str(free_port()),
        )  # fmt: skip
        self.settings: Settings = self.river.settings
        self.published = Published()
        self.counts: Counter[str] = Counter()
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._spawned: dict[str, int] = {}  # where in its log the running process begins
        self._zombies: list[subprocess.Popen[bytes]] = []
        self._threads: list[threading.Thread] = []
        self._failed: list[BaseException] = []
        self._broker_back = threading.Event()
        self._broker_back.set()
        self._events = random.Random(seed + 1)

    # -- processes -----------------------------------------------------------------------------------------------

    def start(self, name: str) -> None:
        """Start a process by its name."""
        log = self.river.folder / f"{name}.log"
        with log.open("ab") as sink:
            self._spawned[name] = sink.tell()
            sink.write(json.dumps({"spawned": time.time()}).encode() + b"\n")
            sink.flush()
            self._processes[name] = subprocess.Popen(
                [*COMMAND, name.split("-", maxsplit=1)[0]], env=self.river.environment, stdout=sink, stderr=sink
            )

    def choose(self) -> str:
        """Whom to kill next."""
        names = [name for name in VICTIMS if name != "broker" or self.broker.killable]
        return self.rng.choices(names, [VICTIMS[name] for name in names])[0]

    def kill(self, name: str) -> None:
        """Kill it, or make a zombie of it; what it does is taken up again while others are killed."""
        self.counts["kills"] += 1
        self.counts[name] += 1
        self.counts["of working processes"] += self._works(name)
        if name == "broker":
            self._broker_back.clear()
            self.broker.kill()
            self._beside(self._return, self.rng.uniform(0.0, 2.0))
            return
        process = self._processes[name]
        if name != "serve" and self.rng.random() < 0.25:
            self.counts["zombies"] += 1
            process.send_signal(signal.SIGSTOP)
            self._zombies.append(process)
            self._beside(self._haunt, process, self.rng.uniform(5.0, 12.0), self.rng.uniform(0.5, 3.0))
        else:
            process.kill()
            process.wait()
        self.start(name)

    def _return(self, away: float) -> None:
        """The broker comes back."""
        time.sleep(away)
        self.broker.restart()
        self._broker_back.set()

    def _haunt(self, process: subprocess.Popen[bytes], asleep: float, awake: float) -> None:
        """A zombie sleeps while another takes over, goes on beside it for a moment, and is killed."""
        time.sleep(asleep)
        process.send_signal(signal.SIGCONT)
        time.sleep(awake)
        process.kill()
        process.wait()

    def revive(self) -> None:
        """What ended by itself is started again, and counted: `up` does the same."""
        for name, process in list(self._processes.items()):
            if process.poll() is not None:
                self.counts[f"{name} ended with {process.returncode}"] += 1
                self.start(name)

    def end(self) -> None:
        """Leave nothing running."""
        for process in [*self._processes.values(), *self._zombies]:
            process.kill()
            process.wait()

    # -- events --------------------------------------------------------------------------------------------------

    def publish(self, stop: threading.Event) -> None:
        """So many a kill, one a second beyond, until told to stop: valid events, some sent twice, and some junk."""
        producer = Producer(
            {
                **self.settings.kafka.for_confluent(),
                "enable.idempotence": True,  # a record is on the log once, whatever dies
                "delivery.timeout.ms": 600_000,
                "linger.ms": 5,
                "log_level": 2,
            }
        )
        due = 0.0
        while not stop.is_set() or self.published.records < max(1, self.counts["kills"]) * EVENTS_PER_KILL:
            ahead = self.published.records >= (self.counts["kills"] + 2) * EVENTS_PER_KILL
            if stop.is_set() or not ahead or time.monotonic() > due:  # a dataflow that starts finds some
                for value in self._next():
                    self.published.records += 1
                    producer.produce(self.settings.topics.events, value, partition=self._events.randrange(4))
                due = time.monotonic() + 1.0
            producer.poll(0)
            time.sleep(0.02)
        if producer.flush(300):
            raise AssertionError("the broker has not taken every event")

    def _next(self) -> list[bytes]:
        rng = self._events
        if rng.random() < 0.05:
            self.published.junk += 1
            return [rng.choice(JUNK)]
        name = rng.choice(ADAPTERS)
        text = f"{name} learns fact {self.published.records}"
        self.published.valid[name][text] += 1
        about = {"subject": rng.choice(["ann", "ben"])} if rng.random() < 0.5 else {}
        event = {"adapter": name, "id": text, "source": "soak", "text": text, **about}
        return [json.dumps(event).encode()] * (2 if rng.random() < 0.1 else 1)

    # -- the run -------------------------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        """Kill and publish, wait for quiet, check; the report."""
        topics.ensure(self.settings)
        ledger = Ledger.open(self.settings.ledger_url)
        for name in ADAPTERS:
            ledger.create(name, RECIPE, "soak")
        stop = threading.Event()
        try:
            for name in VICTIMS:
                if name != "broker":
                    self.start(name)
            self._beside(self.publish, stop)
            began = time.monotonic()
            for number in range(self.kills):
                if self._failed or time.monotonic() - began > self.seconds:
                    break
                name = self.choose()
                if self.rng.random() < 0.8 or name == "broker":  # the others hit processes that are starting
                    self._await_work(name)
                time.sleep(self.rng.choice([0.1, 0.3, 0.6, 1.2]))
                self.revive()
                self.kill(name)
                tell(f"kill {number + 1} of {self.kills}: {dict(self.counts)}, {self.published.records} records")
            stop.set()
            for thread in self._threads:
                thread.join()
            if self._failed:
                raise self._failed[0]
            tell("waiting for quiet")
            self._await_quiet(ledger)
            served = self._served(ledger)
            tell("checking")
        finally:
            self.end()
        return self._check(ledger) | {"served_releases": served}

    def _await_work(self, name: str) -> None:
        """Until somebody does its work, or for a minute at most."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not self._works(name):
            self.revive()
            time.sleep(0.1)

    def _works(self, name: str) -> bool:
        if name == "broker":
            return self._broker_back.is_set()
        with (self.river.folder / f"{name}.log").open("rb") as log:
            log.seek(self._spawned[name])
            return BEGUN[name].encode() in log.read()

    def _beside(self, action: Callable[..., None], *given: Any) -> None:
        """Do something in a thread; the run ends when that fails."""

        def guarded() -> None:
            try:
                action(*given)
            except BaseException as error:
                self._failed.append(error)

        self._threads.append(threading.Thread(target=guarded, daemon=True))
        self._threads[-1].start()

    def _await_quiet(self, ledger: Ledger) -> None:
        deadline = time.monotonic() + QUIET_SECONDS
        wanted = sum(len(texts) for texts in self.published.valid.values())
        while True:
            self.revive()
            held = sum(head.next_index for head in ledger.adapters())
            waiting = [s for name in ADAPTERS for s in ledger.segments(name) if s.outcome is Outcome.AWAITING]
            if held >= wanted and not waiting:
                return
            if time.monotonic() > deadline:
                raise AssertionError(f"not quiet: {held} of {wanted} entries, {len(waiting)} segments await training")
            time.sleep(0.5)

    def _served(self, ledger: Ledger) -> bool:
        """Wait until the server answers with each release."""
        import httpx

        url = f"http://127.0.0.1:{self.settings.serving.port}/v1/completions"
        deadline = time.monotonic() + QUIET_SECONDS
        for name in ADAPTERS:
            digest = ledger.version(name, ledger.adapter(name).release).digest
            while True:
                try:
                    said = httpx.post(url, json={"model": name, "prompt": "x", "max_tokens": 1}, timeout=30).json()
                    if said.get("system_fingerprint") == digest:
                        break
                except httpx.TransportError:
                    pass
                if time.monotonic() > deadline:
                    raise AssertionError(f"{name}@{digest[:12]} is not served")
                self.revive()
                time.sleep(0.5)
        return True

    def _check(self, ledger: Ledger) -> dict[str, Any]:
        lost = doubled = 0
        outcomes: Counter[str] = Counter()
        problems: list[str] = []
        store, keys = ObjectStore(self.settings.store_url), KeyStore.open(self.settings)
        for name in ADAPTERS:
            found = Counter(said["text"] for _, said in entries(self.settings, ledger, name) if said)
            lost += len(self.published.valid[name].keys() - found.keys())
            doubled += sum(times - 1 for times in found.values())
            problems += [f"{name}: not published: {text}" for text in found.keys() - self.published.valid[name].keys()]
            for segment in ledger.segments(name):
                outcomes[str(segment.outcome)] += segment.count
            problems += verify(ledger, store, keys, name).problems
            done = subprocess.run(
                [*COMMAND, "counterfactual", name, "--json"],
                env=self.river.environment, capture_output=True, text=True, check=False,
            )  # fmt: skip
            if done.returncode != 0:
                problems.append(f"{name}: the control differs: {done.stdout.strip()} {done.stderr.strip()[-500:]}")
            else:
                self.counts["digests equal"] += json.loads(done.stdout)["equal"]
        letters = list_dead_letters(self.settings)
        if len(letters) != self.published.junk:
            problems.append(f"{len(letters)} dead letters for {self.published.junk} that are no events")
        return {
            "records": self.published.records,
            "events": sum(len(texts) for texts in self.published.valid.values()),
            "lost": lost,
            "doubled": doubled,
            "outcomes": dict(outcomes),
            "dead_letters": len(letters),
            "problems": problems,
            **start_ups(self.river.folder / "stream.log"),
            **self.counts,
        }


def start_ups(log: Path) -> dict[str, float]:
    """How long dataflows took from their own beginning to their first event, and their imports before it."""
    own: list[float] = []
    imports: list[float] = []
    spawned = began = 0.0
    for line in log.read_text(errors="replace").splitlines():
        try:
            said = json.loads(line)
        except ValueError:
            continue
        if "spawned" in said:
            spawned = said["spawned"]
        elif said.get("message") == "starting":
            began = datetime.fromisoformat(said["at"]).timestamp()
            imports.append(began - spawned)
        elif said.get("message") == "first events decided":
            own.append(said["seconds"])
    if len(own) < 2:
        return {}
    cuts = statistics.quantiles(own, n=100, method="inclusive")
    return {
        "restarts_measured": len(own),
        "first_event_p50_s": round(statistics.median(own), 3),
        "first_event_p99_s": round(cuts[98], 3),
        "imports_p50_s": round(statistics.median(imports), 3),
    }


def tell(what: str) -> None:
    """Progress, on standard error."""
    print(f"{time.strftime('%H:%M:%S')} {what}", file=sys.stderr, flush=True)


def main() -> None:
    """Run it; the last line is JSON, and the exit code says whether every promise held."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--seed", type=int, default=1)
    options.add_argument("--kills", type=int, default=200)
    options.add_argument("--minutes", type=float, default=float("inf"), help="kill for so long at most")
    options.add_argument("--kafka", default="", help="a cluster, which is not killed; else one is started")
    given = options.parse_args()
    folder = Path(tempfile.mkdtemp(prefix=f"soak-{given.seed}-"))
    broker = GivenBroker(given.kafka) if given.kafka else start_broker(folder / "kafka")
    if not broker.apache:
        broker.stop()
        raise SystemExit(
            "Apache Kafka is needed: name a cluster with --kafka, or RIVERDELTA_TEST_KAFKA, or run Docker."
        )
    os.environ["HF_HUB_OFFLINE"] = "1"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # and end what was started
    soak = Soak(given.seed, given.kills, folder, broker, given.minutes)
    try:
        report = soak.run()
    except BaseException:
        tell(f"failed; logs and data are in {folder}")
        raise
    finally:
        if broker.killable:
            broker.stop()
    good = not (report["lost"] or report["doubled"] or report["problems"])
    if good:
        shutil.rmtree(folder)
    else:
        tell(f"logs and data are in {folder}")
    print(json.dumps({"seed": given.seed, **report}))
    raise SystemExit(0 if good else 1)


if __name__ == "__main__":
    main()
