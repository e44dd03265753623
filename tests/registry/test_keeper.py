"""The keeper on a real MLflow: projection and repair, aliases that people move, forgets brought to their end."""

import contextlib
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from riverdelta.core import payload
from riverdelta.core.errors import NotFound
from riverdelta.core.recipe import Recipe
from riverdelta.core.settings import Settings
from riverdelta.registry import contents, operations
from riverdelta.registry.gc import collect
from riverdelta.registry.keeper import Keeper, run
from riverdelta.registry.ledger import Cause, Hand, Outcome, Stage
from riverdelta.registry.operations import Operations, forget_json
from riverdelta.registry.purge import manifest_key
from tests.registry.stack import Stack, two_versions, wait


@pytest.fixture
def alone(tmp_path: Path) -> Settings:
    """Settings whose broker is away: nothing here needs one."""
    return Settings(data=tmp_path / "data")


def client(settings: Settings) -> Any:
    """MLflow's own client on the same store."""
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=settings.mlflow_uri, registry_uri=settings.mlflow_uri)


def live(settings: Settings) -> str:
    """The riverdelta version that MLflow's alias `live` names."""
    return str(client(settings).get_model_version_by_alias("acme", "live").tags["riverdelta.version"])


def keeper_of(stack: Stack) -> Keeper:
    """A keeper that does not wait before it takes an unnamed object for left over."""
    return Keeper(stack.ledger, stack.settings, stack.store, orphan_seconds=0.0)


def test_mlflow_shows_the_ledger_and_is_repaired(alone: Settings, tmp_path: Path) -> None:
    stack = two_versions(alone)
    projection = keeper_of(stack).projection
    assert projection.catch_up() == ["acme"]
    assert projection.catch_up() == []
    mlflow = client(alone)
    assert live(alone) == "2"
    shown = {v.tags["riverdelta.version"]: v for v in mlflow.search_model_versions("name='acme'")}
    assert set(shown) == {"1", "2"}
    digests = {str(v.number): v.digest for v in stack.ledger.versions("acme").values()}
    assert {number: v.tags["riverdelta.digest"] for number, v in shown.items()} == digests
    curve = mlflow.get_metric_history(shown["2"].run_id, "loss")
    assert [point.value for point in curve] == [2.0, 1.0]

    mlflow.delete_model_version("acme", shown["1"].version)
    mlflow.delete_registered_model_alias("acme", "live")
    mlflow.set_model_version_tag("acme", shown["2"].version, "riverdelta.digest", "0" * 64)
    mlflow.set_registered_model_tag("acme", "team", "support")
    projection.repair()
    again = {v.tags["riverdelta.digest"] for v in mlflow.search_model_versions("name='acme'")}
    assert set(digests.values()) <= again
    assert mlflow.get_model_version_by_alias("acme", "live").tags["riverdelta.digest"] == digests["2"]
    assert live(alone) == "2"
    assert mlflow.get_registered_model("acme").tags["team"] == "support"


def test_what_retention_drops_goes_from_mlflow_too(alone: Settings) -> None:
    stack = Stack(alone)
    stack.ledger.create("acme", Recipe.from_dict({"retain": {"every": 3, "targets": 1}}), "test")
    for number in range(4):
        stack.seal("acme", [("bob", f"bob {number}")])
    stack.train("acme")
    projection = keeper_of(stack).projection
    projection.catch_up()
    mlflow = client(alone)
    runs = {v.tags["riverdelta.version"]: v.run_id for v in mlflow.search_model_versions("name='acme'")}
    assert sorted(runs) == ["1", "2", "3", "4"]
    collect(stack.ledger, stack.store, stack.keys, 0.0)
    projection.catch_up()
    kept = {v.tags.get("riverdelta.version") for v in mlflow.search_model_versions("name='acme'")}
    assert kept == {"1", "4"}
    assert live(alone) == "4"
    for number, run_id in runs.items():
        there = [path for path in alone.data.rglob("*") if run_id in str(path) and path.is_file()]
        assert bool(there) is (number in kept), "its artifacts"
    with contextlib.closing(sqlite3.connect(alone.data / "mlflow.db")) as database:
        left = {row[0] for row in database.execute("SELECT run_uuid FROM runs")}
    assert left & set(runs.values()) == {runs["1"], runs["4"]}, "past the soft deletion"
    projection.repair()
    again = {v.tags.get("riverdelta.version") for v in mlflow.search_model_versions("name='acme'")}
    assert again == kept


