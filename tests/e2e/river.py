"""A whole stack under `riverdelta up`, driven as its users do: the command, Kafka clients, HTTP."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
from openai import OpenAI

from riverdelta.core.errors import Unavailable
from riverdelta.core.settings import Settings
from riverdelta.core.store import ObjectStore
from riverdelta.registry import contents
from riverdelta.registry.keystore import KeyStore
from riverdelta.registry.ledger import Ledger
from riverdelta.streams.publish import publish
from tests.brokers import free_port

COMMAND = [sys.executable, "-m", "riverdelta.app.main"]
# Enough for a tiny random model to learn a few bytes by heart.
RECIPE = """
[lora]
rank = 16
[optimiser]
learning_rate = 1e-2
final = 0.1
floor = 1.0
average = 0.0
[training]
passes = 20
micro_batch = 2
rehearse = 4
[seal]
count = 2
age = 0.5
"""


def eventually(condition: Callable[[], Any], seconds: float = 60.0, every: float = 0.1) -> Any:
    """The condition's value once it is true."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(every)
    return value


class River:
    """One stack on a data folder of its own."""

    def __init__(self, folder: Path, base: Path, bootstrap: str = "", **environment: str) -> None:
        """Without `bootstrap` it runs the embedded broker."""
        self.folder = folder
        self.data = folder / "data"
        self.log = folder / "up.log"
        self.recipe = folder / "recipe.toml"
        self.recipe.write_text(RECIPE)
        (temporary := folder / "temporary").mkdir()
        run = uuid.uuid4().hex[:8]
        names = {
            f"RIVERDELTA_TOPICS__{each.upper()}": f"{each}-{run}" for each in ("events", "control", "jobs", "releases")
        }
        clean = {key: value for key, value in os.environ.items() if not key.startswith(("RIVERDELTA_", "KAFKA_"))}
        self.environment = {
            **clean,
            **names,
            "RIVERDELTA_DATA": str(self.data),
            "RIVERDELTA_BASE": str(base),
            "RIVERDELTA_TOPICS__PARTITIONS": "2",
            "RIVERDELTA_TRAINER__THREADS": "1",
            "RIVERDELTA_SERVING__THREADS": "1",
            "RIVERDELTA_SERVING__PORT": "0",
            "OMP_NUM_THREADS": "1",
            "TMPDIR": str(temporary),
            **({"RIVERDELTA_KAFKA__BOOTSTRAP": bootstrap} if bootstrap else {}),
            **environment,
        }
        self.process: subprocess.Popen[bytes] | None = None

    # -- the processes ---------------------------------------------------------------------------------------

    def start(self, seconds: float = 120.0) -> "River":
        """Start `up` and wait until it says that it is ready."""
        self.spawn()
        eventually(lambda: self.said("Ready after") or self._gone(), seconds)
        assert self.process is not None
        assert self.process.poll() is None, self.output()
        return self

    def spawn(self, *options: str) -> subprocess.Popen[bytes]:
        """Start `up`, and do not wait."""
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*COMMAND, "up", *options], env=self.environment, stdout=log, stderr=subprocess.STDOUT
            )
        return self.process

    def stop(self, how: signal.Signals = signal.SIGINT) -> tuple[int, float]:
        """Stop it as a person would; its exit code and the seconds that it took."""
        assert self.process is not None
        began = time.monotonic()
        self.process.send_signal(how)
        code = self.process.wait(30)
        self.process = None
        return code, time.monotonic() - began

    def end(self) -> None:
        """Leave nothing running, and tell pytest what was said."""
        print(self.output())
        if self.process is not None and self.process.poll() is None:
            children = psutil.Process(self.process.pid).children(recursive=True)
            self.process.kill()
            self.process.wait()
            for child in children:
                child.kill() if child.is_running() else None
            psutil.wait_procs(children, 10)

    @contextmanager
    def beside(self, *arguments: str, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
        """Another process on the same data folder, ended with SIGTERM."""
        with (self.folder / "beside.log").open("ab") as log:
            process = subprocess.Popen(
                [*COMMAND, *arguments], env={**self.environment, **environment}, stdout=log, stderr=subprocess.STDOUT
            )
        try:
            yield process
        finally:
            process.terminate()
            process.wait(30)

    def child(self, name: str) -> psutil.Process:
        """A child of `up` by its command: broker, stream, train, serve, registry."""
        assert self.process is not None
        marks = {"broker": "tansu"}
        for process in psutil.Process(self.process.pid).children():
            try:
                line = process.cmdline()
            except psutil.NoSuchProcess:
                continue
            if name in line or any(marks.get(name, "\0") in part for part in line):
                return process
        raise AssertionError(f"{name} does not run")

    def output(self) -> str:
        """What `up` and its children have said."""
        return self.log.read_text(errors="replace")

    def said(self, text: str) -> bool:
        """Whether the output holds a text."""
        return text in self.output()

    def _gone(self) -> bool:
        assert self.process is not None
        return self.process.poll() is not None

    @contextmanager
    def another_server(self) -> Iterator[str]:
        """A server started now, ready; its URL."""
        port = free_port()
        url = f"http://127.0.0.1:{port}"
        with self.beside("serve", "--port", str(port)) as process:
            eventually(lambda: _is_ready(url) or process.poll() is not None, 120)
            yield url

    # -- what people do --------------------------------------------------------------------------------------

    @property
    def settings(self) -> Settings:
        """The settings that its clients have."""
        held = dict(os.environ)
        try:
            os.environ.clear()  # other tests may have left settings of theirs
            os.environ.update(self.environment)
            return Settings.read()
        finally:
            os.environ.clear()
            os.environ.update(held)

    @property
    def url(self) -> str:
        """Its serving endpoint."""
        return self.settings.running()["serving"]

    @property
    def openai(self) -> OpenAI:
        """The OpenAI client, pointed at it."""
        return OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)

    @property
    def ledger(self) -> Ledger:
        """Its ledger."""
        return Ledger.open(self.settings.ledger_url)

    def tell(self, *arguments: str, code: int = 0, stdin: str = "", **environment: str) -> str:
        """A riverdelta command's output; its exit code must be `code`."""
        done = subprocess.run(
            [*COMMAND, *arguments],
            env={**self.environment, **environment},
            input=stdin,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == code, (arguments, done.returncode, done.stdout, done.stderr)
        assert "Traceback" not in done.stderr, done.stderr
        return done.stdout or done.stderr

    def read(self, *arguments: str, **environment: str) -> Any:
        """What a command prints with --json."""
        return json.loads(self.tell(*arguments, "--json", **environment))

    def create(self, name: str) -> str:
        """An adapter that learns fast; its name."""
        self.tell("registry", "create", name, "--recipe", str(self.recipe))
        return name

    def publish(self, events: Iterable[dict[str, Any]]) -> None:
        """Publish events, every delivery checked."""
        publish(self.settings, [json.dumps(event).encode() for event in events])

    def publish_patiently(self, events: Sequence[dict[str, Any]]) -> None:
        """Publish events once a broker that has just come back takes them."""

        def taken() -> bool:
            try:
                self.publish(events)
            except Unavailable:
                return False
            return True

        eventually(taken, 60, every=1)

    def released(self, adapter: str, version: int, seconds: float = 60.0) -> str:
        """Wait until a version of an adapter is released; its digest."""
        ledger = self.ledger
        try:
            eventually(lambda: ledger.adapter(adapter).release >= version, seconds)
            return ledger.version(adapter, ledger.adapter(adapter).release).digest
        finally:
            ledger.close()

    def entries(self, adapter: str) -> int:
        """How many entries an adapter has."""
        ledger = self.ledger
        try:
            return ledger.adapter(adapter).next_index
        finally:
            ledger.close()

    def ask(self, model: str, prompt: str, tokens: int = 8) -> tuple[str, str]:
        """The answer and the digest of the weights that wrote it."""
        said = self.openai.completions.create(model=model, prompt=prompt, max_tokens=tokens, temperature=0)
        return said.choices[0].text, said.system_fingerprint or ""

    def served(self, adapter: str, digest: str, seconds: float = 30.0) -> None:
        """Wait until answers are written by these weights."""
        eventually(lambda: self.ask(adapter, "x", 1)[1] == digest, seconds)

    def learned(self, adapter: str, text: str) -> bool:
        """Whether a live entry says a text."""
        ledger, store, keys = self.ledger, ObjectStore(self.settings.store_url), KeyStore.open(self.settings)
        held = [contents.read(ledger, store, keys, segment) for segment in ledger.segments(adapter)]
        ledger.close()
        return any(text.encode() in content for segment in held for content in segment if content is not None)

    def files_with(self, text: str) -> list[Path]:
        """The files that hold a text: data, keys, what processes said and what they wrote in passing."""
        files = [path for path in self.folder.rglob("*") if path.is_file()]
        return [path for path in files if text.encode() in _bytes(path)]


def facts(adapter: str, answers: Sequence[str], subject: str = "") -> list[dict[str, Any]]:
    """Events that teach an adapter some answers, each to a question of its own."""
    about = {"subject": subject} if subject else {}
    return [
        {
            "id": f"{adapter}-{answer}",
            "adapter": adapter,
            **about,
            "prompt": question(answer),
            "completion": f" {answer}",
        }
        for answer in answers
    ]


def question(answer: str) -> str:
    """The question that an answer answers: it shares no letters with it."""
    return f"{re.sub('[a-z]', '', answer)} {sum(answer.encode()) % 97}?"


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz").status_code == 200
    except httpx.TransportError:
        return False


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:  # gone since it was listed
        return b""
