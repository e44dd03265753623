"""Admission as a state machine: what is cut is consecutive, closed below its watermarks, and decided once."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from riverdelta.core.curation import Curation
from riverdelta.core.recipe import Curate, FeedbackPolicy
from riverdelta.streams.admission import ADMITTED, DUPLICATE, REDELIVERED, SUPPRESSED, UNUSED, WAITING, Admission
from riverdelta.streams.items import FEEDBACK, INTERACTION, Item
from riverdelta.streams.joining import Joins

P0, P1 = ("run", 0), ("run", 1)


def fresh(**given: Any) -> Admission:
    standard = {
        "epoch": 0, "next_index": 0, "next_segment": 1, "count": 3, "age": 5.0, "linger": 1.0, "dedupe": 4,
        "consumed": {}, "curate": Curation(Curate()), "feedback": FeedbackPolicy(),
        "suppressed": frozenset(), "revoked": frozenset(), "recent": (), "joins": Joins(100, 60.0),
    }  # fmt: skip
    return Admission("ada", **{**standard, **given})


def example(offset: int, where: tuple[str, int] = P0, event: bytes = b"", subject: str = "") -> Item:
    return Item("example", "ada", where, offset, event, (subject,) if subject else (), b"{}", None)


def test_a_full_segment_is_cut_at_once_and_the_rest_when_it_is_old() -> None:
    state = fresh()
    for offset in range(4):
        assert state.admit(example(offset), at=float(offset)) == ADMITTED
    full = state.cut(3.0, {})
    assert [(draft.trigger, len(draft.entries)) for draft in full] == [("count", 3)]
    assert full[0].consumed == {P0: (0, 3)}
    state.settle(full[0])
    assert state.cut(7.9, {}) == []
    rest = state.cut(8.0, {})
    assert [(draft.trigger, draft.first, draft.consumed) for draft in rest] == [("age", 3, {P0: (3, 4)})]
    assert state.cut(8.0, {}, "drift")[0].trigger == "drift"
    assert [state.lingers(at) for at in (3.0, 3.9, 4.0)] == [False, False, True]


def test_what_the_rules_drop_is_no_entry_and_takes_no_identity() -> None:
    state = fresh(curate=Curation(Curate(deny=("spam",), redact=("ip",))))
    spam = replace(example(0, event=b"e"), content=b'{"type":"example","text":"spam"}')
    kept = replace(example(1, event=b"e"), content=b'{"type":"example","text":"at 10.0.0.7"}')
    assert [state.admit(item, 0.0) for item in (spam, kept, spam)] == ["curated_denied", ADMITTED, REDELIVERED]
    (draft,) = state.cut(9.0, {})
    assert draft.contents() == [b'{"type":"example","text":"at [ip]"}']
    assert draft.consumed == {P0: (0, 2)}


@pytest.mark.parametrize(
    ("policy", "learned"),
    [
        (FeedbackPolicy(), [b" B.", b" A."]),
        (FeedbackPolicy(corrections=False), [b" A."]),
        (FeedbackPolicy(approval=0.5), [b" B."]),
    ],
)
def test_feedback_teaches_what_the_recipe_says(policy: FeedbackPolicy, learned: list[bytes]) -> None:
    state = fresh(feedback=policy, count=9)
    said = b'{"type":"interaction","prompt":"Q","completion":" A."}'
    assert state.join(Item(INTERACTION, "ada", P0, 0, b"", (), said, None, b"r", "d" * 64), 0.0, 0.0) == [WAITING]
    for offset, told in enumerate((b'{"correction":" B."}', b'{"rating":0.5}'), 1):
        item = Item(FEEDBACK, "ada", P0, offset, b"lesson%d" % offset, (), told, None, b"r")
        assert state.join(item, 0.0, 0.0) in ([ADMITTED], [UNUSED])
    assert [entry.content for entry in state.open] == [
        b'{"type":"example","prompt":"Q","completion":"%s"}' % answer for answer in learned
    ]


def test_a_duplicate_is_known_within_the_window_and_a_restart_knows_the_same() -> None:
    state = fresh()
    assert [state.admit(example(n, event=b"e"), 0.0) for n in range(2)] == [ADMITTED, DUPLICATE]
    for offset in range(2, 6):
        state.admit(example(offset), 0.0)
    assert state.admit(example(6, event=b"e"), 0.0) == ADMITTED  # four entries lie between
    again = fresh(next_index=6, recent=[(2, b""), (5, b"e")], consumed={P0: 7})
    assert again.admit(example(6, event=b"e"), 0.0) == REDELIVERED
    assert again.admit(example(7, event=b"e"), 0.0) == DUPLICATE


def duplicates_of_an_open_entry() -> list[Any]:
    """The watermark and floor of a partition whose last event repeats one that is still open, elsewhere."""
    state = fresh(count=2)
    for offset in range(2):
        state.admit(example(offset), 0.0)
    assert [state.admit(example(at, where, b"e"), 0.0) for at, where in ((0, P1), (2, P0))] == [ADMITTED, DUPLICATE]
    (draft,) = state.cut(0.0, {})
    state.settle(draft)
    (rest,) = state.cut(9.0, {})
    return [draft.consumed, state.floor(P0), rest.consumed]


def test_a_duplicate_stays_undecided_while_its_first_is_open() -> None:
    # The open entry's topic may be deleted before a restart reads it again: then the duplicate takes its place.
    assert duplicates_of_an_open_entry() == [{P0: (0, 2)}, 2, {P0: (2, 3), P1: (0, 1)}]


def test_both_of_a_duplicate_pair_stay_readable_while_the_first_is_open() -> None:
    state = fresh()
    for where, offset in ((("gone", 0), 7), (P1, 4)):
        told = Item(FEEDBACK, "ada", where, offset, b"lesson", (), b'{"rating":1}', None, b"r")
        assert state.join(told, 0.0, 0.0) == ["waiting"]
    asked = Item(INTERACTION, "ada", P0, 1, b"", (), b'{"prompt":"q","completion":"a"}', None, b"r", "d")
    assert state.join(asked, 0.0, 0.0) == [ADMITTED, DUPLICATE]
    assert (state.floor(P0), state.floor(P1)) == (1, 4)


@pytest.mark.parametrize("copy_first", [False, True])
def test_an_interaction_sent_again_stays_undecided_while_its_pair_is_open(copy_first: bool) -> None:
    # Else both events of a pair would count as decided after a crash, and nobody would make an entry of them.
    state = fresh(count=2, consumed={P0: 12})
    for offset in range(2):
        state.admit(example(offset, P1), 0.0)
    said = b'{"prompt":"q","completion":"a"}'
    asked, again = (Item(INTERACTION, "ada", *place, b"", (), said, None, b"r", "d") for place in ((P1, 2), (P0, 12)))
    told = Item(FEEDBACK, "ada", P0, 11, b"lesson", (), b'{"rating":1}', None, b"r")  # decided before
    order = [asked, again, told] if copy_first else [asked, told, again]
    assert [verdict for item in order for verdict in state.join(item, 0.0, 0.0)].count(ADMITTED) == 1
    (draft,) = state.cut(0.0, {P0: 12, P1: 3})
    assert draft.consumed == {P1: (0, 2)}
    state.settle(draft)
    (pair,) = state.cut(9.0, {P0: 13, P1: 3})
    assert pair.consumed == {P0: (12, 13), P1: (2, 3)}


def test_what_is_forgotten_takes_its_index_and_says_nothing() -> None:
    state = fresh(suppressed=frozenset({"ann"}))
    assert state.admit(example(0, subject="ann"), 0.0) == SUPPRESSED
    assert state.admit(example(1, subject="bob"), 0.0) == ADMITTED
    assert state.suppress(frozenset({"ann", "bob"}), frozenset(), epoch=1) == 1
    (draft,) = state.cut(9.0, {})
    assert draft.epoch == 1
    assert draft.contents() == [None, None]
    assert [entry.tombstone for entry in draft.manifest().entries] == [True, True]


def test_text_that_a_revoked_version_wrote_is_not_learned() -> None:
    state = fresh(revoked=frozenset({"d1"}))
    for offset, digest in enumerate(("d1", "d2")):
        said, response = b'{"prompt":"q","completion":"a"}', digest.encode()
        state.join(Item(INTERACTION, "ada", P0, offset, b"", (), said, None, response, digest), 0.0, 0.0)
    for offset, response in enumerate((b"d1", b"d2")):
        told = Item(FEEDBACK, "ada", P1, offset, response, (), b'{"rating":1}', None, response)
        assert state.join(told, 0.0, 0.0) == [SUPPRESSED if response == b"d1" else ADMITTED]


def met_again_out_of_order() -> Admission:
    """After a restart: feedback that was not decided comes first, its interaction, decided long ago, last."""
    state = fresh(count=1, consumed={P0: 5})
    told = Item(FEEDBACK, "ada", P1, 0, b"lesson", (), b'{"rating":1}', None, b"r")
    assert state.join(told, 0.0, 0.0) == ["waiting"]
    assert state.admit(example(1, P1), 0.0) == ADMITTED
    asked = Item(INTERACTION, "ada", P0, 2, b"", (), b'{"prompt":"q","completion":"a"}', None, b"r", "d")
    assert state.cut(9.0, {P0: 2, P1: 2}) == []  # what waits is still being collected
    assert state.join(asked, 0.0, 0.0) == [ADMITTED]
    return state


def test_a_pair_takes_the_identity_of_its_undecided_event() -> None:
    state = met_again_out_of_order()
    assert [(entry.where, entry.offset) for entry in state.open] == [(P1, 1), (P1, 0)]
    assert (state.floor(P0), state.floor(P1)) == (2, 0)  # both of the pair stay readable


def test_entries_out_of_order_are_cut_together() -> None:
    (draft,) = met_again_out_of_order().cut(9.0, {P0: 5, P1: 2})
    assert [entry.offset for entry in draft.entries] == [1, 0]
    assert draft.consumed == {P1: (0, 2)}


items = st.lists(
    st.one_of(
        st.tuples(st.just("example"), st.sampled_from([P0, P1]), st.sampled_from([b"", b"", b"e1", b"e2"])),
        st.tuples(st.just("interaction"), st.sampled_from([P0, P1]), st.sampled_from([b"r1", b"r2", b"r3"])),
        st.tuples(st.just("feedback"), st.sampled_from([P0, P1]), st.sampled_from([b"r1", b"r2", b"r3"])),
        st.tuples(st.just("cut"), st.just(P0), st.just(b"")),
    ),
    max_size=60,
)


@given(items, st.integers(1, 4))
def test_what_is_cut_is_all_that_lies_below_its_watermarks(plan: list[Any], count: int) -> None:
    state = fresh(count=count, dedupe=1000)
    offsets = {P0: 0, P1: 0}
    admitted, sealed, index = 0, [], 0
    moved = {P0: 0, P1: 0}
    for step, (kind, where, word) in enumerate(plan):
        if kind == "cut":
            for draft in state.cut(float(step), dict(offsets), "test"):
                assert draft.first == index
                index += len(draft.entries)
                sealed += [(entry.where, entry.offset) for entry in draft.entries]
                for part, (expected, to) in draft.consumed.items():
                    assert moved[part] == expected < to
                    moved[part] = to
                state.settle(draft)
                assert all(offset < moved[part] for part, offset in sealed)
                assert all(entry.offset >= moved[entry.where] for entry in state.open)
            continue
        offset, offsets[where] = offsets[where], offsets[where] + 1
        if kind == "example":
            admitted += state.admit(example(offset, where, word), float(step)) == ADMITTED
        else:
            content = b'{"prompt":"q","completion":"a"}' if kind == INTERACTION else b'{"rating":1}'
            item = Item(kind, "ada", where, offset, word if kind == FEEDBACK else b"", (), content, None, word)
            admitted += state.join(item, float(step), 0.0).count(ADMITTED)
    assert len(sealed) + len(state.open) == admitted
