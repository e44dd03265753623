"""A hand that does to a ledger and store what dataflow, trainer and operators do, with random adapters."""

import uuid
from collections.abc import Mapping, Sequence

import torch

from riverdelta.core import weights
from riverdelta.core.digests import seed_of
from riverdelta.core.keys import SubjectKey
from riverdelta.core.recipe import Recipe
from riverdelta.core.settings import Settings
from riverdelta.core.store import ObjectStore, weights_key
from riverdelta.registry.ledger import Increment, Ledger, Manifest, ManifestEntry, Seal

ACTOR = "test"
Linears = Mapping[str, tuple[int, int]]
TINY: Linears = {
    f"model.layers.{layer}.{name}": shape
    for layer in range(2)
    for name, shape in {
        "self_attn.q_proj": (64, 64),
        "self_attn.v_proj": (64, 32),
        "mlp.down_proj": (128, 64),
    }.items()
}


def random_lora(seed: int, rank: int = 4, strength: float = 0.6, linears: Linears = TINY) -> tuple[bytes, str]:
    """A weights file of a random adapter (by default for the tiny Llama), and its digest."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for path, (into, out) in linears.items():
        key = f"base_model.model.{path}"
        tensors[f"{key}.lora_A.weight"] = torch.randn(rank, into, generator=generator) * strength
        tensors[f"{key}.lora_B.weight"] = torch.randn(out, rank, generator=generator) * strength
    names = sorted({path.rpartition(".")[2] for path in linears})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": names}
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
        return SubjectKey.open(self.settings.keys_dir).subject(subject)

    def digest(self, name: str) -> str:
        """The digest that the adapter should answer with."""
        return self.ledger.releases()[name][1]
