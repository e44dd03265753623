"""What the registry commands print: tables for people, JSON for scripts."""

import shlex
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from riverdelta.core.printing import many, print_json
from riverdelta.core.recipe import Recipe

from .certificate import Checked
from .diff import Difference
from .ledger import AdapterRecord, Fact, Forget, Hand, Ledger, Outcome, SegmentRecord, Stage, VersionRecord
from .operations import ForgetReport, Progress, forget_json
from .verify import Verified

# What is printed is data: brackets in a reason are not markup. A pipe has room for whole lines.
_out = Console(highlight=False, soft_wrap=True, markup=False, emoji=False, width=None if sys.stdout.isatty() else 160)
_err = Console(stderr=True, highlight=False, markup=False, emoji=False)


_BY_HAND = {Hand.ACCEPT: "Accepted", Hand.DISCARD: "Discarded"}


def print_adapters(ledger: Ledger, every: bool, as_json: bool) -> None:
    """Every adapter on a line, then the forgets that are not finished, or `every` one."""
    heads, releases, rejections = ledger.adapters(), ledger.releases(), ledger.rejections()
    waiting = {head.name: ledger.count_awaiting(head.name) for head in heads}
    forgets = ledger.forgets(unfinished=not every)
    if as_json:
        print_json(
            {
                "adapters": [
                    {
                        "name": head.name,
                        "release": head.release,
                        "digest": releases[head.name][1],
                        "held": head.held,
                        "entries": head.next_index,
                        "segments": head.next_segment - 1,
                        "awaiting": waiting[head.name],
                        "rejected_in_a_row": rejections.get(head.name, 0),
                        "epoch": head.epoch,
                    }
                    for head in heads
                ],
                "forgets": [
                    {**forget_json(forget), **dict(zip(("rebuild", "left"), ledger.count_rebuild(forget), strict=True))}
                    for forget in forgets
                ],
            }
        )
        return
    if not heads:
        _out.print("No adapters yet. `riverdelta registry create NAME` makes one.")
    else:
        table = _table("adapter", "release", "digest", "entries", "segments", "awaiting", "epoch")
        for head in heads:
            served = releases[head.name][0]
            release = f"@{served}" if served else "base"
            held = " (held)" if head.held is not None else ""
            held += " (until rebuilt)" if served != head.release else ""
            row = (head.next_index, head.next_segment - 1, waiting[head.name], head.epoch)
            table.add_row(head.name, release + held, releases[head.name][1][:12], *map(str, row))
        _out.print(table)
    for head in heads:
        _tell_rejections(head, rejections.get(head.name, 0))
    for forget in forgets:
        segments, left = ledger.count_rebuild(forget)
        rebuilt = f", {segments - left} of {segments} segments rebuilt" if segments else ""
        _out.print(f"Forget {forget.id} of {forget.at}: {forget.stage}, in {_some(forget.adapters)}{rebuilt}.")


def print_adapter(ledger: Ledger, name: str, as_json: bool) -> None:
    """An adapter's head, versions and segments."""
    head, versions, segments = ledger.adapter(name), ledger.versions(name), ledger.segments(name)
    if as_json:
        shown = {**asdict(head), "rejected_in_a_row": ledger.rejections(name).get(name, 0)}
        shown |= {"versions": [_version(version) for version in versions.values()]}
        print_json({**shown, "segments": [asdict(segment) for segment in segments]})
        return
    serves = f"version {head.release}" if head.release else "the base"
    held = ", held there" if head.held is not None else ""
    holds = f"{many(head.next_index, 'entry')} in {many(len(segments), 'segment')}"
    _out.print(f"{name} serves {serves}{held}. {holds}, epoch {head.epoch}.")
    _tell_rejections(head, ledger.rejections(name).get(name, 0))
    if versions:
        table = _table("version", "digest", "parent", "segment", "new", "loss", "made", "")
        for version in versions.values():
            told = "revoked" if version.revoked else "live" if version.number == head.release else ""
            told = told or ("dropped" if version.purged else "")
            told = told or (f"withheld: {version.withheld}" if version.withheld else "")
            told += _refusals(version)
            parent = f"@{version.parent}" if version.parent else "base"
            learned = "imported" if version.segment is None else str(version.segment)
            new = _figure(version.metrics.get("prequential"))
            row = (parent, learned, new, _losses(version), version.made_at, told)
            table.add_row(f"@{version.number}", version.digest[:12], *row)
        _out.print(table)
    aside = [segment for segment in segments if segment.outcome is not Outcome.TRAINED]
    if aside:
        table = _table("segment", "entries", "outcome", "why")
        for segment in aside:
            by_hand = f"{_BY_HAND[segment.hand]} by hand." if segment.hand else ""
            why = ": ".join(filter(None, (segment.cause, segment.note))) + _measured(segment)
            why += f"; {by_hand}" if by_hand and by_hand != segment.note else ""
            table.add_row(str(segment.number), str(segment.count), str(segment.outcome), why)
        _out.print(table)


