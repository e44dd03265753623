"""Requests made from the OpenAPI document, right and wrong ones: none is answered with 500."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

schemathesis = pytest.importorskip("schemathesis")

pytestmark = pytest.mark.soak


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
