"""Clients in a process of their own, which stream answers from servers without pause.

    python -m tests.serving.asking FILE CLIENTS TOKENS MODEL,MODEL... URL...

Each answer, whole or cut, adds a byte to the file.
"""

import asyncio
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import httpx


class Load:
    """Running clients, spread over the servers."""

    def __init__(self, urls: Sequence[str], models: Sequence[str], clients: int, tokens: int, count: Path) -> None:
        self._count = count
        words = [str(count), str(clients), str(tokens), ",".join(models), *urls]
        self._process = subprocess.Popen([sys.executable, "-m", "tests.serving.asking", *words])

    @property
    def answered(self) -> int:
        """Requests that have ended so far."""
        return self._count.stat().st_size if self._count.exists() else 0

    def stop(self) -> None:
        """End them."""
        self._process.kill()
        self._process.wait()


async def ask(url: str, models: Sequence[str], number: int, tokens: int, count: int) -> None:
    """One client: stream answers, one after the other, for ever."""
    while True:
        async with httpx.AsyncClient(base_url=url, timeout=10, trust_env=False) as client:
            try:
                while True:
                    asked = {"model": models[number % len(models)], "prompt": f"client {number}", "max_tokens": tokens}
                    body = {**asked, "stream": True, "ignore_eos": True}
                    async with client.stream("POST", "/v1/completions", json=body) as response:
                        async for _ in response.aiter_lines():
                            pass
                    os.write(count, b".")
                    number += len(models) + 1
            except httpx.TransportError:
                await asyncio.sleep(0.05)


async def main(count: str, clients: str, tokens: str, models: str, *urls: str) -> None:
    """Ask until killed."""
    file = os.open(count, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    await asyncio.gather(
        *(
            ask(urls[number % len(urls)], models.split(","), number // len(urls), int(tokens), file)
            for number in range(int(clients))
        )
    )


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
