"""A ledger and store with real payloads and weights, without a trainer: increments are digests of what they saw."""

import time
import uuid
from collections.abc import Callable, Sequence

import torch

from riverdelta.core import weights
from riverdelta.core.digests import seed_of
from riverdelta.core.keys import SubjectKey
from riverdelta.core.recipe import Recipe
from riverdelta.core.settings import Settings
from riverdelta.core.store import ObjectStore, state_key, weights_key
from riverdelta.registry import contents
from riverdelta.registry.keystore import KeyStore
from riverdelta.registry.ledger import Increment, Ledger, Manifest, ManifestEntry, Seal, SegmentRecord

PREFIX = "base_model.model.model.layers.0.self_attn.q_proj.lora_"


class Stack:
    """What streams and trainer leave behind, made by hand."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.ledger = Ledger.open(settings.ledger_url)
        self.store = ObjectStore(settings.store_url)
        self.keys = KeyStore.open(settings)
        self.key = SubjectKey.open(settings.keys_dir)

    def seal(self, adapter: str, entries: Sequence[tuple[str, str]]) -> SegmentRecord:
        """A segment of (subject, text), on one partition."""
        head = self.ledger.adapter(adapter)
        suppressed = self.ledger.suppressed(adapter)
        subjects = [self.key.subject(subject) for subject, _ in entries]
        said = [
            None if subject in suppressed else b'{"type":"example","text":"%s"}' % text.encode()
            for subject, (_, text) in zip(subjects, entries, strict=True)
        ]
        listed = tuple(
            ManifestEntry(0, 0, head.next_index + i, subjects=(subject,), tombstone=said[i] is None)
            for i, subject in enumerate(subjects)
        )
        place = {("run", 0): (head.next_index, head.next_index + len(entries))}
        keys = uuid.uuid4().hex
        made = contents.encrypt(keys, Manifest(("run",), listed), said)
        key = f"segments/{adapter}/{keys}.seg"
        self.keys.add({keys: made.keys})
        self.store.put(key, made.data)
        first = head.next_index
        seal = Seal(adapter, head.epoch, first, made.manifest, "count", key, made.digest, place, keys, made.root)
        [segment] = self.ledger.seal([seal], "stream")
        assert isinstance(segment, SegmentRecord), segment
        return segment

    def train(self, adapter: str) -> int:
        """Every waiting increment; how many there were."""
        done = 0
        while work := self.ledger.work(adapter):
            held = contents.read(self.ledger, self.store, self.keys, work.segment)
            seen = [None if content is None else str(content) for content in held]
            parent = work.parent.digest if work.parent else ""
            generator = torch.Generator().manual_seed(seed_of(parent, str(seen)))
            tensors = {
                f"{PREFIX}A.weight": torch.randn(2, 64, generator=generator),
                f"{PREFIX}B.weight": torch.randn(64, 2, generator=generator),
            }
            config = {
                "peft_type": "LORA",
                "r": 2,
                "lora_alpha": 4,
                "target_modules": ["q_proj"],
                "task_type": "CAUSAL_LM",
            }
            data, digest = weights.encode(config, tensors)
            state, state_digest = weights.encode({}, {"step": torch.tensor([float(work.segment.number)])})
            self.store.put(weights_key(digest), data)
            self.store.put(state_key(state_digest), state)
            made = Increment(
                adapter,
                work.segment.number,
                work.adapter.epoch,
                work.adapter.tip,
                digest,
                state_digest,
                (),
                {},
                {"losses": [2.0, 1.0], "steps": 2, "prequential": 2.5, "rejected": 0},
            )
            self.ledger.commit(made, "trainer")
            done += 1
        return done


def two_versions(settings: Settings) -> Stack:
    """`acme` with two versions: bob's in the first and the second, ann's in the second only."""
    stack = Stack(settings)
    stack.ledger.create("acme", Recipe(), "test")
    stack.seal("acme", [("bob", "canary-bob-one"), ("bob", "canary-bob-two")])
    stack.seal("acme", [("ann", "canary-ann-secret"), ("bob", "canary-bob-three")])
    stack.train("acme")
    return stack


def wait(condition: Callable[[], object], seconds: float) -> bool:
    """Whether a condition has come true within some time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True
