"""A dataflow process under test, and what the ledger holds of what it did."""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from riverdelta.core.settings import Settings
from riverdelta.core.store import ObjectStore
from riverdelta.registry import contents
from riverdelta.registry.keystore import KeyStore
from riverdelta.registry.ledger import Ledger

_RUN = "import sys, json; from riverdelta.core.settings import Settings; from riverdelta.streams.cluster import run; "
_RUN += "run(Settings(**json.load(sys.stdin)))"


class Flow:
    """One `riverdelta.streams.run` in a process of its own; its log is in `log`."""

    def __init__(self, settings: Settings, log: Path) -> None:
        self._settings, self.log = settings, log
        self.start()

    def start(self) -> None:
        with self.log.open("ab") as sink:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _RUN], stdin=subprocess.PIPE, stdout=sink, stderr=sink, start_new_session=True
            )
        assert self.process.stdin is not None
        self.process.stdin.write(self._settings.model_dump_json().encode())
        self.process.stdin.close()

    def kill(self) -> None:
        """SIGKILL, workers included."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(20)

    def told(self, words: str) -> bool:
        """Whether the log says so."""
        return words in self.log.read_text()


@contextmanager
def flowing(settings: Settings, folder: Path) -> Iterator[Flow]:
    """A running dataflow, killed at the end if it still runs."""
    flow = Flow(settings, folder / "stream.log")
    try:
        yield flow
    except BaseException:
        print(flow.log.read_text()[-4000:])
        raise
    finally:
        if flow.process.poll() is None:
            flow.kill()


def until(true: Callable[[], bool], seconds: float = 60.0) -> None:
    """Return once something is so."""
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds} s")
        time.sleep(0.05)


def entries(settings: Settings, ledger: Ledger, adapter: str) -> list[tuple[tuple[int, int], dict[str, Any] | None]]:
    """The (partition, offset) and content (None for a tombstone) of every sealed entry, in index order."""
    store, keys = ObjectStore(settings.store_url), KeyStore.open(settings)
    found = []
    for segment, manifest in ledger.manifests(adapter):
        for entry, content in zip(manifest.entries, contents.read(ledger, store, keys, segment), strict=True):
            said = None if content is None or entry.tombstone else msgspec.json.decode(content)
            found.append(((entry.partition, entry.offset), said))
    return found


def count(ledger: Ledger) -> int:
    """How many entries all adapters have."""
    return sum(head.next_index for head in ledger.adapters())


def texts(settings: Settings, ledger: Ledger, adapter: str) -> Counter[str]:
    """How often each text was learned."""
    return Counter(said["text"] for _, said in entries(settings, ledger, adapter) if said)
