"""What to do when releases move: decided without I/O from what is served, what is wanted and what is loaded."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Release:
    """The version that an adapter answers with. Version 0 is the base, whose digest is empty here."""

    version: int
    digest: str


Releases = Mapping[str, Release]


@dataclass(frozen=True)
class Plan:
    """`loads`: digests to read now. `flips`: names whose alias moves now (None: the adapter is gone).
    `unloads`: digests that nothing refers to any more."""

    loads: tuple[str, ...]
    flips: Mapping[str, Release | None]
    unloads: tuple[str, ...]


def plan(
    served: Mapping[str, Release | None],
    wanted: Releases,
    loaded: Collection[str],
    *,
    loading: Collection[str] = (),
    failing: Collection[str] = (),
    pinned: Collection[str] = (),
) -> Plan:
    """The next steps from `served` (None: fenced off, and not read anew since) towards `wanted`.

    An adapter that answers without delay goes on doing so: its new version is loaded first, and its alias flips once
    that is done. One whose present version is fenced off or not loaded has nothing to lose, and flips at once; its
    weights are read when a request asks for them. `failing` digests could not be loaded lately, so their adapters
    stay where they are; `pinned` ones were asked for by number.
    """
    flips: dict[str, Release | None] = dict.fromkeys(served.keys() - wanted.keys())
    loads: dict[str, None] = {}
    for name, release in wanted.items():
        now = served.get(name)
        if now == release:
            continue
        ready = not release.digest or release.digest in loaded
        warm = now is not None and (not now.digest or now.digest in loaded)
        if ready or not warm or (now is not None and now.digest == release.digest):
            flips[name] = release
        elif release.digest not in failing and release.digest not in loading:
            loads[release.digest] = None
    after = {**served, **flips}
    used = {release.digest for release in after.values() if release is not None}
    used |= {release.digest for release in wanted.values()} | set(pinned)
    return Plan(tuple(loads), flips, tuple(sorted(digest for digest in loaded if digest not in used)))