def print_log(ledger: Ledger, name: str, after: int, as_json: bool) -> None:
    """An adapter's journal."""
    ledger.adapter(name)
    facts = ledger.facts(name, after)
    if as_json:
        print_json([asdict(fact) for fact in facts])
        return
    table = _table("#", "at", "what", "live", "by", "why")
    live = "base"
    for fact in ledger.facts(name):
        if "to" in fact.body:
            live = f"@{fact.body['to']}" if fact.body["to"] else "base"
            live = f"@{fact.body['lent']} until rebuilt" if "lent" in fact.body else live
        if fact.seq > after:
            table.add_row(str(fact.seq), fact.at, _told(fact), live, fact.actor, fact.reason)
    _out.print(table)


def print_forget_json(forget: Forget, report: ForgetReport | None) -> None:
    """A forget as it stands; `report` is what its fence came to, None where that was not waited for to the end."""
    held = forget_json(forget)
    if report is not None:
        receipt = report.receipt
        held |= {} if receipt is None else {"receipt": len(receipt.entries), "receipt_gone": receipt.gone}
        held |= {"lost_servers": report.lost, "seconds": round(report.seconds, 4)}
    print_json(held)


def print_fence(report: ForgetReport, already: bool) -> None:
    """What a forget's fence came to, and how many entries its receipt holds where one was written; `already` says that
    the subject had been forgotten there before."""
    forget, receipt = report.forget, report.receipt
    held = forget_json(forget)
    entries, versions = held["entries"], sum(map(len, held["revoked"].values()))
    gone = f"{many(entries, 'entry')} erased, {many(versions, 'version')} revoked"
    if forget.stage is Stage.LENDING:
        lent = ", ".join(f"{name}@{version}" for name, (version, _) in forget.body["lent"].items())
        _out.print(f"{gone}. Servers go on with {lent} until the rebuild, at the latest until {forget.body['until']}.")
    else:
        _out.print(
            f"Fenced in {report.seconds:.2f} s: no server answers from what saw the subject. "
            f"{gone}, in {many(len(forget.adapters), 'adapter')}."
        )
    if already:
        _out.print("The subject is forgotten here already.")
    elif not entries and not versions:
        _out.print("No entry names this subject: check the spelling, if it should have any.")
    elif not entries:
        _out.print(
            "No entry here names the subject: what is revoked learned from it in another adapter. Name that one too."
        )
    if receipt is not None:
        gone = (
            f"; {receipt.gone} more lie beyond the forget horizon, and their contents are gone" if receipt.gone else ""
        )
        gone += "; it is too late for more, as what was forgotten is erased" if already else ""
        _out.print(f"The receipt holds what {many(len(receipt.entries), 'entry')} said{gone}.")
    for holder in report.lost:
        _out.print(f"The server {holder} did not answer; its lease ran out, and it may not answer for adapters.")
    if forget.stage is not Stage.PURGED:
        left = "Rebuild, fence and purge" if forget.stage is Stage.LENDING else "Rebuild and purge"
        _out.print(f"{left} follow by themselves; `riverdelta registry list` shows request {forget.id}.")


def print_certified(forget: Forget, where: str) -> None:
    """Where the certificate of a purged forget lies."""
    _out.print(f"Rebuilt and purged; certified by {where}.")
    _out.print(f"`riverdelta registry verify --request {shlex.quote(forget.id)}` checks it.")


