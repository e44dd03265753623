"""Answers held to a JSON Schema are documents of it, whatever a random model would rather say."""

import json

import pytest

from riverdelta.serving.engine import InvalidRequest

from . import models
from .conftest import Asker, collect

pytest.importorskip("llguidance")

SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["Ada", "Łukasz"]}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_the_answer_is_a_document_of_the_schema(engines, temperature):
    asker = Asker(engines())
    for seed in range(3):
        events, end = collect(
            asker.submit(
                models.prompt(seed, 5),
                json_schema=json.dumps(SCHEMA | {"x-guidance": {"whitespace_flexible": False}}),
                temperature=temperature,
                seed=seed,
                max_tokens=80,
            )
        )
        document = json.loads("".join(e.text for e in events))
        assert end.finish_reason == "stop"
        assert document["name"] in ("Ada", "Łukasz")
        assert 0 <= document["age"] <= 99


@pytest.mark.parametrize("schema", ["no json", "[]", '{"type": "nothing"}', '{"$ref": "http://example.com/x"}'])
def test_a_schema_that_cannot_be_followed_is_refused(engines, schema):
    with pytest.raises(InvalidRequest, match="JSON Schema"):
        Asker(engines()).submit([5], json_schema=schema)
