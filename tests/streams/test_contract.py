"""The contract of the events topic: whatever bytes come, an event or a reason; and the generated page."""

import re
from pathlib import Path
from typing import Any

import jsonschema_rs
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from riverdelta.core.errors import Unavailable
from riverdelta.core.events import MAX_EVENT_BYTES, ContractError, content_of, decode
from riverdelta.core.keys import SubjectKey
from riverdelta.core.settings import Kafka, Settings
from riverdelta.streams import access, asyncapi
from riverdelta.streams.dead_letters import REASONS
from riverdelta.streams.intake import Intake, Read
from riverdelta.streams.publish import publish

INTAKE = Intake(SubjectKey(bytes(32)), 4)
words = st.text(max_size=12)
loose = st.dictionaries(
    st.sampled_from(["type", "adapter", "subject", "id", "text", "prompt", "completion", "messages", "rating",
                     "response", "correction", "specversion", "data", "source", "digest"]),
    st.one_of(words, st.integers(), st.none(), st.lists(words, max_size=3),
              st.sampled_from(["example", "feedback", "interaction", "acme", "1.0", "riverdelta.example.v1"])),
)  # fmt: skip


@given(st.one_of(st.binary(max_size=200), loose.map(msgspec.json.encode)), st.lists(st.tuples(words, st.binary())))
def test_any_bytes_are_an_event_or_a_dead_letter(value: bytes, headers: list[tuple[str, bytes]]) -> None:
    read = Read((0, 1), "run", [(0, 7, 0, None, value, tuple(headers))], {("run", 0): 8})
    parcels = [parcel for _, parcel in INTAKE.sort(read)]
    assert sum(len(parcel.items) + len(parcel.dead) for parcel in parcels) == 1


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (b"", "empty"),
        (b"junk", "malformed"),
        (b'{"adapter":"acme","text":"\xff"}', "malformed"),
        (b"[" * 100_000, "invalid"),
        (b" " * (MAX_EVENT_BYTES + 1), "too_large"),
        (b'{"adapter":"acme"}', "invalid"),
        (b'{"adapter":"acme","text":" "}', "invalid"),
        (b'{"adapter":"acme","text":"a","prompt":"b","completion":"c"}', "invalid"),
        (b'{"adapter":"Acme","text":"a"}', "adapter"),
        (b'{"adapter":"base","text":"a"}', "adapter"),
        (b'{"type":"feedback","adapter":"acme","response":"r"}', "invalid"),
        (b'{"type":"feedback","adapter":"acme","response":"r","rating":2}', "invalid"),
        (b'{"type":"feedback","adapter":"acme","response":"r","correction":" "}', "invalid"),
        (b'{"type":"interaction","adapter":"acme","response":"r","digest":"d","completion":"c"}', "invalid"),
        (b'{"type":"other","adapter":"acme","text":"a"}', "type"),
        (b'{"type":7,"adapter":"acme","text":"a"}', "type"),
        (b'{"type":{},"adapter":"acme","text":"a"}', "type"),
        (b'{"specversion":"1.0","id":"1","source":"s","type":"other","data":{"adapter":"acme","text":"a"}}', "type"),
    ],
)
def test_what_is_no_event_has_a_reason(value: bytes, reason: str) -> None:
    with pytest.raises(ContractError) as caught:
        decode(value)
    assert caught.value.reason == reason


def test_cloudevents_in_both_modes_are_the_plain_event() -> None:
    plain = decode(b'{"adapter":"acme","subject":"ann","id":"7","source":"crm","prompt":"Q","completion":"A"}')
    data = {"adapter": "acme", "prompt": "Q", "completion": "A"}
    envelope: dict[str, Any] = {"specversion": "1.0", "id": "7", "source": "crm", "subject": "ann"}
    structured = msgspec.json.encode({**envelope, "type": "riverdelta.example.v1", "data": data})
    headers = [(f"ce_{name}", value.encode()) for name, value in {**envelope, "type": "riverdelta.example.v1"}.items()]
    assert decode(structured) == decode(msgspec.json.encode(data), headers) == plain


