"""The OpenAI-compatible face, through the openai client and by hand."""

import concurrent.futures
import json
from typing import Literal

import openai
import pydantic
import pytest

from riverdelta.core import base

GREEDY = {"temperature": 0, "extra_body": {"ignore_eos": True}}


@pytest.fixture(scope="module")
def client(shared):
    return openai.OpenAI(base_url=f"{shared.url}/v1", api_key="unused", max_retries=0)


def test_models_are_listed(client, shared):
    listed = {model.id: model for model in client.models.list()}
    assert set(listed) == {"base", "acme", "beta", "empty"}
    assert client.models.retrieve("acme@1").id == "acme@1"
    with pytest.raises(openai.NotFoundError) as error:
        client.models.retrieve("absent")
    assert error.value.code == "model_not_found"


def test_the_fingerprint_is_the_digest_of_what_answered(client, shared, tiny_base):
    ledger = shared.server.ledger
    wanted = {
        "base": base.digest(tiny_base),
        "empty": base.digest(tiny_base),
        "acme": ledger.version("acme", 2).digest,
        "acme@1": ledger.version("acme", 1).digest,
        "acme@2": ledger.version("acme", 2).digest,
        "beta": ledger.version("beta", 1).digest,
    }
    texts = {}
    for model, digest in wanted.items():
        answer = client.completions.create(model=model, prompt="hello", max_tokens=16, **GREEDY)
        assert answer.system_fingerprint == digest
        texts[model] = answer.choices[0].text
    assert texts["acme"] == texts["acme@2"]
    assert texts["empty"] == texts["base"]
    assert len({texts[model] for model in ("base", "acme", "acme@1", "beta")}) == 4


def test_a_completion(client):
    answer = client.completions.create(model="acme", prompt="hello", max_tokens=5, **GREEDY)
    assert answer.object == "text_completion"
    assert answer.id.startswith("cmpl-")
    assert answer.model == "acme@2"
    assert answer.choices[0].finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (6, 5, 11)


def test_a_chat(client):
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]},
    ]
    answer = client.chat.completions.create(model="acme", messages=turns, max_completion_tokens=5, **GREEDY)
    assert answer.object == "chat.completion"
    assert answer.choices[0].message.role == "assistant"
    assert answer.usage.completion_tokens == 5
    # A whole answer may be sent back as it came.
    turns += [answer.choices[0].message.model_dump(), {"role": "user", "content": "more"}]
    client.chat.completions.create(model="acme", messages=turns, max_tokens=1)


@pytest.mark.parametrize("logprobs", [None, 2])
def test_a_stream_says_what_a_whole_answer_says(client, logprobs):
    asked = {"model": "acme", "prompt": "hello", "max_tokens": 12, "logprobs": logprobs, **GREEDY}
    whole = client.completions.create(**asked)
    chunks = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    parts = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert "".join(part.text for part in parts) == whole.choices[0].text
    assert [part.finish_reason for part in parts if part.finish_reason] == ["length"]
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert {chunk.system_fingerprint for chunk in chunks} == {whole.system_fingerprint}
    if logprobs:
        told = [part.logprobs for part in parts if part.logprobs]
        assert [token for part in told for token in part.tokens] == whole.choices[0].logprobs.tokens
        assert [offset for part in told for offset in part.text_offset] == whole.choices[0].logprobs.text_offset
        assert all(1 <= len(top) <= 2 for top in whole.choices[0].logprobs.top_logprobs)


