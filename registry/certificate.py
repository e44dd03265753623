"""The certificate of a forget: an in-toto statement of its manifest, and what anybody can check of it without data."""

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from riverdelta.core import merkle
from riverdelta.core.digests import canonical_json, digest_of, sha256
from riverdelta.core.errors import BadInput
from riverdelta.core.payload import SALT_BYTES
from riverdelta.core.store import ObjectStore

from . import contents
from .keystore import KeyStore
from .ledger import Ledger, Stage
from .ledger.journal import chained
from .verify import lasting

STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE = "https://riverdelta.dev/forget/v1"


@dataclass(frozen=True)
class Checked:
    """What a certificate says, every problem found with it, each naming what is wrong, and what has superseded it; with
    a receipt, how many of the erased entries it opens, and how many it says lay beyond the forget horizon."""

    request: str
    erased: int
    revoked: int
    adapters: tuple[str, ...]
    problems: tuple[str, ...]
    superseded: tuple[str, ...] = ()
    opened: int | None = None
    receipt_gone: int | None = None


def statement(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What is signed: the weights that stand in the place of those revoked, and the manifest that says so."""
    stands = [
        {"name": f"{each['adapter']}@{each['tip']['version']}", "digest": {"sha256": each["tip"]["digest"]}}
        for each in manifest["adapters"]
        if each["tip"]["version"]
    ]
    # A statement is about something: where only the base is left, about what was erased.
    return {
        "_type": STATEMENT,
        "subject": stands or [{"name": "erased", "digest": {"sha256": digest_of(manifest["erased"])}}],
        "predicateType": PREDICATE,
        "predicate": dict(manifest),
    }


def check(told: Mapping[str, Any]) -> Checked:
    """Everything in an opened certificate that must fit together, without data: paths to roots, versions, journal."""
    try:
        if told["_type"] != STATEMENT or told["predicateType"] != PREDICATE:
            raise BadInput("The certificate is about something else than a forget.", "Give a forget's certificate.")
        return _check(told)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        lacks = f"lacks {error}" if isinstance(error, KeyError) else "has not the form of a forget's"
        raise BadInput(f"The certificate {lacks}.", "Ask the issuer for it again.") from error


def _check(told: Mapping[str, Any]) -> Checked:
    held = told["predicate"]
    problems = []
    if canonical_json(statement(held)["subject"]) != canonical_json(told["subject"]):
        problems.append("It is about other weights than its manifest names.")
    roots = {(each["adapter"], each["segment"]): each for each in held["segments"]}
    for entry in held["erased"]:
        segment = roots[entry["adapter"], entry["segment"]]
        path = [bytes.fromhex(each) for each in entry["path"]]
        place = entry["index"] - segment["first"]
        root = merkle.climb(bytes.fromhex(entry["commitment"]), place, segment["count"], path)
        if root is None or root.hex() != segment["root"]:
            problems.append(
                f"Entry {entry['index']} of {entry['adapter']} is not in the tree of segment {entry['segment']}."
            )
    for each in held["adapters"]:
        revoked = {version["version"] for version in each["revoked"]}
        stands = {version["version"] for version in each["rebuilt"]} | {each["clean_parent"]["version"]}
        if revoked & (stands | {each["tip"]["version"]}):
            problems.append(f"A version of {each['adapter']} that was revoked stands in its own place.")
        chain = each["journal"]["before"]
        for line in each["journal"]["lines"]:
            chain = chained(chain, line if isinstance(line, str) else sha256(canonical_json(line)))
        if chain != each["journal"]["chain"]:
            problems.append(f"The journal of {each['adapter']} does not lead to where it ends.")
        problems += [*_check_line(held, each), *_check_fence(held, each)]
    if held["purged_at"] < held["fenced_at"]:
        problems.append("It was purged before it was fenced.")
    revoked_count = sum(len(each["revoked"]) for each in held["adapters"])
    names = tuple(each["adapter"] for each in held["adapters"])
    return Checked(held["request"], len(held["erased"]), revoked_count, names, tuple(problems))


def _check_line(held: Mapping[str, Any], adapter: Mapping[str, Any]) -> list[str]:
    """What an adapter's own line about the forget says otherwise than the certificate."""
    name, lines = adapter["adapter"], adapter["journal"]["lines"]
    own = next((line[3] for line in lines if not isinstance(line, str) and line[2] == "forget"), None)
    if own is None:
        return [f"The journal of {name} says nothing of the forget."]
    told = {
        "request": held["request"],
        "subject": held["subject"],
        "epoch": held["epochs"][name],
        "revoked": [each["version"] for each in adapter["revoked"]],
        "segments": [each["segment"] for each in held["segments"] if each["adapter"] == name],
        "entries": sum(each["adapter"] == name for each in held["erased"]),
    }
    return [f"The journal of {name} has other {what} than {said}." for what, said in told.items() if own[what] != said]


def _check_fence(held: Mapping[str, Any], adapter: Mapping[str, Any]) -> list[str]:
    """What an adapter's own lines say otherwise than the certificate about when the fence was made: with the forget, or
    where servers kept a version for a while, when that loan was called in. What came first is the order of the lines:
    machines that took part may have clocks that differ."""
    name = adapter["adapter"]
    lines = [line for line in adapter["journal"]["lines"] if not isinstance(line, str)]
    own = [(kind, body) for _, _, kind, body, *_ in lines]
    asked = next((body for kind, body in own if kind == "forget"), None)
    if asked is None:
        return []
    told, problems = held["fenced_at"], []
    stages = [Stage(body["stage"]) for kind, body in own if kind == "forget_stage"]
    if own[0][1] is not asked or stages != [stage for stage in Stage if stage in stages]:
        problems.append(f"The journal of {name} has the forget's stages in another order.")
    if "lent" in asked:
        called_in = next((body.get("fenced_at") for _, body in own if body.get("stage") == Stage.FENCED), None)
        if called_in != told:
            problems.append(f"{name}@{asked['lent']} was served until {called_in}, not {told}.")
    # Where another adapter's version was lent, that one's journal tells.
    elif "until" not in asked and asked.get("fenced_at", told) != told:
        problems.append(f"The journal of {name} has the fence at another time than {told}.")
    return problems


class Opening(msgspec.Struct):
    """What opens one entry's commitment: its salt, and what it said, base64."""

    adapter: str
    index: int
    salt: str
    content: str


class Receipt(msgspec.Struct):
    """What a subject keeps: what their entries said, which nobody else can say once they are erased. `gone` counts
    those whose contents lay beyond the forget horizon already."""

    entries: list[Opening]
    gone: int = 0


def receipt(
    ledger: Ledger, store: ObjectStore, keys: KeyStore, subject: str, adapters: Sequence[str] | None
) -> Receipt:
    """The receipt of a subject (as its keyed hash) for what some adapters (None: all) hold of it now."""
    names = [head.name for head in ledger.adapters()] if adapters is None else sorted(set(adapters))
    entries, gone = [], 0
    for name in names:
        for segment, manifest in ledger.manifests(name):
            if subject not in manifest.mentions:
                continue
            if segment.dropped:
                gone += sum(subject in entry.subjects for entry in manifest.entries if not entry.tombstone)
                continue
            openings = contents.read_openings(store, keys, segment, manifest)
            for place, (entry, opening) in enumerate(zip(manifest.entries, openings, strict=True)):
                if opening is not None and subject in entry.subjects:
                    salt, said = (
                        base64.b64encode(part).decode() for part in (opening[:SALT_BYTES], opening[SALT_BYTES:])
                    )
                    entries.append(Opening(name, segment.first + place, salt, said))
    return Receipt(entries, gone)


def read_receipt(data: bytes) -> Receipt:
    """What `forget --receipt` wrote to a file; `BadInput` where it wrote something else."""
    try:
        return msgspec.json.decode(data, type=Receipt)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadInput(
            f"The receipt cannot be read: {error}.", "Give the file that `forget --receipt` wrote."
        ) from error


def is_receipt(data: bytes) -> bool:
    """Whether a file is what `forget --receipt` wrote."""
    try:
        read_receipt(data)
    except BadInput:
        return False
    return True


def is_manifest(data: bytes) -> bool:
    """Whether a file is the manifest that lies beside a certificate, and that is not signed."""
    try:
        held = json.loads(data)
    except (ValueError, RecursionError):
        return False
    return isinstance(held, dict) and {"request", "erased", "fence"} <= held.keys()


def open_receipt(told: Mapping[str, Any], given: Receipt) -> tuple[int, list[str]]:
    """How many erased entries a receipt opens, and what does not fit: an entry that the certificate does not name, or
    names with another content, or that is there twice."""
    erased = {(each["adapter"], each["index"]): each["commitment"] for each in told["predicate"]["erased"]}
    opened, problems, seen = 0, list[str](), set[tuple[str, int]]()
    for each in given.entries:
        place, entry = (each.adapter, each.index), f"Entry {each.index} of {each.adapter}"
        salt, content = _exactly(each.salt), _exactly(each.content)
        if place in seen:
            problems.append(f"{entry} is in the receipt more than once.")
        elif place not in erased:
            problems.append(f"{entry} is in the receipt and was not erased.")
        elif salt is None or content is None:
            problems.append(f"{entry} is not written in base64 in the receipt.")
        elif len(salt) != SALT_BYTES:  # with another, bytes of the content would pass for the salt's
            problems.append(f"{entry} has no salt of {SALT_BYTES} bytes in the receipt.")
        elif merkle.leaf(salt + content).hex() != erased[place]:
            problems.append(f"{entry} said something else than the receipt.")
        else:
            opened += 1
        seen.add(place)
    return opened, list(dict.fromkeys(problems))


def _exactly(written: str) -> bytes | None:
    """The bytes that are written so in base64, to the letter; None where there are none."""
    try:
        held = base64.b64decode(written, validate=True)
    except ValueError:
        return None
    return held if base64.b64encode(held).decode() == written else None


def check_stored(ledger: Ledger, told: Mapping[str, Any], digest: str) -> tuple[list[str], list[str]]:
    """What the ledger says otherwise than a certificate with this SHA-256, and what has superseded it since: a later
    forget that revoked what stood in the place of the first. Others may write meanwhile: a problem counts if the
    journals have not grown since."""
    superseded = list[str]()

    def heads() -> list[int]:
        return [ledger.adapter(each["adapter"]).head for each in told["predicate"]["adapters"]]

    def compare(_: list[int]) -> list[str]:
        problems, superseded[:] = _compare(ledger, told, digest)
        return problems

    return lasting(heads, compare), superseded


def _compare(ledger: Ledger, told: Mapping[str, Any], digest: str) -> tuple[list[str], list[str]]:
    problems, superseded = [], []
    held = told["predicate"]
    recorded = {forget.id: forget.body.get("certificate_sha") for forget in ledger.forgets()}
    if recorded.get(held["request"]) != digest:
        problems.append(f"It is not the certificate that was issued of the forget {held['request']}.")
    fence = next(iter(ledger.fences(held["fence"] - 1)), None)
    if fence is None or (fence.number, fence.at) != (held["fence"], held["fenced_at"]):
        problems.append(f"The fence {held['fence']} was not made at {held['fenced_at']}.")
    facts = {each["adapter"]: ledger.facts(each["adapter"]) for each in held["adapters"]}
    for each in held["adapters"]:
        name, journal = each["adapter"], each["journal"]
        known = {fact.seq: fact for fact in facts[name]}
        last = known.get(journal["seq"])
        if last is None or last.chain != journal["chain"]:
            problems.append(f"The journal of {name} is not the one that the certificate continues.")
        versions = ledger.versions(name)
        for said in [each["tip"], each["clean_parent"], *each["rebuilt"], *each["revoked"]]:
            number = said["version"]
            if number and (number not in versions or versions[number].digest != said["digest"]):
                problems.append(f"{name}@{number} has other weights than the certificate says.")
        version = versions.get(each["tip"]["version"])
        if version is not None and version.revoked:
            by = [
                fact.body["request"]
                for fact in facts[name]
                if fact.kind == "forget" and version.number in fact.body["revoked"] and fact.seq > journal["seq"]
            ]
            superseded += [f"{name}@{version.number} by the forget {request}" for request in by]
            if not by:
                problems.append(f"{name}@{version.number} is revoked, and no later forget says so.")
        for number in {part["segment"] for part in held["segments"] if part["adapter"] == name}:
            [said] = [part for part in held["segments"] if (part["adapter"], part["segment"]) == (name, number)]
            sealed = [fact.body for fact in facts[name] if fact.kind == "sealed" and fact.body["segment"] == number]
            if [fact["root"] for fact in sealed] != [said["root"]]:
                problems.append(f"Segment {number} of {name} was sealed with another root.")
    for entry in held["erased"]:
        number = entry["segment"]
        manifest, segment = ledger.manifest(entry["adapter"], number), ledger.segment(entry["adapter"], number)
        if not manifest.entries[entry["index"] - segment.first].tombstone:
            problems.append(f"Entry {entry['index']} of {entry['adapter']} is live in the ledger.")
    return problems, superseded
