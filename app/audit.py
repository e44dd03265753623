"""The audit: what a certificate says stands in the place of the revoked, trained again from the stored entries."""

from typing import Any

from riverdelta.core.errors import Refused
from riverdelta.core.recipe import Recipe
from riverdelta.core.settings import Settings
from riverdelta.core.shards import shard_of
from riverdelta.core.store import ObjectStore
from riverdelta.registry.keystore import KeyStore
from riverdelta.registry.ledger import Ledger, Line


def audit(settings: Settings, ledger: Ledger, told: dict[str, Any]) -> list[dict[str, object]]:
    """Per adapter both digests. What a later forget has superseded is left out: its entries cannot be read any more."""
    from riverdelta.core.base import resolve
    from riverdelta.trainer.base import Base
    from riverdelta.trainer.fingerprint import fingerprint
    from riverdelta.trainer.inputs import Log
    from riverdelta.trainer.replay import replay

    store, keys = ObjectStore(settings.store_url), KeyStore.open(settings)
    trainer, done, base = settings.trainer, [], None
    for each in told["predicate"]["adapters"]:
        name, number = each["adapter"], each["tip"]["version"]
        versions = ledger.versions(name)
        if not number or versions[number].revoked:
            continue
        line, head = Line.of(versions, number), ledger.adapter(name)
        if line.root:
            raise Refused(f"{name}@{line.root} was imported: what it learned before is not in the log.", "")
        segments = [ledger.segment(name, each) for each in sorted(line.segments)]
        base = base or Base.load(resolve(settings.base), trainer.device, trainer.dtype, trainer.threads)
        hands = tuple(line.word(segment) for segment in segments)
        recipe = Recipe.from_dict(head.recipe)
        entries = [ledger.manifest(name, segment.number).entries for segment in segments]
        log = Log(ledger, store, keys, recipe)
        said = [log.said(segment) for segment in segments]
        shards = [
            [shard_of(entry.subjects, index, recipe.shards.count) for index, entry in enumerate(some, segment.first)]
            for segment, some in zip(segments, entries, strict=True)
        ]
        made = replay(
            base, recipe, head.seed, said, hands=hands, shards=shards, numbers=[segment.number for segment in segments]
        )[-1].digest
        done.append(
            {
                "version": f"{name}@{number}",
                "certified": each["tip"]["digest"],
                "replayed": made,
                "equal": made == each["tip"]["digest"],
                "same_environment": fingerprint(base) == versions[number].fingerprint,
            }
        )
    return done
