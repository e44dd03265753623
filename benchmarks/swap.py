"""Swaps under load: what moving a release costs those who are being answered, and how soon the new version answers.

A server in a process of its own; clients that stream greedy answers from two adapters without pause, and one that
asks the moving one for single tokens; a hand that releases new random versions of it, every fifth move a rollback and
its resume. Phases with and without moves take turns, so that the machine's moods meet both. Every answer is checked
afterwards: it must equal the whole solo answer of the version that its fingerprint names. Without `--batch-invariant`
it may part from it where two tokens are closer than the engine's stated margin (`near_ties`); anything else is `wrong`.

    python -m benchmarks.swap [--base FOLDER] [--swaps 200] [--clients 8] [--tokens 48] [--batch-invariant]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import socket
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import httpx
import torch
import transformers

from benchmarks.load import linears_of
from benchmarks.machine import here
from riverdelta.core.settings import Kafka, Serving, Settings
from riverdelta.serving.engine.invariance import MARGIN
from tests.serving.hand import Hand, Linears, random_lora
from tests.tiny import make_tiny

RESULT = Path(__file__).parent / "results" / "swap.json"
PROMPTS = ["The river", "A delta is where", "Once upon a time", "In the beginning there was"]
SERVER = """
import sys
from riverdelta.core.settings import Settings
from riverdelta.serving.run import run
run(Settings.model_validate_json(sys.stdin.read()))
"""


@dataclass
class Seen:
    """What the clients saw."""

    gaps: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))  # by phase, seconds
    answers: set[tuple[str, str, str, tuple[str, ...]]] = field(default_factory=set)  # prompt, fingerprint, …
    first: dict[str, float] = field(default_factory=dict)  # by fingerprint, the time of its first token
    failed: int = 0
    phase: str = "warm-up"
    stop: bool = False


async def stream(
    client: httpx.AsyncClient, model: str, prompt: str, length: int, seen: Seen, keep: bool = True
) -> None:
    """One greedy answer, with the gaps between its tokens; `keep` it to be checked."""
    asked = {"model": model, "prompt": prompt, "max_tokens": length, "temperature": 0, "ignore_eos": True}
    text, tokens, fingerprint, last, whole = "", [], "", None, False
    async with client.stream("POST", "/v1/completions", json={**asked, "stream": True, "logprobs": 0}) as response:
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            at = time.monotonic()
            event = json.loads(line[6:])
            if response.status_code != 200 or "error" in event:
                break
            fingerprint = event["system_fingerprint"]
            seen.first.setdefault(fingerprint, at)
            choice = event["choices"][0]
            text += choice["text"]
            if choice["logprobs"] is not None:
                tokens += choice["logprobs"]["tokens"]
                if last is not None:
                    seen.gaps[seen.phase].append(at - last)
            last, whole = at, choice["finish_reason"] == "length"
    seen.failed += not whole
    if whole and keep:
        seen.answers.add((prompt, fingerprint, text, tuple(tokens)))


async def load(url: str, clients: int, tokens: int, seen: Seen) -> None:
    """Ask without pause."""

    async def probe() -> None:
        async with httpx.AsyncClient(base_url=url, timeout=120, trust_env=False) as client:
            while not seen.stop:
                await stream(client, "moving", PROMPTS[0], 1, seen, keep=False)

    async def one(number: int) -> None:
        async with httpx.AsyncClient(base_url=url, timeout=120, trust_env=False) as client:
            turn = number
            while not seen.stop:
                model = "moving" if number % 4 else "still"
                await stream(client, model, PROMPTS[turn % len(PROMPTS)], tokens, seen)
                turn += 1

    await asyncio.gather(probe(), *(one(number) for number in range(clients)))


def move(hand: Hand, number: int, linears: Linears, rank: int) -> str:
    """Release a new version, or roll back and resume: the digest that is to answer."""
    if number % 5 == 4:
        hand.ledger.rollback("moving", None, "bench")
        hand.ledger.resume("moving", "continue", "bench")
    else:
        hand.release("moving", data=random_lora(number, rank, 0.05, linears))
    return hand.digest("moving")


async def measure(url: str, hand: Hand, linears: Linears, options: argparse.Namespace) -> dict[str, Any]:
    """The phases, then the check."""
    seen = Seen()
    asking = asyncio.create_task(load(url, options.clients, options.tokens, seen))
    await asyncio.sleep(3)
    waits, number, known = [], 0, set()
    while number < options.swaps:
        seen.phase = "quiet"
        await asyncio.sleep(options.swaps_a_phase * options.every)
        seen.phase = "swapping"
        for _ in range(min(options.swaps_a_phase, options.swaps - number)):
            began = time.monotonic()
            digest = await asyncio.to_thread(move, hand, number, linears, options.rank)
            released = time.monotonic()
            new = digest not in known and digest not in seen.first
            while new and digest not in seen.first:
                await asyncio.sleep(0.001)
            if new:
                waits.append(seen.first[digest] - released)
            known.add(digest)
            number += 1
            await asyncio.sleep(max(0.0, options.every - (time.monotonic() - began)))
    seen.stop = True
    await asking
    margins = await _check(url, hand, options.tokens, seen)
    margin = 0.0 if options.batch_invariant else MARGIN["fp32"]
    quiet, swapping = seen.gaps["quiet"], seen.gaps["swapping"]
    return {
        "swaps": number,
        "failed": seen.failed,
        "wrong": sum(m > margin for m in margins),
        "near_ties": sum(m <= margin for m in margins),
        "answers": len(seen.answers),
        "versions_seen": len({fingerprint for _, fingerprint, *_ in seen.answers}),
        "quiet_p50_ms": _percentile(quiet, 50),
        "quiet_p99_ms": _percentile(quiet, 99),
        "p50_added_ms": _percentile(swapping, 50) - _percentile(quiet, 50),
        "p99_added_ms": _percentile(swapping, 99) - _percentile(quiet, 99),
        "release_to_first_token_p50_ms": _percentile(waits, 50),
        "release_to_first_token_p99_ms": _percentile(waits, 99),
    }


async def _check(url: str, hand: Hand, length: int, seen: Seen) -> list[float]:
    """Of each answer that is not the solo answer of the version that it names: by how much that version preferred
    another token where they part."""
    named = {
        record.digest: f"{name}@{number}"
        for name in ("moving", "still")
        for number, record in hand.ledger.versions(name).items()
    }
    margins = []
    async with httpx.AsyncClient(base_url=url, timeout=120, trust_env=False) as client:
        for prompt, fingerprint, text, said in sorted(seen.answers):
            asked = {"model": named[fingerprint], "prompt": prompt, "max_tokens": length, "temperature": 0}
            response = await client.post("/v1/completions", json={**asked, "ignore_eos": True, "logprobs": 20})
            answer = response.raise_for_status().json()["choices"][0]
            if answer["text"] == text:
                continue
            solo, margin = answer["logprobs"], math.inf
            for n, token in enumerate(solo["tokens"]):
                if said[n] != token:
                    margin = solo["token_logprobs"][n] - solo["top_logprobs"][n].get(said[n], -math.inf)
                    break
            margins.append(margin)
    return margins


def _percentile(seconds: list[float], share: int) -> float:
    return round(float(torch.tensor(seconds, dtype=torch.float64).quantile(share / 100)) * 1000, 3)


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, help="folder of a base model (default: a tiny random Llama)")
    parser.add_argument("--swaps", type=int, default=200)
    parser.add_argument("--swaps-a-phase", type=int, default=20)
    parser.add_argument("--every", type=float, default=0.25, help="seconds between two moves, at least")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--poll", type=float, default=0.1, help="how often the server reads the ledger, in seconds")
    parser.add_argument("--batch-invariant", action="store_true", help="serve so; no answer may then differ at all")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        base = options.base or make_tiny("llama", Path(folder) / "base")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        serving = Serving(
            port=port,
            dtype="float32",
            max_model_len=512,
            kv_tokens=16384,
            poll_seconds=options.poll,
            batch_invariant=options.batch_invariant,
        )
        settings = Settings(data=Path(folder) / "data", base=str(base), kafka=Kafka(), serving=serving)
        hand, linears = Hand(settings), linears_of(base)
        for n, name in enumerate(("moving", "still")):
            hand.adapter(name)
            hand.release(name, data=random_lora(10**6 + n, options.rank, 0.05, linears))
        server = subprocess.Popen([sys.executable, "-c", SERVER], stdin=subprocess.PIPE)
        try:
            assert server.stdin is not None
            server.stdin.write(settings.model_dump_json().encode())
            server.stdin.close()
            await_ready(settings.serving_url, server)
            result = asyncio.run(measure(settings.serving_url, hand, linears, options))
        finally:
            server.terminate()
            server.wait(30)
    result |= {
        "command": f"python -m benchmarks.swap {' '.join(sys.argv[1:])}".strip(),
        "date": str(date.today()),
        "clients": options.clients,
        "base": "tiny random Llama" if options.base is None else options.base.name,
        "batch_invariant": options.batch_invariant,
        "machine": {
            **here(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
            "transformers": transformers.__version__,
        },
    }
    RESULT.parent.mkdir(exist_ok=True)
    held = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    name = f"{result['base']}, batch-invariant" if options.batch_invariant else result["base"]
    RESULT.write_text(json.dumps({**held, name: result}, indent=1) + "\n")
    print(json.dumps(result))


def await_ready(url: str, server: subprocess.Popen[bytes]) -> None:
    """Return once it answers."""
    while True:
        if server.poll() is not None:
            raise SystemExit("the server did not start")
        try:
            if httpx.get(f"{url}/readyz", trust_env=False).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)


if __name__ == "__main__":
    main()
