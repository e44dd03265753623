"""The AsyncAPI page of the topics, generated from the types that read them.

`python -m riverdelta.streams.asyncapi docs/asyncapi.yaml` writes it; a test keeps the committed page in step.
"""

import sys
from pathlib import Path
from typing import Any

import msgspec

from riverdelta.core import events
from riverdelta.core.names import ADAPTER
from riverdelta.core.settings import Topics
from riverdelta.registry.control import Message as ControlMessage

_REF = "#/components/schemas/{name}"
_KINDS = (events.Example, events.Interaction, events.Feedback)


def document() -> dict[str, Any]:
    """The page, as AsyncAPI 3.0."""
    topics = Topics()
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "Riverdelta",
            "version": "1",
            "description": "What may be published for adapters to learn from, and what is answered where it cannot be.",
            "license": {"name": "Apache-2.0"},
        },
        "defaultContentType": "application/json",
        "channels": {
            "events": {
                "address": topics.events,
                "description": "Any partition may carry any adapter's events, with any key or none. "
                f"A record has at most {events.MAX_EVENT_BYTES} bytes.",
                "messages": {name: {"$ref": f"#/components/messages/{name}"} for name in _event_messages()},
            },
            "deadLetters": {
                "address": topics.dead_letters,
                "description": "Records that were refused: their original key, value and headers, and dlt.* headers.",
                "messages": {"deadLetter": {"$ref": "#/components/messages/deadLetter"}},
            },
            "control": {
                "address": topics.control,
                "description": "Requests to forget a subject or to allow it again. Grant Write on it sparingly.",
                "messages": {"control": {"$ref": "#/components/messages/control"}},
            },
        },
        "operations": {
            "publishEvent": {"action": "receive", "channel": {"$ref": "#/channels/events"}},
            "reportDeadLetter": {"action": "send", "channel": {"$ref": "#/channels/deadLetters"}},
            "requestControl": {"action": "receive", "channel": {"$ref": "#/channels/control"}},
        },
        "components": {
            "messages": {
                **_event_messages(),
                "deadLetter": {"summary": "A refused record.", "headers": _dead_letter_headers(), "payload": {}},
                "control": {
                    "summary": "Forget or allow a subject.",
                    "payload": {"$ref": _REF.format(name="Control")},
                },
            },
            "schemas": _schemas(),
        },
    }


def page() -> str:
    """The page as YAML."""
    return msgspec.yaml.encode(document()).decode()


def _event_messages() -> dict[str, Any]:
    messages: dict[str, Any] = {
        kind.__name__.lower(): {"summary": _summary(kind), "payload": {"$ref": _REF.format(name=kind.__name__)}}
        for kind in _KINDS
    }
    messages["cloudEvent"] = {
        "summary": "Any of these as a CloudEvents 1.0 JSON object (structured mode).",
        "contentType": "application/cloudevents+json",
        "payload": {"$ref": _REF.format(name="CloudEvent")},
    }
    messages["cloudEventBinary"] = {
        "summary": "Any of these with CloudEvents attributes as headers (binary mode).",
        "headers": {
            "type": "object",
            "required": ["ce_specversion", "ce_id", "ce_source", "ce_type"],
            "properties": {
                "ce_specversion": {"const": "1.0"},
                "ce_id": {"type": "string"},
                "ce_source": {"type": "string"},
                "ce_type": {"enum": list(events.CLOUD_TYPES)},
                "ce_subject": {"type": "string"},
                "ce_time": {"type": "string"},
            },
        },
        "payload": {"oneOf": [{"$ref": _REF.format(name=kind.__name__)} for kind in _KINDS]},
    }
    return messages


def _schemas() -> dict[str, Any]:
    _, schemas = msgspec.json.schema_components([*_KINDS, events.Envelope], ref_template=_REF)
    _, control = msgspec.json.schema_components([ControlMessage], ref_template=_REF)
    schemas["Control"] = {**control[ControlMessage.__name__], "title": "Control"}
    schemas["Example"]["required"].remove("type")  # a record without a type is an example
    for named in ("Example", "Interaction", "Feedback", "Control"):
        schemas[named]["properties"]["adapter"]["pattern"] = f"^{ADAPTER.pattern}$"
    envelope = schemas["CloudEvent"] = schemas.pop(events.Envelope.__name__)
    envelope["properties"]["type"] = {"enum": list(events.CLOUD_TYPES)}
    envelope["properties"]["data"] = {"oneOf": [{"$ref": _REF.format(name=kind.__name__)} for kind in _KINDS]}
    return schemas


def _dead_letter_headers() -> dict[str, Any]:
    texts = {
        "dlt.reason": "a stable word",
        "dlt.message": "what is wrong, for people",
        "dlt.topic": "where the record came from",
        "dlt.incarnation": "that topic's id",
        "dlt.partition": "and the partition",
        "dlt.offset": "and the offset",
        "dlt.at": "when it was refused, RFC 3339",
        "dlt.whole": "`no` where the value did not fit and only its start is kept",
    }
    properties = {name: {"type": "string", "description": text} for name, text in texts.items()}
    return {"type": "object", "properties": properties}


def _summary(kind: type[msgspec.Struct]) -> str:
    return (kind.__doc__ or "").strip().splitlines()[0]


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page())
