"""The audit: what a certificate says stands in the place of the revoked, trained again from the stored entries.

Where a forget horizon has let contents go, it is trained again from the oldest version that is kept and needs nothing
of them; what lies before that cannot be trained again by anybody.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any

from riverdelta.core.errors import Gone, Refused, RiverdeltaError
from riverdelta.core.recipe import Recipe
from riverdelta.core.settings import Settings
from riverdelta.core.shards import shard_of
from riverdelta.core.store import ObjectStore
from riverdelta.registry.belonging import check_base, key_store
from riverdelta.registry.keystore import KeyStore
from riverdelta.registry.ledger import Hand, Ledger, Line, SegmentRecord, VersionRecord
from riverdelta.registry.ledger.decisions import lineage, words

_WITHOUT = "The certificate's signature, paths and journal can be checked without `--replay`."


def audit(settings: Settings, ledger: Ledger, told: dict[str, Any]) -> list[dict[str, object]]:
    """Per adapter both digests, and `since`, the version that it was trained again from (0: the base). What a later
    forget has superseded, and be it meanwhile, is left out: its entries cannot be read any more. `Refused` with another
    base model than the ledger's."""
    from riverdelta.core.base import resolve
    from riverdelta.trainer.base import Base

    store, keys, trainer = ObjectStore(settings.store_url), key_store(ledger, settings), settings.trainer

    @cache
    def base() -> Base:
        loaded = Base.load(resolve(settings.base), trainer.device, trainer.dtype, trainer.threads)
        check_base(ledger, loaded.digest)
        return loaded

    done = []
    for each in told["predicate"]["adapters"]:
        name, tip = each["adapter"], each["tip"]
        revoked = partial(_is_revoked, ledger, name, tip["version"])
        if not tip["version"] or revoked():
            continue
        try:
            found = _again(ledger, store, keys, base, name, tip)
        except RiverdeltaError:
            if not revoked():
                raise
        else:
            if found["equal"] or not revoked():
                done.append(found)
    return done


def _is_revoked(ledger: Ledger, adapter: str, number: int) -> bool:
    return ledger.version(adapter, number).revoked


def _again(
    ledger: Ledger, store: ObjectStore, keys: KeyStore, load: Callable[[], Any], name: str, tip: Mapping[str, Any]
) -> dict[str, object]:
    """An adapter's tip, trained again."""
    from riverdelta.trainer.fingerprint import fingerprint
    from riverdelta.trainer.inputs import Log
    from riverdelta.trainer.replay import replay

    number, head, versions = tip["version"], ledger.adapter(name), ledger.versions(name)
    line, recipe = Line.of(versions, number), Recipe.from_dict(head.recipe)
    if line.root:
        raise Refused(f"{name}@{line.root} was imported: what it learned before is not in the log.", _WITHOUT)
    said = words(ledger.facts(name), versions, number)
    since, segments = _since(versions, number, [ledger.segment(name, each) for each in sorted(line.segments)], recipe)
    base, log = load(), Log(ledger, store, keys, recipe)
    made = replay(
        base,
        recipe,
        head.seed,
        [log.said(segment) for segment in segments],
        hands=tuple(said.get(segment.number, Hand.NONE) for segment in segments),
        shards=[
            [
                shard_of(entry.subjects, index, recipe.shards.count)
                for index, entry in enumerate(ledger.manifest(name, segment.number).entries, segment.first)
            ]
            for segment in segments
        ],
        numbers=[segment.number for segment in segments],
        start=_start(base, ledger, store, log, recipe, versions, since, segments[0]) if since else None,
    )[-1].digest
    return {
        "version": f"{name}@{number}",
        "since": since,
        "certified": tip["digest"],
        "replayed": made,
        "equal": made == tip["digest"],
        "same_environment": fingerprint(base) == versions[number].fingerprint,
    }


def _since(
    versions: Mapping[int, VersionRecord], tip: int, segments: Sequence[SegmentRecord], recipe: Recipe
) -> tuple[int, list[SegmentRecord]]:
    """The oldest version of a line from which all that follows can be trained again, 0 for the base, and what that is;
    `Gone` where there is none."""
    ancestors = lineage(versions, tip)[1:]
    dropped = {segment.number for segment in segments if segment.dropped}
    for number in [0, *reversed(ancestors)]:
        if number and (not versions[number].usable or (recipe.shards.count > 1 and versions[number].withheld)):
            continue
        done = Line.of(versions, number).segments
        left = [segment for segment in segments if segment.number not in done]
        seen = left[0].number - recipe.retain.horizon if recipe.retain.horizon and left else 0
        if left and not any(each >= seen for each in dropped):
            return number, left
    raise Gone(
        f"{versions[tip].adapter}@{tip} cannot be trained again: the contents of segments "
        f"{', '.join(map(str, sorted(dropped)))} lie beyond the forget horizon, and no version that is kept needs none "
        "of them.",
        _WITHOUT,
    )


def _start(
    base: Any,
    ledger: Ledger,
    store: ObjectStore,
    log: Any,
    recipe: Recipe,
    versions: Mapping[int, VersionRecord],
    since: int,
    following: SegmentRecord,
) -> Any:
    from riverdelta.trainer.gate import usual_of
    from riverdelta.trainer.inputs import files_of, learned_by
    from riverdelta.trainer.parts import split
    from riverdelta.trainer.replay import Begun, Start

    line = [versions[number] for number in reversed(lineage(versions, since))]
    weights, state = files_of(store, line[-1])
    assert state is not None, "only an imported version has none"

    def learned(shard: int | None) -> list[tuple[int, Sequence[bytes | None]]]:
        held = learned_by(ledger, line, log.since(following), shard)
        return [(segment.number, log.said(segment, shard)) for segment in held]

    good = [version for version in line if not version.withheld]
    whole = Begun((weights, state), usual_of(version.metrics for version in good), learned(None))
    if recipe.shards.count == 1:
        return Start([whole], whole)
    parts = [
        Begun(files, usual_of(version.parts[shard].metrics for version in line), learned(shard))
        for shard, files in enumerate(split(base, recipe, weights, state))
    ]
    return Start(parts, whole)
