"""Answers held to a JSON Schema are documents of it, whatever a random model would rather say."""

import json

import pytest

from riverdelta.serving.engine import InvalidRequest, grammar

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
                json_schema=json.dumps(SCHEMA),
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


def test_a_schema_of_any_size_costs_little(engines):
    with pytest.raises(InvalidRequest, match="bytes"):
        Asker(engines()).submit([5], json_schema=json.dumps({"enum": ["x" * grammar.MAX_SCHEMA]}))


def test_an_answer_whose_schema_becomes_too_hard_ends_alone(engines, monkeypatch):
    monkeypatch.setitem(grammar._LIMITS, "step_lexer_fuel", 20)
    asker = Asker(engines())
    hard = asker.submit([5], json_schema=json.dumps({"type": "string", "pattern": "(a|b)*a(a|b){30}c"}), max_tokens=80)
    other = asker.submit([5])
    _, end = collect(hard)
    assert (end.finish_reason, end.error_code) == ("error", "schema_too_hard")
    assert collect(other)[1].finish_reason == "length"
