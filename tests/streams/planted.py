"""Bugs to plant: each is a mistake that the simulation must catch. `PLANTED[name](monkeypatch)` plants one."""

from collections.abc import Callable
from typing import Any

import pytest

from riverdelta.core.errors import Conflict
from riverdelta.registry import written
from riverdelta.registry.ledger import decisions
from riverdelta.streams import admission, joining, owner, sealing

from . import memory

Patch = pytest.MonkeyPatch


def _admit_redelivered(patch: Patch) -> None:
    """The ledger's watermark is ignored when an adapter is loaded."""
    load = admission.Admission.__init__

    def init(self: Any, name: str, **given: Any) -> None:
        load(self, name, **given)
        self._decided = {}

    patch.setattr(admission.Admission, "__init__", init)


def _forget_the_window(patch: Patch) -> None:
    """A restart knows no producer's ids."""
    load = admission.Admission.__init__
    patch.setattr(
        admission.Admission, "__init__", lambda self, name, **given: load(self, name, **{**given, "recent": ()})
    )


def _position_past_open(patch: Patch) -> None:
    """Positions are recorded at what was read, whatever is open."""
    patch.setattr(owner.Bucket, "floors", lambda self: dict(self.reached))


def _position_past_joins(patch: Patch) -> None:
    """Positions do not wait for what waits to be joined."""
    patch.setattr(joining.Joins, "floor", lambda self, where: None)


def _watermark_past_open(patch: Patch) -> None:
    """Sealing a part of what is open marks everything read as consumed."""
    drafts = admission.Admission._drafts

    def too_far(self: Any, parts: Any) -> Any:
        made = drafts(self, parts)
        for draft in made:
            for where, (expected, _) in draft.consumed.items():
                draft.consumed[where] = (expected, self._decided[where])
        return made

    patch.setattr(admission.Admission, "_drafts", too_far)


def _retry_with_old_contents(patch: Patch) -> None:
    """After a forget the epoch is taken over, the suppression list is not."""

    def refresh(self: Any, *states: Any) -> int:
        for state in states:
            state.epoch = self._ledger.adapter(state.name).epoch
        return 0

    patch.setattr(owner.Owner, "refresh", refresh)


def _allowed_at_once(patch: Patch) -> None:
    """Who is forgotten and allowed before anybody looks was never forgotten."""
    suppress = admission.Admission.suppress
    patch.setattr(admission.Admission, "suppress", lambda self, *given: suppress(self, *given[:4]))


def _ignore_conflict(patch: Patch) -> None:
    """A conflict is taken for a success."""

    def resolve(self: Any, state: Any, why: Exception, payloads: Any) -> None:
        if isinstance(why, Conflict):
            state.open.clear()
            state._first.clear()

    patch.setattr(sealing.Sealer, "_resolve", resolve)


def _seal_anything(patch: Patch) -> None:
    """The ledger does not check where an adapter's log ends, nor what was consumed."""

    def seal(self: Any, asked: Any) -> Any:
        head = self.adapter(asked.adapter)
        free = {where: (self.moved[head.name].get(where, 0), to) for where, (_, to) in asked.consumed.items()}
        changed = type(asked)(
            asked.adapter, asked.epoch, head.next_index, asked.manifest, asked.trigger, asked.payload,
            asked.payload_sha, free, asked.keyring, asked.root,
        )  # fmt: skip
        return real(self, changed)

    real = memory.MemoryLedger._seal
    patch.setattr(memory.MemoryLedger, "_seal", seal)


def _any_epoch(patch: Patch) -> None:
    """The ledger seals under an old epoch, and fences are acknowledged unread."""
    decide = decisions.decide_seal
    patch.setattr(memory, "decide_seal", lambda head, epoch, *given: decide(head, head.epoch, *given))
    patch.setattr(owner.Owner, "catch_up", lambda self, fence: setattr(self, "fence", fence))


def _drop_dead_letters(patch: Patch) -> None:
    """Positions are recorded although dead letters were not delivered."""
    patch.setattr(memory.MemoryDelivery, "deliver", lambda self, letters: self.letters.extend(letters[:1]))


def _seal_while_behind(patch: Patch) -> None:
    """Sealing does not wait until what waits to be joined has been collected again."""
    patch.setattr(admission.Admission, "_is_behind", lambda self, reached: False)


def _open_pair_holds_one(patch: Patch) -> None:
    """An open pair keeps only one of its two events readable."""
    hold = admission.Admission._hold

    def half(self: Any, entry: Any) -> None:
        partner, entry.partner = entry.partner, None
        hold(self, entry)
        entry.partner = partner

    patch.setattr(admission.Admission, "_hold", half)


def _pairs_decided_by_the_last(patch: Patch) -> None:
    """A pair's entry always takes the identity of the event that came last, even when that was decided before."""
    patch.setattr(joining, "_decider", lambda arriving, interaction, feedback: arriving)


def _cut_across_disorder(patch: Patch) -> None:
    """Entries are cut apart although a later one lies at a lower offset."""
    hold = admission.Admission._append

    def append(self: Any, entry: Any) -> str:
        verdict = hold(self, entry)
        self._ordered = True
        return verdict

    patch.setattr(admission.Admission, "_append", append)


def _leave_payloads(patch: Patch) -> None:
    """A refused seal's payload, which may hold what was forgotten, stays in the store."""
    patch.setattr(memory.MemoryStore, "delete", lambda self, key: None)


def _old_incarnation(patch: Patch) -> None:
    """Offsets of a topic made again are taken for those of the deleted one."""
    from riverdelta.streams import intake

    sort = intake.Intake.sort
    patch.setattr(
        intake.Intake,
        "sort",
        lambda self, read: sort(
            self, read._replace(run="run", reached={("run", part): at for (_, part), at in read.reached.items()})
        ),
    )


def _duplicates_decided_at_once(patch: Patch) -> None:
    """A duplicate of an open entry counts as decided although a crash may lose the entry."""
    patch.setattr(admission.Admission, "_copy", lambda self, known, entry: None)


def _never_look(patch: Patch) -> None:
    """What was collected while its writer slept is named all the same."""
    patch.setattr(written.Written, "look", lambda self: None)


PLANTED: dict[str, Callable[[Patch], None]] = {
    plant.__name__.strip("_"): plant
    for plant in (
        _admit_redelivered,
        _forget_the_window,
        _position_past_open,
        _position_past_joins,
        _watermark_past_open,
        _retry_with_old_contents,
        _allowed_at_once,
        _ignore_conflict,
        _seal_anything,
        _any_epoch,
        _drop_dead_letters,
        _seal_while_behind,
        _open_pair_holds_one,
        _pairs_decided_by_the_last,
        _cut_across_disorder,
        _leave_payloads,
        _old_incarnation,
        _duplicates_decided_at_once,
        _never_look,
    )
}