def test_a_chat_stream(client):
    asked = {"model": "beta", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 9, **GREEDY}
    whole = client.chat.completions.create(**asked, logprobs=True, top_logprobs=1)
    chunks = list(client.chat.completions.create(**asked, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == "length"
    told = whole.choices[0].logprobs.content
    assert len(told) == 9
    assert told[0].top_logprobs[0].token == told[0].token, "the greedy token is the likeliest"


def test_several_answers_and_prompts(client):
    asked = {"model": "acme", "prompt": ["one", "two"], "n": 2, "max_tokens": 6, "temperature": 1.0, "seed": 7}
    answer = client.completions.create(**asked)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    texts = [choice.text for choice in answer.choices]
    assert texts[0] != texts[1]
    assert answer.usage.prompt_tokens == 8
    # The first of n draws as if it were alone.
    alone = client.completions.create(**{**asked, "prompt": "one", "n": 1})
    assert alone.choices[0].text == texts[0]
    streamed = dict.fromkeys(range(4), "")
    for chunk in client.completions.create(**asked, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert list(streamed.values()) == texts


def test_token_ids_are_prompts_too(client, shared):
    tokenizer = shared.server.engine.tokenizer
    ids = [tokenizer(text)["input_ids"] for text in ("hello", "again")]
    by_text = client.completions.create(model="acme", prompt=["hello", "again"], max_tokens=6, **GREEDY)
    by_ids = client.completions.create(model="acme", prompt=ids, max_tokens=6, **GREEDY)
    one = client.completions.create(model="acme", prompt=ids[0], max_tokens=6, **GREEDY)
    assert [choice.text for choice in by_text.choices] == [choice.text for choice in by_ids.choices]
    assert one.choices[0].text == by_text.choices[0].text


def test_sampling_fields_reach_the_engine(client):
    asked = {"model": "acme", "prompt": "hello", "max_tokens": 12, **GREEDY}
    whole = client.completions.create(**asked, logprobs=0).choices[0]
    stop = next(letter for letter in whole.text if letter.isascii())
    cut = client.completions.create(**asked, stop=[stop]).choices[0]
    assert cut.finish_reason == "stop"
    assert cut.text == whole.text[: whole.text.index(stop)]
    forced = client.completions.create(**asked, logit_bias={"100": 100}).choices[0]
    biased = client.completions.create(**{**asked, "prompt": "x", "logit_bias": {"100": 100}}).choices[0]
    assert forced.text == biased.text
    assert len(set(forced.text)) == 1
    first = client.completions.create(**{**asked, "temperature": 1.0, "seed": 3}).choices[0].text
    again = client.completions.create(**{**asked, "temperature": 1.0, "seed": 3}).choices[0].text
    other = client.completions.create(**{**asked, "temperature": 1.0, "seed": 4}).choices[0].text
    assert first == again != other


def test_two_tenants_in_one_batch_answer_as_alone(shared):
    """Many requests of several adapters at once: each has the tokens of its solo greedy answer."""
    asked = [(model, f"{model} {i}") for i in range(6) for model in ("acme", "beta", "acme@1", "base")]
    solo = {pair: shared.answer(*pair, max_tokens=24)["choices"][0]["text"] for pair in asked}
    steps = shared.server.engine.stats()["totals"]["steps"]
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        together = list(pool.map(lambda pair: shared.answer(*pair, max_tokens=24), asked))
    assert {pair: answer["choices"][0]["text"] for pair, answer in zip(asked, together, strict=True)} == solo
    assert shared.server.engine.stats()["totals"]["steps"] - steps < 24 * len(asked), "nothing ran side by side"


def test_request_ids(shared):
    given = shared.client.get("/v1/models", headers={"x-request-id": "my-id.7"})
    made = shared.client.get("/v1/models", headers={"x-request-id": "no spaces, please"})
    assert given.headers["x-request-id"] == "my-id.7"
    assert len(made.headers["x-request-id"]) == 24


def test_adapters_and_metrics_tell_what_is_where(shared):
    shared.answer("acme@1")
    listed = {item["id"]: item for item in shared.client.get("/v1/adapters").json()["data"]}
    assert listed["acme"]["release"] == 2
    assert [version["version"] for version in listed["acme"]["versions"]] == [1, 2]
    assert all(version["tier"] in ("device", "host") for version in listed["acme"]["versions"])
    assert listed["empty"]["versions"][0]["tier"] == "base"
    text = shared.client.get("/metrics").text
    for name in (
        'riverdelta_generation_tokens_total{adapter="acme",version="1"}',
        "riverdelta_num_requests_running",
        "riverdelta_num_requests_waiting",
        "riverdelta_kv_cache_usage_perc",
        "riverdelta_time_to_first_token_seconds_bucket",
        "riverdelta_inter_token_latency_seconds_bucket",
        "riverdelta_lease_valid 1.0",
    ):
        assert name in text


def test_the_openapi_document_describes_what_is_answered(shared):
    document = shared.client.get("/openapi.json").json()
    assert "/v1/chat/completions" in document["paths"]
    assert "422" not in json.dumps(document)


class Person(pydantic.BaseModel):
    name: Literal["Ada", "Łukasz"]
    age: int = pydantic.Field(ge=0, le=99)


def test_an_answer_of_a_schema(client):
    asked = {"model": "acme", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 100}
    answer = client.chat.completions.parse(**asked, response_format=Person, temperature=1.5, seed=1, n=2)
    for choice in answer.choices:
        assert choice.finish_reason == "stop"
        assert 0 <= choice.message.parsed.age <= 99
    schema = {"type": "json_schema", "json_schema": {"name": "yes", "schema": {"const": ["yes"]}}}
    chunks = client.chat.completions.create(**asked, response_format=schema, stream=True)
    assert json.loads("".join(chunk.choices[0].delta.content or "" for chunk in chunks)) == ["yes"]
    continued = client.completions.create(
        model="acme", prompt="hello", max_tokens=100, extra_body={"response_format": schema}
    )
    assert json.loads(continued.choices[0].text) == ["yes"]


def test_an_answer_that_is_a_json_object(client):
    answer = client.chat.completions.create(
        model="acme",
        messages=[{"role": "user", "content": "hello"}],
        max_tokens=40,
        response_format={"type": "json_object"},
        temperature=0,
    )
    assert answer.choices[0].message.content.startswith("{")
