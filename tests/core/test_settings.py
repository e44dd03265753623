"""Settings: where they come from, which wins, and what is said of what does not fit."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from riverdelta.core.errors import BadInput
from riverdelta.core.settings import Kafka, Settings


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("KAFKA_BOOTSTRAP_SERVERS", raising=False)


def test_arguments_win_over_the_environment_over_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("riverdelta.toml").write_text('base = "file"\n[serving]\nport = 1\nmax_batch = 7\n')
    assert Settings.read().serving.port == 1
    monkeypatch.setenv("RIVERDELTA_SERVING__PORT", "2")
    monkeypatch.setenv("RIVERDELTA_BASE", "environment")
    settings = Settings.read(base="argument")
    assert (settings.base, settings.serving.port, settings.serving.max_batch) == ("argument", 2, 7)
    (tmp_path / "other.toml").write_text('base = "other"\n')
    monkeypatch.setenv("RIVERDELTA_CONFIG", str(tmp_path / "other.toml"))
    monkeypatch.delenv("RIVERDELTA_BASE")
    assert Settings.read().base == "other"


@pytest.mark.parametrize(
    "text", ["bsae = 1\n", "[serving]\nport = 99999\n", "[kafka]\nsecurity = 'NONE'\n", "not toml"]
)
def test_what_does_not_fit_is_named(text: str) -> None:
    Path("riverdelta.toml").write_text(text)
    with pytest.raises(BadInput):
        Settings.read()


def test_a_missing_settings_file_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RIVERDELTA_CONFIG", "/nowhere.toml")
    with pytest.raises(BadInput, match="nowhere"):
        Settings.read()


def test_secrets_stay_outside_the_data_folder(tmp_path: Path) -> None:
    assert not Settings.read(data=tmp_path / "data").keys_dir.is_relative_to(tmp_path / "data")
    with pytest.raises(BadInput, match="inside"):
        _ = Settings.read(data=tmp_path / "data", keys=tmp_path / "data" / "keys").keys_dir


def test_one_kafka_block_becomes_both_clients_options() -> None:
    kafka = Kafka(
        bootstrap="a:1,b:2",
        security="SASL_SSL",
        sasl_mechanism="SCRAM-SHA-512",
        username="u",
        password="p",
        ca_file="/ca",
        check_hostname=False,
    )
    python, confluent = kafka.for_kafka_python(), kafka.for_confluent()
    assert python["bootstrap_servers"] == ["a:1", "b:2"]
    assert (python["security_protocol"], python["ssl_check_hostname"]) == ("SASL_SSL", False)
    assert confluent["bootstrap.servers"] == "a:1,b:2"
    assert confluent["ssl.endpoint.identification.algorithm"] == "none"
    assert (python["sasl_plain_password"], confluent["sasl.password"]) == ("p", "p")
    assert "'p'" not in repr(kafka)


def test_the_broker_of_an_up_that_is_gone_is_nobodys(tmp_path: Path) -> None:
    """Another stack may listen at its address by now, and would take what is published."""
    with subprocess.Popen(["true"]) as gone:
        pass
    for embedded, process, known in (
        ("true", os.getpid(), "127.0.0.1:9092"),
        ("true", gone.pid, ""),
        ("false", gone.pid, "127.0.0.1:9092"),
    ):
        told = {"bootstrap": "127.0.0.1:9092", "embedded": embedded, "process": str(process)}
        (tmp_path / "up.json").write_text(json.dumps(told))
        assert Settings.read(data=tmp_path).kafka.bootstrap == known
