"""Requests made from the OpenAPI document, right and wrong ones: none is answered with 500."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

schemathesis = pytest.importorskip("schemathesis")

pytestmark = pytest.mark.soak


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
TYPES = st.sampled_from(["object", "array", "string", "integer", "number", "boolean", "null", "any"])
PATTERNS = st.sampled_from(["^a+$", "(a|b){2,3}", "[", "(?=x)y", "(a*)*b", r"\d{4}-\d{2}", "\\", ".*"])


def schemas(inner):
    """JSON Schemas of most keywords, many of which contradict each other, some with values of the wrong type."""
    held = inner | ANYTHING
    return st.fixed_dictionaries(
        {},
        optional={
            "type": TYPES | st.lists(TYPES, max_size=3) | ANYTHING,
            "properties": st.dictionaries(st.text(max_size=4), held, max_size=3),
            "required": st.lists(st.text(max_size=4), max_size=3),
            "additionalProperties": st.booleans() | inner,
            "items": held,
            "prefixItems": st.lists(inner, max_size=2),
            "anyOf": st.lists(inner, max_size=3),
            "oneOf": st.lists(inner, max_size=2),
            "allOf": st.lists(inner, max_size=2),
            "not": inner,
            "enum": st.lists(ANYTHING, max_size=3),
            "const": ANYTHING,
            "pattern": PATTERNS | st.text(max_size=6),
            "format": st.sampled_from(["date-time", "uuid", "email", "nonsense"]),
            "minLength": st.integers(-1, 10**9),
            "maxLength": st.integers(-1, 10**9),
            "minimum": st.integers() | st.floats(),
            "maximum": st.integers() | st.floats(),
            "multipleOf": st.integers(-3, 10),
            "minItems": st.integers(-1, 10**9),
            "maxItems": st.integers(-1, 10**9),
            "uniqueItems": st.booleans(),
            "$ref": st.sampled_from(["#", "#/$defs/a", "#/nowhere", "http://127.0.0.1:1/s.json", "file:///etc/passwd"]),
            "$defs": st.dictionaries(st.sampled_from("ab"), inner, max_size=2),
        },
    )


def test_no_answer_format_breaks_the_server(shared):
    """Whatever schema an answer is to be held to, and at a bounded cost."""
    schema = st.recursive(st.just({}) | ANYTHING, schemas, max_leaves=8)
    wrapped = st.builds(lambda held: {"type": "json_schema", "json_schema": {"name": "a", "schema": held}}, schema)
    statuses = set()

    @settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
    @given(wanted=wrapped | st.builds(dict, type=st.just("json_object")) | ANYTHING, chat=st.booleans())
    def holds(wanted, chat):
        asked = {"messages": [{"role": "user", "content": "a"}]} if chat else {"prompt": "a"}
        body = json.dumps({"model": "acme", "max_tokens": 4, "response_format": wanted, **asked})
        path = "/v1/chat/completions" if chat else "/v1/completions"
        response = shared.client.post(path, content=body, headers={"content-type": "application/json"}, timeout=30)
        statuses.add(response.status_code)
        assert response.status_code < 500, (body, response.text)

    holds()
    assert {200, 400} <= statuses
    assert shared.answer("acme")["choices"][0]["text"]


def test_no_request_breaks_the_server(shared):
    document = schemathesis.openapi.from_url(f"{shared.url}/openapi.json")
    checked, statuses = [], set()
    for found in document.get_all_operations():
        operation = found.ok()
        modes = [operation.as_strategy(generation_mode=mode) for mode in schemathesis.GenerationMode]

        @settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
        @given(case=st.one_of(modes))
        def holds(case):
            if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
                short = {"max_tokens": 4} if case.body.get("max_tokens") is None else {}  # not whole contexts
                case.body = {**case.body, "model": "acme", **short}
            response = case.call(timeout=60)
            statuses.add(response.status_code)
            assert response.status_code < 500, (case.as_curl_command(), response.text)

        holds()
        checked.append(operation.label)
    assert "POST /v1/completions" in checked
    assert "POST /v1/chat/completions" in checked
    assert {200, 400, 404} <= statuses
    assert shared.answer("acme")["choices"][0]["text"]