def print_interrupted(forget: Forget | None) -> None:
    """What becomes of a forget that nobody waits for any more."""
    _err.print(
        f"Interrupted; the forget goes on by itself, and `riverdelta registry list` shows request {forget.id}."
        if forget is not None
        else "Interrupted before anything was forgotten.",
        soft_wrap=True,
    )


def print_difference(found: Difference, as_json: bool) -> None:
    """What sets two versions apart."""
    if as_json:
        print_json(asdict(found))
        return
    one, two = (f"{found.adapter}@{number}" if number else "base" for number in found.versions)
    same = "one recipe" if found.recipes[0] == found.recipes[1] else "different recipes"
    _out.print(f"{one} and {two}: {many(len(found.common), 'segment')} in common, {same}.")
    for name, numbers in zip((one, two), found.learned, strict=True):
        _out.print(f"Only {name} learned: {_numbers(numbers)}.")
    sizes = " and ".join(f"{size:.4g}" for size in found.sizes)
    _out.print(f"Weights are {found.distance:.4g} apart, at sizes of {sizes}; furthest in:")
    for module, distance in found.furthest.items():
        _out.print(f"  {module}  {distance:.4g}")
    table = _table("metric", one, two)
    for name, pair in found.metrics.items():
        table.add_row(name, *(_figure(value) for value in pair))
    if found.metrics:
        _out.print(table)


def print_verified(found: Sequence[Verified], replayed: Mapping[str, Any], as_json: bool) -> None:
    """What verification found, and a replay of each adapter where there was one."""
    if as_json:
        print_json([{**asdict(each), "replay": replayed.get(each.adapter)} for each in found])
    else:
        for each in found:
            checked = f"{many(each.facts, 'fact')}, {many(each.segments, 'segment')}, {many(each.versions, 'version')}"
            _out.print(f"{each.adapter}: {checked}: {'as written' if not each.problems else 'DAMAGED'}.")
            for problem in each.problems:
                _out.print(f"  {problem}")
        for result in replayed.values():
            print_replayed(result)


def print_replayed(result: Mapping[str, Any]) -> None:
    """A version's digest beside that of the same trained anew from Kafka's events, for people."""
    if result["equal"] is None:
        _out.print(f"{result['adapter']} cannot be replayed. {result['why']}")
        return
    without = ", ".join(result["without"]) or "nobody"
    _out.print(f"live            {result['live']}  {result['adapter']}@{result['version']}")
    _out.print(f"counterfactual  {result['counterfactual']}  without {without}")
    told = "Equal, bit for bit." if result["equal"] else "They differ."
    _out.print(f"{many(result['entries'], 'entry')}, {result['tombstones']} left out. {told}")
    if result["unmatched"]:
        names = ", ".join(result["unmatched"])
        told = f"No event that {result['adapter']} learned from is about {names}: check the spelling of --without."
        _err.print(told, soft_wrap=True)
    if not result["equal"]:
        _err.print(
            "Name every forgotten subject with --without."
            if result["same_environment"]
            else "This machine's environment is not the one that trained the live version: equality is not promised."
        )


def print_certificate(found: Checked, replayed: Sequence[dict[str, object]], as_json: bool) -> None:
    """What was found of a certificate, and of what was trained again."""
    if as_json:
        print_json({**asdict(found), "replayed": list(replayed)})
    else:
        _out.print(
            f"Forget {found.request}: {many(found.erased, 'entry')} erased, {many(found.revoked, 'version')} revoked, "
            f"in {_some(found.adapters)}: {'in order' if not found.problems else 'NOT in order'}."
        )
        if found.opened is not None:
            gone = f"; {found.receipt_gone} more lay beyond the forget horizon" if found.receipt_gone else ""
            _out.print(f"  The receipt opens {found.opened} of {many(found.erased, 'erased entry')}{gone}.")
        for superseded in found.superseded:
            _out.print(f"  Superseded: {superseded}.")
        for each in replayed:
            result = "equal, bit for bit" if each["equal"] else f"NOT equal: {each['replayed']}"
            since = f" since @{each['since']}, before which contents lie beyond the horizon" if each["since"] else ""
            _out.print(f"  {each['version']} trained again{since}: {result}.")
            if not each["equal"] and not each["same_environment"]:
                _out.print("  This environment is not the one that trained it: equality is not promised.")
        for problem in found.problems:
            _out.print(f"  {problem}")


