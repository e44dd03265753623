"""API keys over HTTP: a tenant sees its own adapters, and cannot tell others' from absent ones."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from riverdelta.serving import generation

from .conftest import Running, small_settings, stock
from .test_swap import text

KEYS = {
    "acme": "the key of acme.",
    "both": "the key of both.",
    "nobase": "key without base",
    "ops": "the key of ops..",
    "boss": "the key of boss.",
}
FILE = "\n".join(
    f'[[key]]\nname = "{name}"\nkey = "{key}"\n{more}\n'
    for (name, key), more in zip(
        KEYS.items(),
        (
            'adapters = ["acme", "not-yet"]',
            'adapters = ["acme", "beta"]',
            'adapters = ["beta"]\nbase = false',
            'adapters = "*"\nrole = "admin"',
            'adapters = ["acme"]\nrole = "admin"',
        ),
        strict=True,
    )
)


@pytest.fixture(scope="module")
def guarded(tmp_path_factory, tiny_base):
    folder = tmp_path_factory.mktemp("guarded")
    (folder / "keys.toml").write_text(FILE)
    settings = small_settings(folder, tiny_base, api_keys=str(folder / "keys.toml"))
    stock(settings)
    running = Running(settings)
    yield running
    running.stop()


@pytest.fixture(scope="module")
def by_key(guarded):
    clients = {
        name: httpx.Client(
            base_url=guarded.url, headers={"authorization": f"Bearer {key}"}, trust_env=False, timeout=60
        )
        for name, key in KEYS.items()
    }
    yield clients
    for client in clients.values():
        client.close()


def ask(client, model, prompt="hello"):
    return client.post("/v1/completions", json={"model": model, "prompt": prompt, "max_tokens": 4, "temperature": 0})


def test_without_a_key_nothing_is_told(guarded):
    for path in ("/v1/models", "/v1/adapters", "/metrics", "/openapi.json", "/nothing"):
        refused = guarded.client.get(path)
        assert refused.status_code == 401
        assert refused.headers["www-authenticate"] == "Bearer"
        assert refused.json()["error"]["code"] == "invalid_api_key"
    assert guarded.client.post("/admin/forget", json={}).status_code == 401
    assert guarded.client.post("/v1/completions", content=b"x" * 100).status_code == 401
    for path in ("/livez", "/readyz"):
        assert guarded.client.get(path).status_code == 200


def test_each_key_lists_its_own(by_key):
    seen = {name: {model["id"] for model in client.get("/v1/models").json()["data"]} for name, client in by_key.items()}
    assert seen == {
        "acme": {"base", "acme"},
        "both": {"base", "acme", "beta"},
        "nobase": {"beta"},
        "ops": {"base", "acme", "beta", "empty"},
        "boss": {"base", "acme"},
    }
    adapters = {
        name: {item["id"] for item in client.get("/v1/adapters").json()["data"]} for name, client in by_key.items()
    }
    assert adapters == {name: models - {"base"} for name, models in seen.items()}


def test_others_adapters_look_absent(by_key):
    for model in ("beta", "beta@1", "empty", "not-yet", "none"):
        hidden, absent = ask(by_key["acme"], model), ask(by_key["ops"], "none")
        assert hidden.status_code == absent.status_code == 404
        assert hidden.json()["error"] == {
            **absent.json()["error"],
            "message": absent.json()["error"]["message"].replace("none", model),
        }
        assert by_key["acme"].get(f"/v1/models/{model}").json() == hidden.json()
    assert ask(by_key["nobase"], "base").status_code == 404
    assert ask(by_key["acme"], "acme@1").status_code == 200


def test_answers_do_not_depend_on_the_key(by_key):
    answers = [ask(by_key[name], "acme").json() for name in ("acme", "both", "acme", "both")]
    assert len({text(answer) for answer in answers}) == 1


def test_prefixes_are_not_shared_between_keys(by_key, guarded):
    prompt = "a prompt that is longer than a few blocks of the cache, so that its beginning is kept"
    body = {"model": "acme", "prompt": prompt, "max_tokens": 1}
    cached = [
        by_key[name].post("/v1/completions", json=body).json()["usage"]["prompt_tokens_details"]["cached_tokens"]
        for name in ("acme", "acme", "both")
    ]
    assert cached[0] == cached[2] == 0 < cached[1]


def test_one_callers_long_texts_do_not_stand_before_anothers(by_key, guarded, monkeypatch):
    began, hold, order = threading.Event(), threading.Event(), []

    def tokens(tokenizer, prompt):
        order.append(prompt)
        if prompt == "long":
            began.set()
            assert hold.wait(30)
        return [1, 2]

    monkeypatch.setattr(generation, "prompt_ids", tokens)
    with ThreadPoolExecutor(5) as pool:
        asked = [pool.submit(ask, by_key["acme"], "acme", "long") for _ in range(4)]
        assert began.wait(30)
        asked.append(pool.submit(ask, by_key["both"], "acme", "short"))
        while not any(lock.locked() for name, lock in guarded.server.generator._turns.items() if name == "both"):
            time.sleep(0.01)
        hold.set()
        assert all(each.result().status_code == 200 for each in asked)
    assert order.index("short") == 1


def test_only_admins_act_and_measure(by_key):
    for name, client in by_key.items():
        allowed = name in ("ops", "boss")
        assert (client.get("/metrics").status_code == 200) == (name == "ops")
        assert client.get("/admin/forgets/none").status_code == (404 if allowed else 403)
        assert client.post("/admin/rollback", json={"adapter": "none"}).status_code == (404 if allowed else 403)


def test_an_admin_of_some_adapters_cannot_tell_others_from_absent_ones(by_key):
    boss, ops = by_key["boss"], by_key["ops"]

    def told(path, **body):
        answer = boss.post(f"/admin/{path}", json=body)
        return answer.status_code, answer.json()["error"]["message"].replace("beta", "none")

    for path, more in (("rollback", {}), ("resume", {}), ("forget", {"subject": "x"}), ("allow", {"subject": "x"})):
        assert told(path, adapter="beta", **more) == told(path, adapter="none", **more)
        assert told(path, adapter="beta", **more)[0] == 404
        if more:
            assert told(path, all_adapters=True, **more)[0] == 403
    assert (
        ops.post("/admin/forget", json={"subject": "nobody", "adapter": "beta", "request_id": "b"}).status_code == 200
    )
    assert boss.get("/admin/forgets/b").json() == boss.get("/admin/forgets/none").json()
    for _ in range(2):  # the id is another's too, and neither meets the other's
        own = boss.post("/admin/forget", json={"subject": "nobody at all", "adapter": "acme", "request_id": "b"})
        assert (own.status_code, own.json()["request_id"], set(own.json()["adapters"])) == (200, "b", {"acme"})
    assert boss.get("/admin/forgets/b").json()["at"] == own.json()["at"]
    assert boss.post("/admin/forget", json={"subject": "z", "adapter": "acme", "request_id": "b"}).status_code == 409
    both = {"subject": "nobody", "all_adapters": True, "request_id": "all"}
    assert set(ops.post("/admin/forget", json=both).json()["adapters"]) >= {"acme", "beta"}
    seen = boss.get("/admin/forgets/all").json()
    assert set(seen["adapters"]) == {"acme"}
    assert set(seen["revoked"]) <= {"acme"}


def test_without_keys_admin_calls_are_for_this_machine_only(shared):
    """A web page that makes its own name mean 127.0.0.1 does not get through."""
    for host, status in (("evil.example", 403), ("localhost:1234", 404), ("127.0.0.1", 404)):
        assert shared.client.get("/admin/forgets/none", headers={"host": host}).status_code == status
    form = shared.client.post("/admin/allow", content=b'{"subject":"x","all_adapters":true}')
    assert form.status_code == 415
