"""What a flood costs others over HTTP: as `benchmarks.fairness`, with a server in a process of its own, API keys for
tenants, and streams.

The neighbour's clients are a process too, and read no more of an answer than its end, so that little of the machine
goes to asking. The tenant's time is from sending a request to the first of its stream.

    python -m benchmarks.fairness_http [--base tiny|gemma|FOLDER] [--rounds 5]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import random
import socket
import string
import subprocess
import sys
import tempfile
import time
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

from benchmarks.fairness import ANSWER, CLIENTS, FLOOD, FLOOD_ADAPTERS, NEIGHBOUR_ANSWER
from benchmarks.load import base_folder, in_parallel, linears_of, percentile
from benchmarks.machine import write_result
from benchmarks.swap import SERVER, await_ready
from riverdelta.core.settings import Kafka, Serving, Settings
from tests.serving.hand import Hand, random_lora

# Letters with spaces between them: a token each on the tiny base, one for two on Gemma.
PROMPT, NEIGHBOUR_PROMPT = 12, 150
KEYS = {"tenant": "the key of tenant", "neighbour": "the key of the neighbour"}


def asked(port: int, key: str, model: str, letters: int, answer: int, seed: random.Random) -> bytes:
    """The bytes of a request for a stream."""
    prompt = " ".join(seed.choices(string.ascii_lowercase, k=letters))
    wanted = {"model": model, "prompt": prompt, "max_tokens": answer, "temperature": 0}
    body = json.dumps({**wanted, "ignore_eos": True, "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nAuthorization: Bearer {KEYS[key]}\r\n"
    return f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


def crowd(port: int, neighbours: int, adapters: int, stop: Event) -> None:
    """A process: keep so many streams in flight until told to stop."""

    async def one(number: int) -> None:
        seed = random.Random(1000 + number)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while not stop.is_set():
            model = f"flood-{number % adapters}"
            writer.write(asked(port, "neighbour", model, NEIGHBOUR_PROMPT, NEIGHBOUR_ANSWER, seed))
            await _rest(reader)
        writer.close()

    async def all_of_them() -> None:
        await asyncio.gather(*(one(number) for number in range(neighbours)))

    asyncio.run(all_of_them())


async def _rest(reader: asyncio.StreamReader) -> None:
    """The rest of an answer, chunked or of a known length."""
    head = await reader.readuntil(b"\r\n\r\n")
    if b"200 OK" in head:
        await reader.readuntil(b"0\r\n\r\n")
    else:
        length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
        await reader.readexactly(int(length.partition(b":")[2]))
        await asyncio.sleep(0.01)


def first_token(sock: socket.socket, request: bytes) -> float:
    """Milliseconds to the first of a stream; returns at its end."""
    began = time.monotonic()
    sock.sendall(request)
    data, waited = b"", 0.0
    while not data.endswith(b"0\r\n\r\n"):
        piece = sock.recv(65536)
        assert piece, data
        data += piece
        if not waited and b"data: " in data:
            waited = (time.monotonic() - began) * 1000
    assert b'"finish_reason":"length"' in data, data
    return waited


def phase(port: int, neighbours: int, adapters: int, requests: int) -> list[float]:
    """The tenant's waits while a neighbour keeps so many requests in flight."""
    context = multiprocessing.get_context("fork")  # this process has one thread, and imports take seconds
    stop, waits = context.Event(), list[float]()
    others = context.Process(target=crowd, args=(port, neighbours, adapters, stop))
    if neighbours:
        others.start()
        time.sleep(1.5)

    def client(number: int) -> None:
        seed = random.Random(number)
        with socket.create_connection(("127.0.0.1", port), timeout=60) as sock:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for _ in range(requests // CLIENTS):
                waits.append(first_token(sock, asked(port, "tenant", "mine", PROMPT, ANSWER, seed)))

    in_parallel(CLIENTS, client)
    stop.set()
    if neighbours:
        others.join()
    return waits


def served(folder: Path, base: Path) -> Settings:
    """Settings of a server with keys, and a ledger that has the adapters."""
    (folder / "keys.toml").write_text(
        "\n".join(f'[[key]]\nname = "{name}"\nkey = "{key}"\nadapters = "*"' for name, key in KEYS.items())
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # A thread less than there are cores: who asks needs some of the machine too.
    threads = max(1, (os.cpu_count() or 2) - 1)
    keys = str(folder / "keys.toml")
    serving = Serving(port=port, api_keys=keys, adapter_slots=16, max_model_len=512, threads=threads)
    settings = Settings(data=folder / "data", base=str(base), kafka=Kafka(), serving=serving)
    hand, linears = Hand(settings), linears_of(base)
    for number, name in enumerate(("mine", *(f"flood-{n}" for n in range(FLOOD_ADAPTERS)))):
        hand.adapter(name)
        hand.release(name, data=random_lora(number, 8, 0.05, linears))
    hand.ledger.close()
    return settings


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="tiny")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=100, help="the tenant's, in each phase of each round")
    options = parser.parse_args()
    cases = {"alone": (0, 1), "neighbour": (CLIENTS, 1), "flood": (FLOOD, FLOOD_ADAPTERS)}
    waits: dict[str, list[float]] = {case: [] for case in cases}
    with tempfile.TemporaryDirectory() as scratch:
        base = base_folder(options.base, Path(scratch))
        settings = served(Path(scratch), base)
        port = settings.serving.port
        server = subprocess.Popen([sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL)
        try:
            assert server.stdin is not None
            server.stdin.write(settings.model_dump_json().encode())
            server.stdin.close()
            await_ready(settings.serving_url, server)
            phase(port, FLOOD, FLOOD_ADAPTERS, 20)  # brings the weights
            for number in range(options.rounds):
                for case, (neighbours, adapters) in cases.items():
                    found = phase(port, neighbours, adapters, options.requests)
                    waits[case] += found
                    print(f"round {number}, {case}: p99 {percentile(found, 99)} ms", file=sys.stderr, flush=True)
        finally:
            server.terminate()
            server.wait(30)
    figures: dict[str, Any] = {}
    for case, found in waits.items():
        figures |= {f"{case}_p50_ms": percentile(found, 50), f"{case}_p99_ms": percentile(found, 99)}
    figures["flood_ratio"] = round(figures["flood_p99_ms"] / figures["neighbour_p99_ms"], 2)
    figures["flood_to_alone"] = round(figures["flood_p99_ms"] / figures["alone_p99_ms"], 2)
    figures |= {"base": base.name if options.base != "tiny" else "tiny random Llama", "flood": FLOOD}
    write_result("fairness_http", f"python -m benchmarks.fairness_http {' '.join(sys.argv[1:])}".strip(), figures)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