@contextmanager
def telling(what: str) -> Iterator[Callable[[str], None]]:
    """A line on standard error while something is waited for, and how far it has come."""
    with _err.status(f"{what} ...") as status:
        yield lambda how: status.update(f"{what}: {how} ...")


@contextmanager
def waiting(what: str) -> Iterator[Progress]:
    """The same, while leases are waited for."""
    with telling(what) as tell:
        yield lambda leases: tell(", ".join(lease.holder for lease in leases))


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _version(version: VersionRecord) -> dict[str, Any]:
    held = {**asdict(version), "parts": [[part.digest, part.state] for part in version.parts]}
    held["metrics"] = {key: value for key, value in version.metrics.items() if key not in ("losses", "new")}
    return held


def _refusals(version: VersionRecord) -> str:
    refused = [number for number, part in enumerate(version.parts) if part.refused]
    return f" without shards {_numbers(refused)}" if refused else ""


def _losses(version: VersionRecord) -> str:
    losses = version.metrics.get("losses") or []
    return f"{losses[0]:.3f} to {losses[-1]:.3f}" if losses else ""


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _measured(segment: SegmentRecord) -> str:
    """What of a rejected candidate's figures went which way."""
    m = segment.metrics
    pairs = {"it": ("prequential", "learned"), "earlier": ("earlier_before", "earlier_after")}
    pairs["questions"] = ("questions_before", "questions_after")
    told = [f"{name} {m[a]:.3f} to {m[b]:.3f}" for name, (a, b) in pairs.items() if a in m and b in m]
    return f" Loss on {', '.join(told)}." if told else ""


def _tell_rejections(head: AdapterRecord, count: int) -> None:
    if count >= Recipe.from_dict(head.recipe).gate.alarm:
        _out.print(
            f"{head.name} LEARNS NOTHING: its gate has rejected {count} segments in a row. `riverdelta registry show "
            f"{head.name}` says why; `accept {head.name} SEGMENT` or `discard {head.name} SEGMENT` decides by hand."
        )


def _told(fact: Fact) -> str:
    body = fact.body
    match fact.kind:
        case "sealed":
            held = ", set aside as the release is held" if body["held"] else ""
            return f"segment {body['segment']} sealed: {many(body['count'], 'entry')} by {body['trigger']}{held}"
        case "increment":
            withheld = f", withheld: {body['withheld']}" if "withheld" in body else ""
            return f"version {body['version']} learned segment {body['segment']}{withheld}"
        case "imported":
            return f"version {body['version']} imported"
        case "release":
            return "released"
        case "rollback":
            return f"rolled back and held; segments set aside: {_numbers(body['set_aside'])}"
        case "resume":
            return f"resumed ({body['mode']})"
        case "set_aside":
            return f"segment {body['segment']} set aside: {body['cause']}"
        case "by_hand":
            again = f"; to be learned again: {_numbers(body['again'])}" if body["again"] else ""
            return f"segment {body['segment']}: {body['hand']} by hand{again}"
        case "forget":
            revoked, entries = _numbers(body["revoked"]), body["entries"]
            return f"forget: {many(entries, 'entry')} erased, versions revoked: {revoked} ({body['request']})"
        case "forget_stage":
            return f"forget {body['stage']} ({body['request']})"
        case "dropped":
            return f"kept no longer: versions {_numbers(body['versions'])}; contents of {_numbers(body['segments'])}"
        case "allow":
            return f"a subject may be learned again from index {body['index']}"
        case _:
            return fact.kind


def _some(names: Collection[str]) -> str:
    shown = sorted(names)
    return ", ".join(shown[:3]) + (f" and {len(shown) - 3} more" if len(shown) > 3 else "") or "no adapter"


def _numbers(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers)) or "none"
