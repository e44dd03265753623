"""Purge: remove what a forget wrote off, and leave a manifest of what was removed.

Every step may be repeated, and all that the manifest says is read from the ledger, which keeps it, once everything is
gone: a purge that was killed anywhere ends in the same state when it is run again, and nothing that somebody has laid
into the object store is taken for done, or signed.
"""

import json
import logging
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

from riverdelta.core import merkle, payload
from riverdelta.core.digests import sha256
from riverdelta.core.errors import Conflict
from riverdelta.core.settings import Settings
from riverdelta.core.store import ObjectStore, state_key, weights_key
from riverdelta.core.times import now

from . import checkpoints, contents, gc
from .certificate import statement
from .evidence import finish, kafka_still_holds
from .kafka_delete import delete_request
from .keystore import KeyStore
from .ledger import Forget, Ledger, Stage
from .mlflow_projection import Projection
from .operations import KEEPER
from .signing import public_pem, sign
from .written import ORPHAN_SECONDS

log = logging.getLogger(__name__)


PUBLIC_KEY = "forgets/certificates.pub"


def certificate_key(request: str) -> str:
    """Where the certificate of a forget lies."""
    return f"{_folder(request)}/certificate.dsse.json"


def manifest_key(request: str) -> str:
    """Where the manifest of a forget lies."""
    return f"{_folder(request)}/manifest.json"


def _folder(request: str) -> str:
    return f"forgets/{sha256(request.encode())}"


