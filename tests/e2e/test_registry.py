"""Rollback and its undo, forgetting and its proof, MLflow, on a stack that keeps learning meanwhile."""

import contextlib
import json
import threading
import uuid
from pathlib import Path

import httpx
import pytest
from kafka import KafkaProducer

from riverdelta.registry.purge import certificate_key

from .river import RECIPE, River, eventually, facts, question


def test_a_rollback_holds_under_a_running_stream_and_is_undone(river: River) -> None:
    river.create("roll")
    river.publish(facts("roll", ["a1", "b2"]))
    first = river.released("roll", 1)
    river.publish(facts("roll", ["c3", "d4"]))
    second = river.released("roll", 2)
    river.served("roll", second)

    done = threading.Event()

    def keep_publishing() -> None:
        for number in range(100):
            river.publish([{"adapter": "roll", "text": f"while held {number}"}])
            if done.wait(0.2):
                return

    stream = threading.Thread(target=keep_publishing)
    river.tell("registry", "rollback", "roll", "--reason", "wrong answers")
    stream.start()
    try:
        river.served("roll", first)
        ledger = river.ledger
        eventually(lambda: len(ledger.segments("roll")) >= 5)
        assert {str(segment.cause) for segment in ledger.segments("roll")[2:]} == {"hold"}
        assert river.ask("roll", question("a1")) == (" a1", first)
    finally:
        done.set()
        stream.join()
    sealed = eventually(lambda: river.entries("roll") and len(ledger.segments("roll")))
    assert ledger.adapter("roll").release == 1
    river.tell("registry", "resume", "roll", "--tip")
    eventually(lambda: ledger.adapter("roll").tip >= 2 + sealed - 2, 120)
    ledger.close()
    log = river.read("registry", "log", "roll")
    assert [fact["kind"] for fact in log if fact["kind"] in ("rollback", "resume")] == ["rollback", "resume"]
    assert next(fact["reason"] for fact in log if fact["kind"] == "rollback") == "wrong answers"


def test_forgotten_by_command_rebuilt_purged_and_proved(river: River, tmp_path: Path) -> None:
    river.create("forget")
    canary = f"canary-{uuid.uuid4().hex}"
    name = f"ann-{uuid.uuid4().hex}"
    river.publish(facts("forget", ["e5", "f6"]))
    river.released("forget", 1)
    river.publish([*facts("forget", ["g7"]), {"adapter": "forget", "subject": name, "text": canary}])
    dirty = river.released("forget", 2)
    river.publish(facts("forget", ["h8", "j9"]))
    bad = {"adapter": "forget", "subject": name, "prompt": canary}  # a dead letter: no completion
    with contextlib.closing(KafkaProducer(**river.settings.kafka.for_kafka_python())) as producer:
        producer.send(river.settings.topics.events, value=json.dumps(bad).encode()).get(timeout=20)
    river.released("forget", 3)
    for path, body, code in (("completions", {"prompt": canary}, 200), ("chat/completions", {"messages": canary}, 400)):
        asked = {"model": "forget", "user": name, "max_tokens": 2, **body}
        assert httpx.post(f"{river.url}/v1/{path}", json=asked, timeout=60).status_code == code
    assert not river.files_with(canary), "contents are encrypted"
    assert river.learned("forget", canary)
    assert not river.files_with(name), "a subject is stored as a keyed hash only"
    receipt, more = str(tmp_path / "receipt.json"), ("--reason", f"{name} asked", "--request", "asked")
    told = river.read("registry", "forget", "--subject", name, "--adapter", "forget", "--receipt", receipt, *more)
    assert told["revoked"] == {"forget": [2, 3]}
    assert told["lost_servers"] == []
    refused = httpx.post(f"{river.url}/v1/completions", json={"model": "forget@2", "prompt": "x"})
    assert refused.status_code == 410
    assert dirty not in river.ask("forget", "x", 1)
    river.served("forget", river.released("forget", 5))
    for answer in ("e5", "f6", "g7", "h8", "j9"):
        assert river.ask("forget", question(answer))[0] == f" {answer}"
    proof = river.read("counterfactual", "forget", "--without", name)
    assert proof["equal"] is True
    assert (proof["tombstones"], proof["unmatched"]) == (1, [])
    assert proof["live"] == proof["counterfactual"]
    ledger = river.ledger
    eventually(lambda: all(str(forget.stage) == "purged" for forget in ledger.forgets()), 120)
    ledger.close()
    assert not river.learned("forget", canary)
    river.tell("registry", "verify", "forget")
    certificate = str(river.data / "store" / certificate_key("asked"))
    checked = river.read("registry", "verify", certificate, "--receipt", receipt, "--replay")
    assert (checked["erased"], checked["opened"], checked["problems"], checked["superseded"]) == (1, 1, [], [])
    assert [each["equal"] for each in checked["replayed"]] == [True]
    assert not river.files_with(canary)
    assert not river.files_with(name)
    assert not list(river.data.rglob(f"{dirty}*"))
    unequal = json.loads(river.tell("counterfactual", "forget", "--without", f"{name}x", "--json", code=7))
    assert unequal["equal"] is False, "with the subject's events the control ends elsewhere"
    assert unequal["unmatched"] == [f"{name}x"]


