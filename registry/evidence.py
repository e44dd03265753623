"""What a forget's manifest says: digests of what was erased, revoked and put in its place, and what is left."""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from riverdelta.core.digests import canonical_json, sha256
from riverdelta.core.settings import Settings
from riverdelta.core.times import later, now

from .kafka_retention import retention
from .ledger import Fact, Forget, Ledger, Line, VersionRecord

# Acts of operators shape what is learned, and are kept when what was learned is replayed.
_ACTS = ("rollback", "resume", "by_hand", "allow")
_CHECKPOINTS = (
    "checkpoints of increments under way, in the data folders of other machines than the keeper's on which no trainer "
    "runs: the next that starts there deletes them"
)
_DELETED_KEYS = (
    "the deleted keys, wrapped under the root key, in the write-ahead log of the key store's PostgreSQL until it is "
    "overwritten, and in its archives, replicas and backups"
)
_DELETED_ROWS = (
    "the subject's keyed hash, in dead rows of the ledger's PostgreSQL until it is vacuumed, and in its write-ahead "
    "log, archives, replicas and backups"
)
_IN_USE = "in use in an adapter in which nobody was to be forgotten"


def kafka_still_holds(
    erased: list[tuple[str, int, int, str]], forget: Forget, settings: Settings
) -> list[dict[str, Any]]:
    """Where Kafka may hold what was erased (incarnation, partition, offset, time of sealing), and until when: topic,
    incarnation, partition, offsets.

    `removable_at` is when retention may remove the last of it, as the topic is set now; None where it never does, or
    Kafka does not say. Kafka removes the whole of a log file, once that is closed. A control message that asked for the
    forget holds the subject's plain name.
    """
    topics, asked = settings.topics, forget.body.get("asked")
    kept = retention(settings, {topics.events, topics.dead_letters, *([asked["topic"]] if asked else [])})

    def removable_at(topic: str, at: str) -> str | None:
        return later(at, kept[topic]) if topic in kept else None

    places: dict[tuple[str, int], set[int]] = defaultdict(set)
    last: dict[tuple[str, int], str] = defaultdict(str)
    for incarnation, partition, offset, sealed_at in erased:
        place = (incarnation, partition)
        places[place].add(offset)
        last[place] = max(last[place], sealed_at)
    held = [
        {
            "topic": topics.events,
            "incarnation": incarnation,
            "partition": partition,
            "offsets": sorted(offsets),
            "removable_at": removable_at(topics.events, last[incarnation, partition]),
        }
        for (incarnation, partition), offsets in sorted(places.items())
    ]
    held.append(
        {
            "topic": topics.dead_letters,
            "offsets": None,  # records that were not events are not read again: whose they are is not known
            "removable_at": removable_at(topics.dead_letters, forget.at),
        }
    )
    if asked:
        told = {key: value for key, value in asked.items() if key != "offset"}
        held.append({**told, "offsets": [asked["offset"]], "removable_at": removable_at(asked["topic"], forget.at)})
    return held


def finish(
    draft: dict[str, Any], ledger: Ledger, forget: Forget, left_in_mlflow: dict[str, list[str]], settings: Settings
) -> dict[str, Any]:
    """The draft with what the purge led to."""
    elsewhere = [_CHECKPOINTS]
    elsewhere += [_DELETED_KEYS] if not settings.keys_url.startswith("sqlite") else []
    elsewhere += [_DELETED_ROWS] if not settings.ledger_url.startswith("sqlite") else []
    adapters, last = [], _issued_last(ledger)
    before = [draft["fenced_at"], *([later(last.body["purged_at"], 0.001)] if last else [])]
    for part in forget.body["doomed"]:
        name = part["adapter"]
        head, versions, facts = ledger.adapter(name), ledger.versions(name), ledger.facts(name)
        facts = [fact for fact in facts if fact.seq <= head.head]
        before.append(facts[-1].at)
        adapters.append(
            {
                "adapter": name,
                "revoked": [
                    {"version": number, "digest": versions[number].digest, "state": versions[number].state}
                    for number in part["versions"]
                ],
                "clean_parent": part["clean"],
                "rebuilt": [
                    {"segment": number, "version": version, "digest": versions[version].digest}
                    for number, version in Line.of(versions, head.tip).trained.items()
                    if number in part["rebuild"]
                ],
                "tip": {"version": head.tip, "digest": versions[head.tip].digest if head.tip else ""},
                "environment": versions[head.tip].fingerprint if head.tip else {},
                "journal": _journal(facts, forget.id),
                "residual": {
                    "elsewhere": elsewhere + _in_use(ledger, versions, part["versions"]),
                    **_residual(facts),
                },
            }
        )
    payloads = [
        {
            "adapter": item["adapter"],
            "segment": item["segment"],
            "sha256": ledger.segment(item["adapter"], item["segment"]).payload_sha,
        }
        for item in draft["payloads"]
    ]
    return {
        **draft,
        "payloads": payloads,
        "adapters": adapters,
        "mlflow_gc_needed": left_in_mlflow,
        "previous": last.body["certificate_sha"] if last else "",
        "purged_at": max(now(), *before),  # this machine's clock may be behind those that wrote the rest
    }


def _journal(facts: list[Fact], request: str) -> dict[str, Any]:
    """An adapter's journal from the forget's fence to its purge: its own lines, and the digests of the others."""
    began = next(i for i, fact in enumerate(facts) if (fact.kind, fact.body.get("request")) == ("forget", request))
    return {
        "before": facts[began - 1].chain if began else "",
        "lines": [
            fact.line if fact.body.get("request") == request else sha256(canonical_json(fact.line))
            for fact in facts[began:]
        ],
        "seq": facts[-1].seq,
        "chain": facts[-1].chain,
    }


def _issued_last(ledger: Ledger) -> Forget | None:
    """The forget whose certificate was issued last: certificates are a chain, too."""
    issued = [held for held in ledger.forgets() if "certificate_sha" in held.body]
    return max(issued, key=lambda held: str(held.body["purged_at"]), default=None)


def _in_use(ledger: Ledger, versions: Mapping[int, VersionRecord], revoked: list[int]) -> list[str]:
    """What is said of weights that a copy had from where the subject was not forgotten, or with a loan."""
    clean = {version.digest for version in versions.values() if not version.revoked}
    used = ledger.in_use({versions[number].digest for number in revoked} - clean)
    lent = used & ledger.revoked_digests() if used else used
    return [
        f"the weights of {versions[number].adapter}@{number}, "
        + ("on loan to another adapter until its rebuild at the latest" if digest in lent else _IN_USE)
        for number in revoked
        if (digest := versions[number].digest) in used
    ]


def _residual(facts: list[Fact]) -> dict[str, Any]:
    """What of the past stays, forgotten or not: the segments' boundaries with their triggers, and operators' acts."""
    return {
        "boundaries": [
            [fact.body["first"], fact.body["count"], fact.body["trigger"]] for fact in facts if fact.kind == "sealed"
        ],
        "acts": [
            {"seq": fact.seq, "kind": fact.kind, "index": fact.body["index"], "at": fact.at}
            for fact in facts
            if fact.kind in _ACTS
        ],
    }