def test_mlflow_shows_what_the_gate_decided(alone: Settings) -> None:
    stack = two_versions(alone)
    stack.seal("acme", [("cy", "nonsense")])
    measured = {"prequential": 7.5, "rejected": 1}
    stack.ledger.set_aside("acme", 3, 0, 2, Cause.GATE, "It is worse.", "trainer", measured)
    projection = keeper_of(stack).projection
    projection.catch_up()

    def curve(name: str) -> list[tuple[int, float]]:
        mlflow = client(alone)
        experiment = mlflow.get_experiment_by_name("riverdelta/acme").experiment_id
        [run] = mlflow.search_runs([experiment], "tags.`riverdelta.gate` = 'acme'")
        return [(point.step, point.value) for point in mlflow.get_metric_history(run.info.run_id, name)]

    assert curve("rejected") == [(1, 0), (2, 0), (3, 1)]
    assert curve("prequential") == [(1, 2.5), (2, 2.5), (3, 7.5)]
    stack.seal("acme", [("cy", "sense")])
    stack.train("acme")
    projection.catch_up()
    assert curve("rejected") == [(1, 0), (2, 0), (3, 1), (4, 0)]
    stack.ledger.decide_by_hand("acme", 3, Hand.ACCEPT, "op")
    projection.catch_up()
    assert curve("rejected") == [(1, 0), (2, 0)]
    projection.repair()
    stack.train("acme")
    projection.catch_up()
    assert curve("rejected") == [(1, 0), (2, 0), (3, 0), (4, 0)]


def test_an_artifact_loads_in_peft(alone: Settings, tiny_base: Path) -> None:
    from mlflow.artifacts import download_artifacts
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    stack = two_versions(alone)
    keeper_of(stack).projection.catch_up()
    held = client(alone).get_model_version_by_alias("acme", "live")
    folder = Path(download_artifacts(artifact_uri=held.source, tracking_uri=alone.mlflow_uri))
    [digest] = {v.digest for v in stack.ledger.versions("acme").values() if v.number == 2}
    assert (folder / "adapter_model.safetensors").read_bytes() == stack.store.get(f"weights/{digest}.safetensors")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base), folder)
    assert any("lora_A" in name for name, _ in model.named_parameters())


def test_an_alias_moved_by_hand_is_an_operators_act(alone: Settings) -> None:
    stack = two_versions(alone)
    projection = keeper_of(stack).projection
    projection.catch_up()
    mlflow = client(alone)
    shown = {v.tags["riverdelta.version"]: v.version for v in mlflow.search_model_versions("name='acme'")}
    mlflow.set_registered_model_alias("acme", "live", shown["1"])
    assert projection.adopt() == ["acme"]
    assert stack.ledger.adapter("acme").release == 1
    assert stack.ledger.facts("acme")[-1].actor == "mlflow"

    Operations(stack.ledger, alone, "op").forget("ann", ["acme"])
    projection.catch_up()
    if "2" in shown:
        mlflow.set_registered_model_alias("acme", "live", shown["2"])  # revoked now
        projection.adopt()
    assert live(alone) == "1"
    assert stack.ledger.adapter("acme").release == 1


def test_a_damaged_version_keeps_no_other_adapter_waiting(alone: Settings) -> None:
    stack = two_versions(alone)
    stack.ledger.create("other", Recipe(), "test")
    stack.store.put(f"weights/{stack.ledger.version('acme', 1).digest}.safetensors", b"not weights")
    keeper_of(stack).projection.catch_up()
    assert {model.name for model in client(alone).search_registered_models()} == {"acme", "other"}
    assert stack.ledger.projected("acme")[0] == 0
    assert stack.ledger.projected("other")[0] == 1


def test_repair_is_the_keepers_where_one_is_at_work(alone: Settings) -> None:
    stack = two_versions(alone)
    stop = threading.Event()
    keeping = threading.Thread(target=run, args=(alone, stop))
    keeping.start()
    try:
        assert wait(lambda: stack.ledger.projected("acme")[0] == stack.ledger.adapter("acme").head, 60)
        mlflow = client(alone)
        [version] = [v for v in mlflow.search_model_versions("name='acme'") if v.tags["riverdelta.version"] == "1"]
        mlflow.delete_model_version("acme", version.version)
        assert operations.repair(stack.ledger, alone) == 1
        shown = [v.tags["riverdelta.version"] for v in mlflow.search_model_versions("name='acme'")]
        assert sorted(shown) == ["1", "2"]  # once, by one of the two
    finally:
        stop.set()
        keeping.join(timeout=20)


def scan(settings: Settings, *words: bytes) -> list[str]:
    """Where any of the words still stands, in any file of the data folder or of the folder of secrets."""
    files = [path for folder in (settings.data, settings.keys_dir) for path in folder.rglob("*") if path.is_file()]
    return [f"{word[:20]!r} in {path}" for path in files for word in words if word in path.read_bytes()]


def traces(stack: Stack, segment: int, version: int) -> dict[str, bytes]:
    """What betrays a segment's first content and a version's weights, in the form in which they are stored."""
    held, made = stack.ledger.segment("acme", segment), stack.ledger.version("acme", version)
    database = sqlite3.connect(stack.settings.keys_dir / "keys.db")
    [[wrapped]] = database.execute("SELECT wrapped FROM keys WHERE name = ?", [held.keyring])
    database.close()
    return {
        "ciphertext": payload._read(stack.store.get(held.payload), held.payload_sha).boxes[0].sealed,
        "wrapped keys": wrapped,
        "weights": stack.store.get(f"weights/{made.digest}.safetensors")[-200:],
    }


