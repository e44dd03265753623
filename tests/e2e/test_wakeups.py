"""The topics jobs and releases lose every message: the processes, run by hand, still find their work."""

from contextlib import ExitStack
from pathlib import Path

import httpx

from riverdelta.streams import topics
from tests.brokers import Broker, free_port

from .river import River, eventually, facts, question


def test_nobody_hears_anybody(tmp_path: Path, tiny_base: Path, broker_process: Broker) -> None:
    river = River(tmp_path, tiny_base, broker_process.bootstrap)
    topics.ensure(river.settings)
    river.create("deaf")
    url = f"http://127.0.0.1:{(port := free_port())}"
    with ExitStack() as running:
        for name, options in (("stream", []), ("train", []), ("serve", ["--port", str(port)])):
            deaf = {f"RIVERDELTA_TOPICS__{topic}": f"{topic}-of-{name}".lower() for topic in ("JOBS", "RELEASES")}
            running.enter_context(river.beside(name, *options, **deaf))
        river.publish(facts("deaf", ["a1", "b2"]))
        digest = river.released("deaf", 1, 120)
        asked = {"model": "deaf", "prompt": question("a1"), "max_tokens": 8, "temperature": 0}

        def answer() -> bool:
            try:
                said = httpx.post(f"{url}/v1/completions", json=asked, timeout=60).json()
            except httpx.TransportError:
                return False
            return said.get("system_fingerprint") == digest and said["choices"][0]["text"] == " a1"

        eventually(answer, 60)
