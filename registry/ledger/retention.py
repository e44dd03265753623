"""What of an adapter's past `gc` may let go, decided without I/O: versions' files, and contents beyond the horizon."""

from collections.abc import Iterable, Mapping
from dataclasses import replace

from riverdelta.core.recipe import Retain

from .decisions import Change, lineage
from .records import AdapterRecord, Outcome, SegmentRecord, VersionRecord


def decide_retention(
    adapter: AdapterRecord, versions: Mapping[int, VersionRecord], segments: Iterable[SegmentRecord], retain: Retain
) -> Change | None:
    """Let go what no release, rollback, forget within the horizon or gate needs any more; None when that is nothing.

    A clean state stays for every so many versions of the line, and the newest stay, to roll back to. With a horizon,
    what lies before the newest state beyond it goes, and the contents that no replay from that state looks at: one
    that learns a segment rehearses those of the horizon before it. A held adapter, or one that has not learned all, is
    left alone.
    """
    segments = list(segments)
    if adapter.held is not None or (retain.every == 1 and not retain.horizon):
        return None
    if any(segment.outcome is Outcome.AWAITING for segment in segments):
        return None
    line = lineage(versions, adapter.tip)[::-1]
    good = [number for number in line if not versions[number].withheld]
    keep = {adapter.tip, adapter.release, *line[-retain.targets :], *good[-1:]}
    keep |= {number for number in versions if number >= adapter.next_version - retain.targets}
    spaced = [number for place, number in enumerate(line) if place % retain.every == 0]
    floor = 0
    if retain.horizon:
        oldest = adapter.next_segment - retain.horizon
        held = [number for number in spaced if not versions[number].purged]
        beyond = [number for number in held if (versions[number].segment or 0) < oldest]
        if beyond:
            spaced = spaced[spaced.index(beyond[-1]) :]
            floor = (versions[beyond[-1]].segment or 0) + 1 - retain.horizon
    keep |= set(spaced)
    gone = tuple(n for n, version in versions.items() if n not in keep and not version.purged and not version.revoked)
    dropped = tuple(
        replace(segment, payload="") for segment in segments if segment.number < floor and not segment.dropped
    )
    if not gone and not dropped:
        return None
    body = {"versions": sorted(gone), "segments": [segment.number for segment in dropped]}
    return Change(adapter, (("dropped", body),), dropped, dropped=gone)