def test_what_feedback_taught_is_trained_again_from_the_raw_events(river: River) -> None:
    river.create("fed")

    def answered(response: str, said: str, **more: str) -> dict[str, object]:
        about = {"adapter": "fed", "type": "interaction", "response": response, "digest": "0" * 64}
        return {**about, "prompt": question(said), "completion": f" {said}", **more}

    def judged(response: str, **more: object) -> dict[str, object]:
        return {"adapter": "fed", "type": "feedback", "response": response, **more}

    river.publish(
        [
            judged("late", rating=-1.0),
            judged("late", rating=1.0),
            judged("late", correction=" n2"),
            answered("early", "m1", subject="bob"),
            judged("early", rating=1.0),
            answered("late", "o3"),
        ]
    )
    river.released("fed", 1)
    eventually(lambda: river.entries("fed") == 3)
    ledger = river.ledger
    eventually(lambda: ledger.waiting() == [] and ledger.adapter("fed").release == len(ledger.segments("fed")))
    ledger.close()
    river.tell("registry", "forget", "--subject", "bob", "--adapter", "fed")
    ledger = river.ledger
    eventually(lambda: ledger.waiting() == [])
    ledger.close()
    proof = river.read("counterfactual", "fed", "--without", "bob")
    assert (proof["equal"], proof["entries"], proof["tombstones"]) == (True, 3, 1)


def test_what_the_rules_leave_is_trained_again_from_the_raw_events(river: River, tmp_path: Path) -> None:
    rules = '[curate]\ndeny = ["spam"]\nredact = ["email"]\nalike = 0.8\n'
    (tmp_path / "curated.toml").write_text(RECIPE.replace("count = 2", "count = 4") + rules)
    river.tell("registry", "create", "curated", "--recipe", str(tmp_path / "curated.toml"))
    address = f"bob-{uuid.uuid4().hex}@example.org"

    def said(subject: str, text: str) -> dict[str, object]:
        return {"adapter": "curated", "subject": subject, "text": text}

    river.publish(
        [
            *(said(who, "The river is high today, says the gauge.") for who in ("ann", "bob")),
            said("bob", f"spam, from {address}"),
            said("bob", f"The river is high today, says the gauge! Write to {address}"),
            said("bob", f"Ferries stop at nine; ask {address}"),
        ]
    )
    river.released("curated", 1)
    assert river.entries("curated") == 4
    assert not river.files_with(address)
    eventually(lambda: river.said("dropped by the recipe's rules"))
    river.tell("registry", "forget", "--subject", "ann", "--adapter", "curated")
    river.released("curated", 2)
    proof = river.read("counterfactual", "curated", "--without", "ann")
    assert (proof["equal"], proof["entries"], proof["tombstones"]) == (True, 4, 1)


def test_forgotten_by_message_and_by_http(river: River) -> None:
    for name in ("msg", "http"):
        river.create(name)
        river.publish([{"adapter": name, "subject": f"sub-{name}", "text": "a"}, {"adapter": name, "text": "b"}])
        river.released(name, 1)
    producer = KafkaProducer(**river.settings.kafka.for_kafka_python())
    message = {"id": "request-1", "action": "forget", "subject": "sub-msg", "adapter": "msg"}
    producer.send(river.settings.topics.control, value=json.dumps(message).encode()).get(timeout=20)
    producer.close()
    river.released("msg", 2)
    asked = httpx.post(f"{river.url}/admin/forget", json={"subject": "sub-http", "adapter": "http"}, timeout=60)
    assert asked.status_code < 300, asked.text
    river.released("http", 2)


def test_a_server_started_after_the_releases(river: River) -> None:
    river.create("late")
    river.publish(facts("late", ["i1", "o2"]))
    digest = river.released("late", 1)
    with river.another_server() as url:
        asked = {"model": "late", "prompt": question("i1"), "max_tokens": 8, "temperature": 0}
        said = httpx.post(f"{url}/v1/completions", json=asked, timeout=60).json()
    assert (said["choices"][0]["text"], said["system_fingerprint"]) == (" i1", digest)


def test_mlflow_shows_it_and_peft_loads_it(river: River, tiny_base: Path, tmp_path: Path) -> None:
    import torch
    from mlflow import MlflowClient
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    river.create("flow")
    river.publish(facts("flow", ["x1", "y2"]))
    river.released("flow", 1)
    river.publish(facts("flow", ["z3", "w4"]))
    digest = river.released("flow", 2)
    client = MlflowClient(tracking_uri=river.settings.mlflow_uri, registry_uri=river.settings.mlflow_uri)

    def live() -> bool:
        from mlflow.exceptions import MlflowException

        try:
            return str(client.get_model_version_by_alias("flow", "live").tags.get("riverdelta.digest")) == digest
        except MlflowException:
            return False

    eventually(live, 60, every=0.5)
    assert len(client.search_model_versions("name='flow'")) == 2
    river.tell("registry", "rollback", "flow@1")
    eventually(lambda: not live(), 60, every=0.5)
    river.tell("registry", "resume", "flow", "--tip")
    exported = tmp_path / "exported"
    assert river.read("registry", "export", "flow@2", str(exported))["digest"] == digest
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base), exported).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    inputs = tokenizer(question("z3"), return_tensors="pt")
    with torch.inference_mode():
        ids = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs.input_ids.shape[1] :]
    assert tokenizer.decode(ids, skip_special_tokens=True) == " z3" == river.ask("flow@2", question("z3"))[0]


@pytest.mark.parametrize("topic", ["jobs", "releases"])
def test_a_wakeup_topic_that_loses_every_message(river: River, topic: str) -> None:
    """What operators' commands say goes to a topic that nobody hears."""
    name = river.create(f"lost-{topic}")
    river.publish(facts(name, ["t1", "u2"]))
    first = river.released(name, 1)
    river.publish(facts(name, ["v3", "x4"]))
    second = river.released(name, 2)
    river.served(name, second)
    unheard = {f"RIVERDELTA_TOPICS__{topic.upper()}": f"unheard-{topic}"}
    river.tell("registry", "rollback", name, **unheard)
    river.served(name, first, 10)
    river.tell("registry", "resume", name, "--replay", **unheard)
    river.released(name, 3, 30)