class Purge:
    """One forget's purge, once its rebuild is done and dataflow and trainers have carried out its fence.

    Keep the object from one attempt to the next, and make a new one when an attempt fails.
    """

    def __init__(
        self,
        ledger: Ledger,
        store: ObjectStore,
        keys: KeyStore,
        projection: Projection,
        settings: Settings,
        orphan_seconds: float = ORPHAN_SECONDS,
    ) -> None:
        self._ledger = ledger
        self._store = store
        self._keys = keys
        self._projection = projection
        self._settings = settings
        self._orphan_seconds = orphan_seconds
        self._began, self._since = time.monotonic(), time.time()
        self._suspects = gc.unnamed(ledger, store, keys)
        self._drafts = store.drafts()

    def run(self, forget: Forget) -> str:
        """Purge, and say so in the ledger: empty when it is done, or else what it waits for. Come again."""
        contents.erase(self._ledger, self._keys, forget)
        self._rewrite_payloads(forget)
        self._delete_weights(forget)
        left = {part["adapter"]: self._projection.erase(part["adapter"], part["versions"]) for part in _parts(forget)}
        if waits := self._delete_checkpoints(forget) or self._collect():
            return waits
        self._scrub(forget)
        draft = self._erased(forget)
        asked = forget.body.get("asked")
        if asked and self._may_go(asked) and delete_request(self._settings, asked):
            for held in draft["kafka"]:
                if held["topic"] == asked["topic"]:
                    held["unreadable_since"] = now()
        in_mlflow = {name: runs for name, runs in left.items() if runs}
        manifest = finish(draft, self._ledger, forget, in_mlflow, self._settings)
        written = json.dumps(manifest, indent=2, sort_keys=True).encode() + b"\n"
        signed = sign(self._settings.keys_dir, statement(manifest))
        self._store.put_all(
            {
                manifest_key(forget.id): written,
                certificate_key(forget.id): signed,
                PUBLIC_KEY: public_pem(self._settings.keys_dir),
            }
        )
        done = {
            "manifest": manifest_key(forget.id),
            "manifest_sha": sha256(written),
            "certificate": certificate_key(forget.id),
            "certificate_sha": sha256(signed),
            "purged_at": manifest["purged_at"],
        }
        self._ledger.advance(forget.id, Stage.PURGED, done, KEEPER)
        log.info("purged", extra={"request": forget.id, "entries": len(manifest["erased"])})
        return ""

    def _may_go(self, asked: Mapping[str, Any]) -> bool:
        """Whether no request before this one, which would go with it, waits to be carried out."""
        _, waiting = self._ledger.heard(asked["incarnation"], asked["partition"])
        return not any(offset < asked["offset"] for offset in waiting)

    def _collect(self) -> str:
        """Delete what refused work and crashes left in the store before the fence was carried out; until that can be
        told from work in hand, what is waited for."""
        left = self._suspects.keys() & gc.unnamed(self._ledger, self._store, self._keys).keys()
        if left and time.monotonic() - self._began < self._orphan_seconds:
            return f"{len(left)} objects that may be of work in hand"
        if left:
            self._ledger.delete_unnamed(left, partial(gc.delete, self._store, self._keys))
        self._store.drop_drafts(self._orphan_seconds)
        half = self._drafts & self._store.drafts()
        return f"{len(half)} half-written objects that may be of work in hand" if half else ""

    def _scrub(self, forget: Forget) -> None:
        """Overwrite what deleting left in the databases."""
        for part in _parts(forget):
            self._ledger.mark_purged(part["adapter"], part["versions"])
        self._projection.scrub()
        self._ledger.db.scrub()
        self._keys.scrub()

    def _erased(self, forget: Forget) -> dict[str, Any]:
        """What has been erased, and where it lay: the ledger keeps that."""
        erased: list[dict[str, Any]] = []
        payloads: list[dict[str, Any]] = []
        segments: list[dict[str, Any]] = []
        places: list[tuple[str, int, int, str]] = []
        for part in _parts(forget):
            indexes = set(part["indexes"])
            for number in part["segments"]:
                segment = self._ledger.segment(part["adapter"], number)
                manifest = self._ledger.manifest(part["adapter"], number)
                if not segment.dropped:
                    payloads.append({"adapter": segment.adapter, "segment": number})
                leaves = manifest.commitments
                segments.append(
                    {
                        "adapter": segment.adapter,
                        "segment": number,
                        "first": segment.first,
                        "count": segment.count,
                        "root": segment.root,
                    }
                )
                for place, (entry, commitment) in enumerate(zip(manifest.entries, leaves, strict=True)):
                    if segment.first + place in indexes:
                        lie = [(entry.run, entry.partition, entry.offset), manifest.partners.get(place)]
                        places += [(manifest.incarnations[at[0]], *at[1:], segment.sealed_at) for at in lie if at]
                        erased.append(
                            {
                                "adapter": segment.adapter,
                                "index": segment.first + place,
                                "segment": number,
                                "commitment": commitment.hex(),
                                "path": [each.hex() for each in merkle.path(leaves, place)],
                                "incarnation": manifest.incarnations[entry.run],
                                "partition": entry.partition,
                                "offset": entry.offset,
                                "sealed_at": segment.sealed_at,
                            }
                        )
        return {
            "request": forget.id,
            "subject": forget.subject,
            "everywhere": forget.everywhere,
            "epochs": forget.adapters,
            "fence": forget.fence,
            "fenced_at": forget.body.get("fenced_at", forget.at),
            "erased": erased,
            "segments": segments,
            "payloads": payloads,
            "kafka": kafka_still_holds(places, forget, self._settings),
        }

    def _rewrite_payloads(self, forget: Forget) -> None:
        for part in _parts(forget):
            for number in part["segments"]:
                self._rewrite(part["adapter"], number)

    def _rewrite(self, adapter: str, number: int) -> None:
        """Give a segment a payload without its tombstones' contents, unless it has one already, or none any more."""
        while not (segment := self._ledger.segment(adapter, number)).dropped:
            manifest = self._ledger.manifest(adapter, number)
            live = [not entry.tombstone for entry in manifest.entries]
            held, before, was = contents.find_payload(self._store, self._keys, segment, manifest)
            data, digest = payload.without(before, was, live)
            if held == segment.payload and digest == was:
                return
            key = held if digest == was else contents.new_key(segment)
            if key != held:
                self._store.put(key, data)
            try:
                self._ledger.replace_payload(adapter, number, key, digest, replaces=segment.payload)
            except Conflict:  # another purge was faster: begin with what it left
                if key != held:
                    self._store.delete(key)
                continue
            for old in {held, segment.payload} - {key}:
                self._store.delete(old)
            return

    def _delete_weights(self, forget: Forget) -> None:
        """Delete revoked weights and states, unless a clean version has the very same."""
        parts = _parts(forget)
        keys = {weights_key(digest) for part in parts for digest in part["digests"]}
        keys |= {state_key(digest) for part in parts for digest in part["states"]}
        self._ledger.delete_unnamed(keys, self._store.delete, revoked=True)

    def _delete_checkpoints(self, forget: Forget) -> str:
        """Delete what trainers have left of increments under way; what is waited for where one holds some."""
        adapters, trainers = {part["adapter"] for part in _parts(forget)}, self._settings.data / "trainer"
        held = checkpoints.delete(self._store, trainers, adapters, self._since)
        return f"the trainer that holds {', '.join(held)} to go on; end it if it hangs" if held else ""


def _parts(forget: Forget) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = forget.body["doomed"]
    return parts
