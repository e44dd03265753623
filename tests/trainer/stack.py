"""A real ledger and store in a folder, and the acts of streams and operators on them, without a broker."""

import hashlib
import threading
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

from riverdelta.core.recipe import Recipe
from riverdelta.core.store import ObjectStore
from riverdelta.registry import contents
from riverdelta.registry.keystore import KeyStore
from riverdelta.registry.ledger import Forget, Ledger, Manifest, ManifestEntry, Seal, SegmentRecord
from riverdelta.trainer.base import Base
from riverdelta.trainer.metrics import Metrics
from riverdelta.trainer.worker import Worker


def hashed(subject: str) -> str:
    """A subject as the ledger knows it."""
    return hashlib.sha256(subject.encode()).hexdigest()


class Stack:
    """A ledger, a store, and the next offset of every adapter."""

    def __init__(self, folder: Path, ledger_url: str = "") -> None:
        self.folder = folder
        self.ledger_url = ledger_url or f"sqlite:///{folder}/ledger.db"
        self.store_url = f"file://{folder}/store"
        self.ledger = Ledger.open(self.ledger_url)
        self.store = ObjectStore(self.store_url)
        self.keys = KeyStore(f"sqlite:///{folder}/keys/keys.db", bytes(32))

    def create(self, name: str, recipe: Recipe) -> None:
        """Make an adapter."""
        self.ledger.create(name, recipe, "test")

    def seal(self, name: str, said: Sequence[bytes | None], subjects: Sequence[str | tuple[str, ...]]) -> SegmentRecord:
        """Append a segment as the dataflow does: suppressed subjects arrive as tombstones. An entry is about one
        subject, or some, or nobody."""
        about = [tuple(sorted(hashed(each) for each in ((who,) if isinstance(who, str) else who))) for who in subjects]
        head = self.ledger.adapter(name)
        gone = self.ledger.suppressed(name)
        held = [content if gone.isdisjoint(whose) else None for content, whose in zip(said, about, strict=True)]
        entries = tuple(
            ManifestEntry(0, 0, head.next_index + place, b"", whose, content is None)
            for place, (content, whose) in enumerate(zip(held, about, strict=True))
        )
        first = head.next_index
        keys = uuid.uuid4().hex
        made = contents.encrypt(keys, Manifest(("run",), entries), held)
        key = f"segments/{name}/{keys}.seg"
        self.keys.add({keys: made.keys})
        self.store.put(key, made.data)
        moved = {("run", 0): (first, first + len(entries))}
        seal = Seal(name, head.epoch, first, made.manifest, "count", key, made.digest, moved, keys, made.root)
        (segment,) = self.ledger.seal([seal], "test")
        assert isinstance(segment, SegmentRecord), segment
        return segment

    def worker(self, base: Base, holder: str = "t0", released: Callable[[str], None] = str, most: int = 16) -> Worker:
        """A trainer on this stack."""
        return Worker(
            self.ledger,
            self.store,
            self.keys,
            base,
            self.folder / "trainer",
            holder,
            threading.Event(),
            released,
            Metrics(),
            most,
        )

    def forget(self, name: str, subject: str) -> Forget:
        """Forget a subject in one adapter."""
        return self.ledger.forget(uuid.uuid4().hex, hashed(subject), [name], "test")

    def allow(self, name: str, subject: str) -> bool:
        """End a suppression; whether there was one."""
        return bool(self.ledger.allow(hashed(subject), [name], "test"))
