"""The contract of the events topic: what a record may be, and how it is read.

A record is plain JSON, a CloudEvents 1.0 JSON object (structured mode), or CloudEvents headers with the data as
its value (binary mode). Whatever the form, `decode` gives an `Event` or a `ContractError`.
"""

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from .errors import BadInput
from .names import check_adapter, subject_name

Text = Annotated[str, Meta(max_length=100_000)]
Ident = Annotated[str, Meta(max_length=256)]
Response = Annotated[str, Meta(min_length=1, max_length=256)]
Subjects = Ident | Annotated[list[Ident], Meta(max_length=16)]

MAX_EVENT_BYTES = 512 * 1024


class ContractError(BadInput):
    """A record that is not an event. `reason` is a stable word for counters and headers."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message, "Compare it with docs/events.md.")
        self.reason = reason


class Message(Struct, frozen=True):
    """One turn of a chat."""

    role: Literal["system", "user", "assistant"]
    content: Text


class _Named(Struct, frozen=True, kw_only=True):
    adapter: str
    subject: Subjects = ""
    id: Ident = ""
    source: Ident = ""
    time: Annotated[str, Meta(max_length=64)] = ""


class Example(_Named, frozen=True, tag="example"):
    """Something to learn: `prompt` and `completion`, or chat `messages`, or plain `text`."""

    prompt: Text | UnsetType = UNSET
    completion: Text | UnsetType = UNSET
    messages: Annotated[list[Message], Meta(min_length=1, max_length=256)] | UnsetType = UNSET
    text: Text | UnsetType = UNSET


class Interaction(_Named, frozen=True, tag="interaction"):
    """An answer that a server gave: the prompt, what was generated, and the digest of the weights that wrote it."""

    response: Response
    digest: Annotated[str, Meta(max_length=64)]
    completion: Text
    prompt: Text | UnsetType = UNSET
    messages: Annotated[list[Message], Meta(min_length=1, max_length=256)] | UnsetType = UNSET


class Feedback(_Named, frozen=True, tag="feedback"):
    """What somebody thought of an answer: a `rating` from -1 to 1, or a `correction` to learn instead."""

    response: Response
    rating: Annotated[float, Meta(ge=-1, le=1)] | UnsetType = UNSET
    correction: Text | UnsetType = UNSET


Record = Example | Interaction | Feedback


class Event(Struct, frozen=True):
    """One valid record, in one form whatever the form it came in."""

    record: Record
    subjects: tuple[str, ...]

    @property
    def kind(self) -> str:
        """`example`, `interaction` or `feedback`."""
        return str(self.record.__struct_config__.tag)

    @property
    def adapter(self) -> str:
        """The adapter that the event is for."""
        return self.record.adapter


class Envelope(Struct, frozen=True, kw_only=True):
    """A CloudEvents 1.0 event in structured mode."""

    specversion: Literal["1.0"]
    id: Annotated[str, Meta(min_length=1, max_length=256)]
    source: Annotated[str, Meta(min_length=1, max_length=256)]
    type: str
    data: dict[str, Any]
    subject: Ident | None = None
    time: str | None = None


class _Said(Struct, frozen=True, tag="example"):
    prompt: str | UnsetType
    completion: str | UnsetType
    messages: list[Message] | UnsetType
    text: str | UnsetType


_encoder = msgspec.json.Encoder()
_check_adapter = lru_cache(65_536)(check_adapter)  # the same few come again and again
# One reader for the common case: plain records carry "type" as a tag, an example need not.
_plain: msgspec.json.Decoder[Record] = msgspec.json.Decoder(Record)
_example = msgspec.json.Decoder(Example)
_peek = msgspec.json.Decoder(dict[str, Any])
CLOUD_TYPES = {f"riverdelta.{kind}.v1": kind for kind in ("example", "interaction", "feedback")}


def decode(value: bytes | None, headers: Sequence[tuple[str, bytes | None]] = ()) -> Event:
    """The event in a Kafka record's value and headers.

    >>> event = decode(b'{"adapter":"acme","subject":"ann","prompt":"Q:","completion":" A"}')
    >>> event.kind, event.adapter, event.subjects
    ('example', 'acme', ('ann',))
    """
    if not value:
        raise ContractError("empty", "The record has no value.")
    if len(value) > MAX_EVENT_BYTES:
        raise ContractError("too_large", f"The record has {len(value)} bytes; {MAX_EVENT_BYTES} are allowed.")
    try:
        if headers and any(key == "ce_specversion" for key, _ in headers):
            record = _binary(value, headers)
        elif b'"specversion"' in value and "specversion" in (peeked := _peek.decode(value)):
            record = _structured(msgspec.convert(peeked, Envelope))
        elif b'"type"' in value:
            record = _tagged(value)
        else:
            record = _example.decode(value)
    except msgspec.ValidationError as error:
        raise ContractError("invalid", f"The record does not fit the contract: {error}.") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ContractError("malformed", f"The record is not JSON: {error}.") from error
    return checked(record)


def _tagged(value: bytes) -> Record:
    try:
        return _plain.decode(value)
    except msgspec.ValidationError:
        peeked = _peek.decode(value)
        if "type" not in peeked:
            return _example.decode(value)  # the word "type" was text, not a key
        if peeked["type"] not in CLOUD_TYPES.values():
            known = ", ".join(CLOUD_TYPES.values())
            raise ContractError("type", f"Unknown type {str(peeked['type'])[:80]!r}; known are {known}.") from None
        raise


def checked(record: Record) -> Event:
    """The event of a record whose parts fit together, else `ContractError`."""
    try:
        _check_adapter(record.adapter)
    except BadInput as error:
        raise ContractError("adapter", error.message) from error
    if isinstance(record, Example):
        _check_example(record)
    elif isinstance(record, Feedback):
        if record.rating is UNSET and record.correction is UNSET:
            raise ContractError("invalid", "Feedback needs a rating or a correction.")
        if record.correction is not UNSET and not str(record.correction).strip():
            raise ContractError("invalid", "The correction is empty.")
    elif not record.completion.strip():
        raise ContractError("invalid", "The completion is empty.")
    elif (record.prompt is UNSET) == (record.messages is UNSET):
        raise ContractError("invalid", "An interaction needs prompt or messages, one of them.")
    subject = record.subject
    if isinstance(subject, str):  # nearly always
        return Event(record, (subject_name(subject),) if subject else ())
    return Event(record, tuple(sorted({subject_name(name) for name in subject if name})))


def _check_example(record: Example) -> None:
    prompt, completion, messages, text = record.prompt, record.completion, record.messages, record.text
    forms = (completion is not UNSET) + (messages is not UNSET) + (text is not UNSET)
    if forms != 1 or (prompt is UNSET) != (completion is UNSET):
        raise ContractError("invalid", "An example needs prompt and completion, or messages, or text: one of them.")
    if isinstance(completion, str):
        if not completion.strip():
            raise ContractError("invalid", "The completion is empty.")
    elif isinstance(text, str):
        if not text.strip():
            raise ContractError("invalid", "The text is empty.")
    elif not any(message.role == "assistant" and message.content.strip() for message in messages or ()):
        raise ContractError("invalid", "The messages hold no assistant turn to learn.")


def _structured(envelope: Envelope) -> Record:
    return _from_attributes(envelope.type, envelope.data, envelope.id, envelope.source, envelope.subject, envelope.time)


def _binary(value: bytes, headers: Iterable[tuple[str, bytes | None]]) -> Record:
    ce = {key[3:]: raw.decode() for key, raw in headers if key.startswith("ce_") and raw is not None}
    if ce.get("specversion") != "1.0" or not ce.get("id") or not ce.get("source"):
        raise ContractError("invalid", "Binary CloudEvents need ce_specversion 1.0, ce_id and ce_source.")
    data = _peek.decode(value)
    return _from_attributes(ce.get("type", ""), data, ce["id"], ce["source"], ce.get("subject"), ce.get("time"))


def _from_attributes(
    type_: str, data: dict[str, Any], id_: str, source: str, subject: str | None, time: str | None
) -> Record:
    if type_ not in CLOUD_TYPES:
        raise ContractError("type", f"Unknown CloudEvents type {type_[:80]!r}; known are {', '.join(CLOUD_TYPES)}.")
    merged = {
        **data,
        "subject": _both(subject, data.get("subject", "")),
        "type": CLOUD_TYPES[type_],
        "id": id_,
        "source": source,
        "time": time or "",
    }
    record: Record = msgspec.convert(merged, Record)
    return record


def _both(envelope: str | None, held: Any) -> Any:
    """The subjects of an event whose envelope and data each name some: it is about all of them."""
    if not envelope or not held:
        return envelope or held
    if isinstance(held, str):
        return [envelope, held]
    return [envelope, *held] if isinstance(held, list) else held  # what else it is does not fit, and is said so


def content_of(record: Record) -> bytes:
    """What an entry keeps of a record: its JSON without the names that the manifest holds hashed.

    >>> content_of(decode(b'{"adapter":"acme","subject":"ann","id":"7","text":"hi"}').record)
    b'{"type":"example","text":"hi"}'
    """
    if isinstance(record, Example):  # nearly all of them
        return _encoder.encode(_Said(record.prompt, record.completion, record.messages, record.text))
    held = msgspec.to_builtins(record)
    for name in ("adapter", "subject", "id", "source", "time"):
        held.pop(name, None)
    return msgspec.json.encode(held)