def said(stack: Stack) -> bytes:
    """What all live entries say."""
    held = [contents.read(stack.ledger, stack.store, stack.keys, each) for each in stack.ledger.segments("acme")]
    return b"".join(content for segment in held for content in segment if content is not None)


def test_a_forget_is_rebuilt_and_purged(alone: Settings) -> None:
    stack = two_versions(alone)
    keeper = keeper_of(stack)
    keeper.projection.catch_up()
    assert b"canary-ann-secret" in said(stack)
    doomed = stack.ledger.version("acme", 2).digest
    dirty = traces(stack, 2, 2)
    assert all(scan(alone, trace) for trace in dirty.values())
    sealed, before = stack.ledger.segment("acme", 2), stack.ledger.manifest("acme", 2)
    report = Operations(stack.ledger, alone, "op").forget("ann", ["acme"], reason="ann asked")
    assert forget_json(report.forget)["revoked"] == {"acme": [2]}
    assert stack.ledger.segment("acme", 2) == replace(sealed, outcome=Outcome.AWAITING, version=None)
    with pytest.raises(NotFound):  # it is all still stored, and from here on nobody can read it
        contents.read_openings(stack.store, stack.keys, sealed, before)
    [left] = keeper.advance_forgets()
    assert left.stage is Stage.ACKNOWLEDGED  # nothing has been rebuilt
    stack.train("acme")
    assert wait(lambda: not keeper.advance_forgets(), 20)
    keeper.projection.catch_up()
    assert live(alone) == "3"
    assert scan(alone, *dirty.values(), b"canary-ann", b"ann asked") == []
    assert not stack.store.exists(f"weights/{doomed}.safetensors")
    manifest = json.loads(stack.store.get(manifest_key(report.forget.id)))
    assert [(e["index"], e["segment"]) for e in manifest["erased"]] == [(2, 2)]
    assert manifest["adapters"][0]["clean_parent"]["version"] == 1
    assert stack.ledger.version("acme", 2).purged
    # What was not the subject's is still learned, and still there.
    assert said(stack).count(b"canary-bob") == 3


def test_purge_waits_for_dataflow_and_trainers(alone: Settings) -> None:
    stack = two_versions(alone)
    keeper = keeper_of(stack)
    stack.ledger.take_lease("trainer-1", "trainer", 30.0)
    report = Operations(stack.ledger, alone, "op").forget("ann", ["acme"])
    stack.train("acme")
    assert [forget.stage for forget in keeper.advance_forgets()] == [Stage.ACKNOWLEDGED]
    stack.ledger.renew_lease("trainer-1", report.forget.fence)
    assert wait(lambda: not keeper.advance_forgets(), 20)


def test_the_control_topic_forgets_once(settings: Settings) -> None:
    from kafka import KafkaProducer

    from riverdelta.streams.topics import ensure

    ensure(settings)
    stack = two_versions(settings)
    stop = threading.Event()
    keeping = threading.Thread(target=run, args=(settings, stop))
    keeping.start()
    try:
        producer = KafkaProducer(**settings.kafka.for_kafka_python())
        asked = {"id": "req-7", "action": "forget", "subject": "ann", "adapter": "acme"}
        for value in (b"not json", json.dumps({**asked, "adapter": "nobody", "id": "x"}).encode()):
            producer.send(settings.topics.control, value)
        for _ in range(2):
            producer.send(settings.topics.control, json.dumps(asked).encode())
        producer.flush()
        assert wait(lambda: len(stack.ledger.forgets()) == 2, 30)
        producer.send(settings.topics.control, json.dumps({**asked, "id": "req-8", "action": "allow"}).encode())
        producer.flush()
        assert wait(lambda: not stack.ledger.suppressed("acme"), 30)
        assert [forget.id for forget in stack.ledger.forgets()] == ["x", "req-7"]
        assert stack.ledger.adapter("acme").epoch == 1
        producer.close()
    finally:
        stop.set()
        keeping.join(timeout=20)
    assert not keeping.is_alive()


@pytest.mark.soak
def test_a_keeper_killed_anywhere_ends_in_the_same_state(alone: Settings) -> None:
    """SIGKILL at random moments of purge and projection; each keeper that follows goes on."""
    rounds = 4 if os.environ.get("RIVERDELTA_SOAK") == "short" else 25
    dice = random.Random(11)
    stack = two_versions(alone)
    Operations(stack.ledger, alone, "op").forget("ann", ["acme"], request="req")
    stack.train("acme")
    environment = {
        **os.environ,
        "RIVERDELTA_DATA": str(alone.data),
        "KAFKA_BOOTSTRAP_SERVERS": "",
    }
    command = [sys.executable, "-m", "riverdelta.app.main", "registry", "run"]
    for _ in range(rounds):
        with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as keeper:
            time.sleep(dice.uniform(1.0, 8.0))
            keeper.send_signal(signal.SIGKILL)
    keeper = keeper_of(stack)
    assert wait(lambda: not keeper.advance_forgets(), 60)
    keeper.projection.catch_up()
    assert live(alone) == "3"
    assert b"canary-ann" not in said(stack)
