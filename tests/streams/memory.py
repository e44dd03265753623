"""An in-memory ledger, store and dead-letter topic with what the dataflow uses of the real ones."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from riverdelta.core.digests import seed_of
from riverdelta.core.errors import Conflict, NotFound, Refused
from riverdelta.core.recipe import Recipe
from riverdelta.registry.ledger import AdapterRecord, Cause, Manifest, Outcome, Seal, SegmentRecord
from riverdelta.registry.ledger.decisions import decide_seal
from riverdelta.streams.items import DeadLetter, Where


class MemoryLedger:
    """The ledger's rules for sealing, suppression, fences and leases, with the real decision functions."""

    def __init__(self) -> None:
        self.heads: dict[str, AdapterRecord] = {}
        self.log: dict[str, list[tuple[SegmentRecord, Manifest]]] = {}
        self.moved: dict[str, dict[Where, int]] = {}
        self.places: dict[tuple[str, int, int], int] = {}
        self.lists: dict[str, set[str]] = {}
        self.ends: dict[str, dict[str, dict[Where, int]]] = {}
        self.revoked: set[str] = set()
        self.procedures: list[Any] = []
        self.held: dict[str, int] = {}

    def create(self, name: str, recipe: Recipe, actor: str, reason: str = "", cap: int | None = None) -> AdapterRecord:
        if name in self.heads:
            raise Conflict(f"{name} exists")
        if cap is not None and len(self.heads) >= cap:
            raise Refused(f"{cap} adapters exist")
        self.heads[name] = AdapterRecord(name, recipe.to_dict(), recipe.digest, seed_of(name), "now", head=1)
        self.log[name], self.moved[name] = [], {}
        return self.heads[name]

    def adapter(self, name: str) -> AdapterRecord:
        if name not in self.heads:
            raise NotFound(f"no {name}")
        return self.heads[name]

    def seal(
        self, seals: Sequence[Seal], actor: str, look: Callable[[], None] | None = None
    ) -> list[SegmentRecord | Exception]:
        if look is not None:
            look()  # nobody else acts meanwhile, so first is as good as last
        done: list[SegmentRecord | Exception] = []
        refusals: dict[str, Exception] = {}
        for seal in seals:
            result = refusals.get(seal.adapter) or self._seal(seal)
            if isinstance(result, Exception):
                refusals[seal.adapter] = result
            done.append(result)
        return done

    def _seal(self, seal: Seal) -> SegmentRecord | Exception:
        try:
            head = self.adapter(seal.adapter)
            change = decide_seal(head, seal.epoch, seal.first, len(seal.manifest.entries), 0, seal.trigger)
            for where, (expected, _) in seal.consumed.items():
                if self.moved[head.name].get(where, 0) != expected:
                    raise Conflict(f"{where} is at {self.moved[head.name].get(where, 0)}, not {expected}")
        except (Conflict, NotFound) as refused:
            return refused
        segment = SegmentRecord(
            head.name, head.next_segment, seal.first, len(seal.manifest.entries), seal.trigger, seal.payload,
            seal.payload_sha, "now", Outcome.AWAITING, cause=Cause.NONE, keyring=seal.keyring, root=seal.root,
        )  # fmt: skip
        self.moved[head.name].update({where: to for where, (_, to) in seal.consumed.items()})
        self.heads[head.name] = replace(change.adapter, head=head.head + 1)
        self.log[head.name].append((segment, Manifest.unpack(seal.manifest.pack())))
        return segment

    def consumed(self, adapter: str) -> dict[Where, int]:
        return dict(self.moved[adapter])

    def segments(self, adapter: str, first: int = 1) -> list[SegmentRecord]:
        return [segment for segment, _ in self.log[adapter] if segment.number >= first]

    def behind(self, names: Sequence[str]) -> set[str]:
        return {name for name in names if self.log.get(name)}

    def drifting(self, names: Sequence[str]) -> set[str]:
        return {name for name in names if len(self.log.get(name, ())) % 3 == 0}

    def manifests(self, adapter: str, index: int = 0) -> list[tuple[SegmentRecord, Manifest]]:
        return [(segment, held) for segment, held in self.log[adapter] if segment.first + segment.count > index]

    def delete_unnamed(self, keys: Collection[str], delete: Callable[[str], None]) -> None:
        sealed = [segment for log in self.log.values() for segment, _ in log]
        named = {segment.payload for segment in sealed} | {f"keys/{segment.keyring}" for segment in sealed}
        for key in set(keys) - named:
            delete(key)

    def move_positions(self, moves: Mapping[tuple[str, int, int], int]) -> None:
        self.places.update(moves)

    def positions(self, incarnation: str) -> dict[tuple[int, int], int]:
        return {(part, bucket): at for (run, part, bucket), at in self.places.items() if run == incarnation}

    def forget(self, subject: str, adapters: Collection[str], digests: Collection[str] = ()) -> None:
        """`digests` are of versions that the forget revokes, as the real ledger finds by itself."""
        self.revoked |= set(digests)
        names = set(adapters) | {name for name in self.log if self._mentions(name, set(digests))}
        for name in names:
            if name in adapters:
                self.lists.setdefault(name, set()).add(subject)
            if name in self.heads:
                gone = ({subject} if name in adapters else set()) | set(digests)
                self.log[name] = [(segment, held.erased(gone)) for segment, held in self.log[name]]
                head = self.heads[name]
                self.heads[name] = replace(head, epoch=head.epoch + 1, head=head.head + 1)
        fence = len(self.procedures) + 1
        self.procedures.append(
            SimpleNamespace(
                fence=fence, began=fence, subject=subject, everywhere=False, adapters=dict.fromkeys(names, 0),
                names=set(adapters).__contains__,
            )
        )  # fmt: skip

    def _mentions(self, name: str, digests: set[str]) -> bool:
        return any(entry.written_by in digests for _, held in self.log[name] for entry in held.entries)

    def allow(self, subject: str, adapters: Collection[str], ends: Mapping[Where, int]) -> None:
        for name in adapters:
            if subject in self.lists.get(name, ()):
                self.lists[name].discard(subject)
                self.ends.setdefault(name, {})[subject] = dict(ends)

    def allowed_from(self, adapter: str, texts: Any = ()) -> dict[str, dict[Where, int]]:
        return dict(self.ends.get(adapter, {}))

    def suppressed(self, adapter: str) -> frozenset[str]:
        return frozenset(self.lists.get(adapter, ()))

    def revoked_digests(self) -> frozenset[str]:
        return frozenset(self.revoked)

    def tainted(self, adapter: str, digests: Collection[str], subjects: Collection[str] = ()) -> frozenset[str]:
        return frozenset()

    def forgets(self, unfinished: bool = False, after: int = 0) -> list[Any]:
        return self.procedures[after:]

    def last_fence(self) -> int:
        return len(self.procedures)

    def take_lease(self, holder: str, kind: str, ttl: float) -> int:
        self.held[holder] = self.last_fence()
        return self.last_fence()

    def renew_lease(self, holder: str, acked: int) -> int:
        if holder not in self.held:
            raise NotFound(f"{holder} holds no lease")
        self.held[holder] = acked
        return self.last_fence()

    def drop_lease(self, holder: str) -> None:
        self.held.pop(holder, None)


class MemoryStore:
    """Payloads by key."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}

    def put(self, key: str, data: bytes) -> None:
        self.objects[key] = data

    def put_all(self, objects: Mapping[str, bytes]) -> None:
        self.objects.update(objects)

    def get(self, key: str) -> bytes:
        return self.objects[key]

    def exists(self, key: str) -> bool:
        return key in self.objects

    def delete(self, key: str) -> None:
        self.objects.pop(key, None)


class MemoryKeys:
    """Keys by name."""

    def __init__(self) -> None:
        self.held: dict[str, bytes] = {}

    def add(self, keys: Mapping[str, bytes]) -> None:
        self.held.update(keys)

    def get(self, name: str) -> bytes:
        return self.held[name]

    def known(self, names: Collection[str]) -> set[str]:
        return self.held.keys() & set(names)

    def delete(self, names: Collection[str]) -> None:
        for name in names:
            self.held.pop(name, None)


class MemoryDelivery:
    """A dead-letter topic that takes every letter."""

    def __init__(self) -> None:
        self.letters: list[DeadLetter] = []

    def deliver(self, letters: Sequence[DeadLetter]) -> None:
        self.letters += letters
