"""A real server over a real ledger and store, and a hand that releases random adapters on them."""

import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from riverdelta.core import weights
from riverdelta.core.digests import seed_of
from riverdelta.core.recipe import Recipe
from riverdelta.core.settings import Kafka, Serving, Settings
from riverdelta.core.store import ObjectStore, weights_key
from riverdelta.registry.ledger import Increment, Ledger, Manifest, ManifestEntry, Seal
from riverdelta.serving.run import HttpServer, bind
from riverdelta.serving.server import Server

ACTOR = "test"
LINEARS = {"q_proj": (64, 64), "v_proj": (64, 32), "down_proj": (128, 64)}
SMALL: dict[str, Any] = {
    "port": 0,
    "dtype": "float32",
    "max_batch": 8,
    "max_model_len": 256,
    "kv_tokens": 4096,
    "prefill_chunk": 64,
    "adapter_slots": 4,
    "max_rank": 8,
    "max_queue": 64,
    "lease_seconds": 2.0,
    "poll_seconds": 0.02,
}


def random_lora(seed: int, rank: int = 4, strength: float = 0.6) -> tuple[bytes, str]:
    """A weights file of a random adapter for the tiny Llama, and its digest."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(2):
        for name, (into, out) in LINEARS.items():
            part = "mlp" if name == "down_proj" else "self_attn"
            key = f"base_model.model.model.layers.{layer}.{part}.{name}"
            tensors[f"{key}.lora_A.weight"] = torch.randn(rank, into, generator=generator) * strength
            tensors[f"{key}.lora_B.weight"] = torch.randn(out, rank, generator=generator) * strength
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": sorted(LINEARS)}
    return weights.encode(config, tensors)


class Hand:
    """Does to a ledger and store what dataflow, trainer and operators do."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.ledger = Ledger.open(settings.ledger_url)
        self.store = ObjectStore(settings.store_url)

    def adapter(self, name: str, versions: int = 0) -> str:
        """Create an adapter with that many versions."""
        self.ledger.create(name, Recipe(), ACTOR)
        for _ in range(versions):
            self.release(name)
        return name

    def release(self, name: str, subjects: Sequence[str] = ("nobody",), data: tuple[bytes, str] | None = None) -> str:
        """Seal a segment about these subjects (plain names) and commit random weights for it: their digest."""
        head = self.ledger.adapter(name)
        hashes = tuple(sorted(self.hashed(subject) for subject in subjects))
        manifest = Manifest(("run",), (ManifestEntry(0, 0, head.next_index, subjects=hashes),))
        sealed = self.ledger.seal(
            [Seal(name, head.epoch, head.next_index, manifest, "count", f"segments/{uuid.uuid4()}", "", {})], ACTOR
        )[0]
        if isinstance(sealed, Exception):
            raise sealed
        return self.train(name, data)

    def train(self, name: str, data: tuple[bytes, str] | None = None) -> str:
        """Commit random (or given) weights for the adapter's next awaiting segment: their digest."""
        work = self.ledger.work(name)
        assert work is not None
        head = work.adapter
        data = data or random_lora(seed_of(name, head.next_version, head.epoch))
        self.store.put(weights_key(data[1]), data[0])
        self.ledger.commit(
            Increment(name, work.segment.number, head.epoch, head.tip, data[1], "", (work.segment.number,), {}), ACTOR
        )
        return data[1]

    def hashed(self, subject: str) -> str:
        """A subject as the ledger knows it."""
        from riverdelta.core.keys import SubjectKey

        return SubjectKey.open(self.settings.keys_dir).subject(subject)

    def digest(self, name: str) -> str:
        """The digest that the adapter should answer with."""
        return self.ledger.releases()[name][1]


class Running:
    """A server in a thread, with clients for it."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.server = Server(settings)
        self.http = HttpServer(self.server, bind(settings.serving.host, settings.serving.port))
        self.url = self.http.url
        self.thread = threading.Thread(target=self.http.run_until_stopped, daemon=True)
        self.thread.start()
        self.client = httpx.Client(base_url=self.url, timeout=60, trust_env=False)
        eventually(lambda: self.server.failure or self.client.get("/readyz").status_code == 200)
        assert self.server.failure is None, self.server.failure

    def complete(self, model: str, prompt: Any = "hello", **more: Any) -> httpx.Response:
        """POST /v1/completions, greedy unless told otherwise."""
        body = {"model": model, "prompt": prompt, "temperature": 0, "max_tokens": 8, "ignore_eos": True, **more}
        return self.client.post("/v1/completions", json=body)

    def answer(self, model: str, prompt: Any = "hello", **more: Any) -> dict[str, Any]:
        """The JSON of a completion that must succeed."""
        response = self.complete(model, prompt, **more)
        assert response.status_code == 200, response.text
        held: dict[str, Any] = response.json()
        return held

    def stop(self) -> None:
        """Stop and wait."""
        self.client.close()
        self.http.stop()
        self.thread.join(timeout=10)
        assert not self.thread.is_alive()


def eventually(true: Callable[[], Any], seconds: float = 30.0) -> Any:
    """Wait until something is so."""
    deadline = time.monotonic() + seconds
    while not (held := true()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)
    return held


def small_settings(folder: Path, base: Path, **serving: Any) -> Settings:
    """Settings for a small server without a broker."""
    return Settings(data=folder / "data", base=str(base), kafka=Kafka(), serving=Serving(**{**SMALL, **serving}))


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Iterator[Running]:
    """A server for tests that change nothing: `acme` has versions 1 and 2, `beta` 1, `empty` none."""
    settings = small_settings(tmp_path_factory.mktemp("shared"), tiny_base, batch_invariant=True)
    hand = Hand(settings)
    for name, versions in (("acme", 2), ("beta", 1), ("empty", 0)):
        hand.adapter(name, versions)
    running = Running(settings)
    yield running
    running.stop()


@pytest.fixture
def hand(tmp_path: Path, tiny_base: Path) -> Hand:
    """A fresh ledger and store."""
    return Hand(small_settings(tmp_path, tiny_base))


@pytest.fixture
def serve() -> Iterator[Callable[[Settings], Running]]:
    """Starts servers, and stops them after the test."""
    running: list[Running] = []

    def start(settings: Settings) -> Running:
        running.append(Running(settings))
        return running[-1]

    yield start
    for one in running:
        if one.thread.is_alive():
            one.stop()
