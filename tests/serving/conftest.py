"""A real server over a real ledger and store."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from riverdelta.core.settings import Kafka, Serving, Settings
from riverdelta.serving.listening import bind
from riverdelta.serving.run import HttpServer
from riverdelta.serving.server import Server

from .hand import Hand

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
    "lease_seconds": 10.0,
    "poll_seconds": 0.02,
}


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


def stock(settings: Settings) -> None:
    """Make the adapters that `shared` has."""
    hand = Hand(settings)
    for name, versions in (("acme", 2), ("beta", 1), ("empty", 0)):
        hand.adapter(name, versions)


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Iterator[Running]:
    """A server for tests that change nothing: `acme` has versions 1 and 2, `beta` 1, `empty` none."""
    settings = small_settings(tmp_path_factory.mktemp("shared"), tiny_base, batch_invariant=True)
    stock(settings)
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