@pytest.mark.parametrize(
    ("held", "subjects"),
    [("bob", ("ann", "bob")), (["cy", "bob"], ("ann", "bob", "cy")), ("", ("ann",)), ([], ("ann",)), ("ann", ("ann",))],
)
def test_a_cloudevent_is_about_whom_its_envelope_names_and_whom_its_data_names(held: Any, subjects: Any) -> None:
    data = {"adapter": "acme", "text": "hi", "subject": held}
    envelope = {"specversion": "1.0", "id": "7", "source": "crm", "subject": "ann", "type": "riverdelta.example.v1"}
    headers = [(f"ce_{name}", value.encode()) for name, value in envelope.items()]
    assert decode(msgspec.json.encode({**envelope, "data": data})).subjects == subjects
    assert decode(msgspec.json.encode(data), headers).subjects == subjects


def test_an_entry_says_nothing_of_who_it_is_about() -> None:
    event = decode(b'{"adapter":"acme","subject":["ann","bo"],"id":"7","source":"crm","time":"now","text":"hi"}')
    assert event.subjects == ("ann", "bo")
    assert content_of(event.record) == b'{"type":"example","text":"hi"}'


GOLDEN = [
    b'{"adapter":"acme","text":"hi"}',
    b'{"type":"example","adapter":"acme","subject":["ann","bo"],"prompt":"Q","completion":"A","id":"1","time":"now"}',
    b'{"adapter":"acme","messages":[{"role":"user","content":"Q"},{"role":"assistant","content":"A"}]}',
    b'{"type":"interaction","adapter":"acme","response":"r","digest":"d","prompt":"Q","completion":"A"}',
    b'{"type":"feedback","adapter":"acme","response":"r","rating":1}',
    b'{"type":"feedback","adapter":"acme","response":"r","correction":"B"}',
    b'{"specversion":"1.0","id":"1","source":"s","type":"riverdelta.example.v1","data":{"adapter":"acme","text":"a"}}',
]


@pytest.mark.parametrize("value", GOLDEN)
def test_events_of_the_first_version_stay_readable_and_newer_fields_do_not_matter(value: bytes) -> None:
    newer = msgspec.json.encode({**msgspec.json.decode(value), "since_v9": {"a": [1]}})
    assert decode(newer) == decode(value)
    assert _fits(value)
    assert _fits(newer)
    assert b"since_v9" not in content_of(decode(newer).record)


_SCHEMAS = asyncapi.document()["components"]["schemas"]
PAGE = {
    name: jsonschema_rs.validator_for({"$ref": f"#/components/schemas/{name}", "components": {"schemas": _SCHEMAS}})
    for name in ("Example", "Interaction", "Feedback", "CloudEvent")
}


def _fits(value: bytes) -> bool:
    said = msgspec.json.decode(value)
    if not isinstance(said, dict):
        return False
    name = "CloudEvent" if "specversion" in said else str(said.get("type", "example")).capitalize()
    return name in PAGE and bool(PAGE[name].is_valid(said))


@settings(deadline=None)
@given(st.one_of(st.sampled_from(GOLDEN), loose.map(msgspec.json.encode)))
def test_whatever_is_read_fits_the_page(value: bytes) -> None:
    try:
        decode(value)
    except ContractError:
        return
    assert _fits(value)


def test_the_page_is_what_the_types_say() -> None:
    committed = Path(__file__).parents[2] / "docs" / "asyncapi.yaml"
    assert committed.read_text() == asyncapi.page(), "python -m riverdelta.streams.asyncapi docs/asyncapi.yaml"


def test_every_reason_of_a_dead_letter_is_in_the_docs() -> None:
    page = (Path(__file__).parents[2] / "docs" / "events.md").read_text()
    table = page.split("| reason | mend it by |", 1)[1].split("\n\n", 1)[0]
    told = [reason for row in table.splitlines() for reason in re.findall(r"`(\w+)`", row.split("|")[1] if row else "")]
    assert sorted(told) == sorted(REASONS)


def test_where_nothing_listens_a_plain_sentence_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access, "_LISTEN_SECONDS", 0.0)
    with pytest.raises(Unavailable, match=r"Nothing listens at 127.0.0.1:1\. Start it with riverdelta up"):
        publish(Settings(kafka=Kafka(bootstrap="127.0.0.1:1")), [])
