"""Bad input: each wrong request gets its own clear error in OpenAI's shape, and harms nothing."""

import json
import socket

import pytest

from riverdelta.serving.envelope import MAX_BODY

COMPLETION = {"model": "acme", "prompt": "hello", "max_tokens": 2}
CHAT = {"model": "acme", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}
TURN = CHAT["messages"][0]

DEEP: dict = {}
for _ in range(900):
    DEEP = {"items": DEEP}
LARGE = {"enum": ["x" * 40_000]}

BAD_COMPLETIONS = [
    ({"model": None}, 400, "invalid_value", "model"),
    ({"model": 7}, 400, "invalid_value", "model"),
    ({"model": "absent"}, 404, "model_not_found", None),
    ({"model": "acme@9"}, 404, "model_not_found", None),
    ({"model": "acme@0"}, 404, "model_not_found", None),
    ({"model": "../../etc/passwd"}, 404, "model_not_found", None),
    ({"model": "\ud800"}, 400, "invalid_value", "model"),
    ({"model": ""}, 400, "invalid_value", "model"),
    ({"prompt": ""}, 200, None, None),
    ({"prompt": []}, 400, "invalid_value", "prompt"),
    ({"prompt": [[]]}, 400, "invalid_value", "prompt.0"),
    ({"prompt": ["a", 1]}, 400, "invalid_value", None),
    ({"prompt": [1, "a"]}, 400, "invalid_value", None),
    ({"prompt": [1.5]}, 400, "invalid_value", None),
    ({"prompt": None}, 400, "invalid_value", None),
    ({"prompt": {"a": 1}}, 400, "invalid_value", None),
    ({"prompt": [10**9]}, 400, "invalid_request", None),
    ({"prompt": [-1]}, 400, "invalid_value", None),
    ({"prompt": "a \ud800 b"}, 400, "invalid_request", None),
    ({"prompt": ["x"] * 129}, 400, "invalid_value", None),
    ({"prompt": ["x"] * 65, "n": 2}, 400, "invalid_value", None),
    ({"prompt": "x" * 300}, 400, "context_length_exceeded", None),
    ({"prompt": "ab " * 10**6}, 400, "context_length_exceeded", None),
    ({"prompt": ["x"] + ["x" * 300] * 100}, 400, "context_length_exceeded", None),
    ({"max_tokens": 0}, 400, "invalid_value", "max_tokens"),
    ({"max_tokens": -5}, 400, "invalid_value", "max_tokens"),
    ({"max_tokens": 10**12}, 400, "context_length_exceeded", None),
    ({"max_tokens": "2"}, 400, "invalid_value", "max_tokens"),
    ({"max_tokens": True}, 400, "invalid_value", "max_tokens"),
    ({"temperature": -1}, 400, "invalid_value", "temperature"),
    ({"temperature": "hot"}, 400, "invalid_value", "temperature"),
    ({"top_p": 0}, 400, "invalid_value", "top_p"),
    ({"top_p": 1.1}, 400, "invalid_value", "top_p"),
    ({"top_k": -2}, 400, "invalid_value", "top_k"),
    ({"n": 0}, 400, "invalid_value", "n"),
    ({"n": 10**6}, 400, "invalid_value", "n"),
    ({"seed": 2**80}, 400, "invalid_value", "seed"),
    ({"stop": ["x"] * 17}, 400, "invalid_value", "stop"),
    ({"stop": [1]}, 400, "invalid_value", None),
    ({"stop": "x" * 5000}, 400, "invalid_request", None),
    ({"logit_bias": {"x": 1}}, 400, "invalid_value", "logit_bias"),
    ({"logit_bias": {"5": 101}}, 400, "invalid_value", "logit_bias.5"),
    ({"logit_bias": {"99999": 1}}, 400, "invalid_request", None),
    ({"logprobs": 21}, 400, "invalid_value", "logprobs"),
    ({"presence_penalty": 3}, 400, "invalid_value", "presence_penalty"),
    ({"stream": "yes"}, 400, "invalid_value", "stream"),
    ({"stream_options": {"include_usage": "x"}}, 400, "invalid_value", "stream_options.include_usage"),
    ({"echo": True}, 400, "unsupported_parameter", None),
    ({"suffix": "end"}, 400, "unsupported_parameter", None),
    ({"best_of": 5}, 400, "unsupported_parameter", None),
    ({"no_such_field": 1}, 400, "unknown_parameter", "no_such_field"),
    ({"\ud800": 1}, 400, None, None),
    (
        {"echo": False, "suffix": None, "best_of": 1, "user": "u", "metadata": {"a": "b"}, "store": False},
        200,
        None,
        None,
    ),
]
BAD_CHATS = [
    ({"messages": []}, 400, "invalid_value", "messages"),
    ({"messages": "hello"}, 400, "invalid_value", "messages"),
    ({"messages": [{"role": "tool", "content": "x"}]}, 400, "invalid_value", "messages.0.role"),
    ({"messages": [{"role": "user"}, {"content": "x"}]}, 400, "invalid_value", "messages.1.role"),
    ({"messages": [{**TURN, "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]}, 400, None, None),
    ({"messages": [{**TURN, "tool_calls": [{"id": "1"}]}]}, 400, "invalid_value", "messages.0.tool_calls"),
    ({"messages": [{**TURN, "content": "x" * 300}]}, 400, "context_length_exceeded", None),
    ({"messages": [TURN, {**TURN, "content": "ab " * 10**6}]}, 400, "context_length_exceeded", None),
    ({"messages": [{**TURN, "content": "x" * 300}], "max_tokens": None}, 400, "context_length_exceeded", None),
    ({"tools": [{"type": "function"}]}, 400, "unsupported_parameter", None),
    ({"tools": [], "tool_choice": "none", "response_format": {"type": "text"}}, 200, None, None),
    ({"response_format": {"type": "xml"}}, 400, "invalid_value", "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, 400, "invalid_value", "response_format"),
    ({"response_format": {"type": "json_object", "json_schema": {"schema": {}}}}, 400, "invalid_value", None),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": []}}}, 400, "invalid_value", None),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "x"}}}}, 400, None, None),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": DEEP}}}, 400, None, None),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": LARGE}}}, 400, "invalid_request", None),
    ({"top_logprobs": 2}, 400, "invalid_value", None),
    ({"logprobs": 2}, 400, "invalid_value", "logprobs"),
    ({"max_completion_tokens": 3, "reasoning_effort": "low", "parallel_tool_calls": True}, 200, None, None),
]


def check(response, status, code, param):
    assert response.status_code == status, response.text
    if status == 200:
        return
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert error["type"] == "invalid_request_error"
    if code is not None:
        assert error["code"] == code
    if param is not None:
        assert error["param"] == param


@pytest.mark.parametrize(("change", "status", "code", "param"), BAD_COMPLETIONS)
def test_completions(shared, change, status, code, param):
    body = json.dumps({**COMPLETION, **change})
    check(shared.client.post("/v1/completions", content=body, headers=JSON), status, code, param)


@pytest.mark.parametrize(("change", "status", "code", "param"), BAD_CHATS)
def test_chats(shared, change, status, code, param):
    body = json.dumps({**CHAT, **change})
    check(shared.client.post("/v1/chat/completions", content=body, headers=JSON), status, code, param)


JSON = {"content-type": "application/json"}


@pytest.mark.parametrize(
    ("content", "headers", "status", "code"),
    [
        (b"", JSON, 400, "missing_body"),
        (b"{", JSON, 400, "invalid_json"),
        (b"null", JSON, 400, None),
        (b"[]", JSON, 400, None),
        (b'"x"', JSON, 400, None),
        (b"\xff\xfe", JSON, 400, None),
        (b"[" * 200_000, JSON, 400, None),
        (b'{"model": "acme", "prompt": NaN}', JSON, 400, None),
        (b"{}", {"content-type": "text/plain"}, 415, "unsupported_media_type"),
        (b"{}", {}, 415, "unsupported_media_type"),
        (b" " * (MAX_BODY + 1), JSON, 413, "request_too_large"),
    ],
)
def test_bodies(shared, content, headers, status, code):
    check(shared.client.post("/v1/completions", content=content, headers=headers), status, code, None)


def test_a_body_without_an_end(shared):
    """Chunked, so that no length warns of it."""

    def endless():
        for _ in range(2 + MAX_BODY // 65536):
            yield b" " * 65536

    response = shared.client.post("/v1/completions", content=endless(), headers=JSON)
    check(response, 413, "request_too_large", None)


def test_paths_and_methods(shared):
    check(shared.client.get("/v1/nothing"), 404, "not_found", None)
    check(shared.client.get("/v1/completions"), 405, "method_not_allowed", None)
    check(shared.client.delete("/v1/models"), 405, "method_not_allowed", None)


def test_not_http(shared):
    with socket.create_connection(("127.0.0.1", int(shared.url.rsplit(":", 1)[1])), timeout=10) as raw:
        raw.sendall(b"\x16\x03\x01\x00garbage\r\n\r\n")
        assert raw.recv(100).startswith(b"HTTP/1.1 400")


def test_afterwards_all_is_well(shared):
    """What came before left nothing running behind."""
    stats = shared.server.engine.stats()
    assert (stats["running"], stats["waiting"]) == (0, 0)
    assert shared.answer("acme")["choices"][0]["text"]
