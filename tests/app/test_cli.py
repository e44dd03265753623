"""The command's manners: fast help, one line and an exit code for each mistake, no tracebacks."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from riverdelta.app.ask import Client, Question
from riverdelta.core.errors import Refused
from riverdelta.core.settings import UP_FILE, Settings


def tell(*arguments: str, cwd: Path, stdin: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("RIVERDELTA_", "KAFKA_"))}
    return subprocess.run(
        [sys.executable, "-m", "riverdelta.app.main", *arguments],
        cwd=cwd,
        env={**clean, **environment},
        input=stdin,
        capture_output=True,
        text=True,
        check=False,
    )


def test_help_imports_nothing_heavy(tmp_path: Path) -> None:
    code = (
        "import sys; sys.argv = ['riverdelta', '--help']\n"
        "from riverdelta.app.main import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'mlflow', 'kafka', 'bytewax', 'sqlalchemy', 'httpx', 'pydantic'}\n"
        "print('heavy:', sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "heavy: []"
    for command in ("up", "publish", "ask", "trace", "dlt", "counterfactual", "demo", "registry"):
        assert f"\n  {command} " in done.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("publish", "absent.jsonl", "--kafka", "127.0.0.1:1"), 3, "absent.jsonl cannot be read"),
        (("publish", "-"), 2, "No Kafka cluster is known"),
        (("dlt", "list"), 2, "No Kafka cluster is known"),
        (("trace", "7"), 3, "holds no ledger"),
        (("counterfactual", "acme", "--kafka", "127.0.0.1:1"), 3, "holds no ledger"),
        (("ask", "acme", "hi", "--url", "http://127.0.0.1:1"), 8, "No server answers at http://127.0.0.1:1"),
        (("up", "--config", "absent.toml"), 2, "There is no settings file"),
        (("up", "--data", "taken", "--base", "."), 2, "taken is no folder"),
        (("dlt", "replay", "--reason", "nosuch", "--kafka", "127.0.0.1:1"), 2, "Give one of empty, malformed"),
        (("registry", "create", "new", "--recipe", "."), 2, ". cannot be read: Is a directory"),
        (("registry", "list", "--data", "x" * 300), 1, "cannot be used: File name too long"),
        (("train", "--base", "./absent"), 3, "There is no folder"),
        (("serve", "--host", "0.0.0.0"), 2, "needs API keys"),
    ],
)
def test_a_mistake_is_one_line(tmp_path: Path, arguments: tuple[str, ...], code: int, said: str) -> None:
    (tmp_path / "taken").touch()
    done = tell(*arguments, cwd=tmp_path, RIVERDELTA_LOG_LEVEL="error")
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert done.stdout == ""


def test_a_bad_file_sends_nothing_and_names_its_bad_lines(tmp_path: Path) -> None:
    bad = ["junk", '{"text": " "}', '{"type": "no", "text": "a"}', "[]"]
    (tmp_path / "bad.jsonl").write_text("\n".join(['{"text": "a"}', "", *bad]))
    done = tell("publish", "bad.jsonl", "--adapter", "acme", "--kafka", "127.0.0.1:1", cwd=tmp_path)
    assert done.returncode == 2
    assert "Nothing was sent. Lines that are no events: 4 of 5. Line 3 (malformed)" in done.stderr
    assert all(each in done.stderr for each in ("Line 4 (invalid)", "Line 5 (type)", "And 1 more."))
    assert len(done.stderr.strip().splitlines()) == 1


def test_version(tmp_path: Path) -> None:
    said = tell("--version", cwd=tmp_path)
    assert (said.returncode, said.stdout) == (0, tell("version", cwd=tmp_path).stdout)


def test_a_revoked_version_is_refused() -> None:
    """HTTP's 410 has the exit code of what is refused, in the server's words."""
    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor() as pool:
        asked = pool.submit(Client(f"http://127.0.0.1:{server.getsockname()[1]}").ask, Question("acme@1", "hi"))
        client, _ = server.accept()
        with client:
            client.recv(65536)
            body = b'{"error": {"message": "acme@1 is revoked."}}'
            client.sendall(b"HTTP/1.1 410 Gone\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
            with pytest.raises(Refused, match="acme@1 is revoked"):
                asked.result()


def test_a_wrong_setting_is_named(tmp_path: Path) -> None:
    (tmp_path / "riverdelta.toml").write_text("[serving]\nprot = 1\n")
    done = tell("up", cwd=tmp_path)
    assert done.returncode == 2
    assert "serving.prot" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture
def interruptible() -> Iterator[None]:
    """What a shell runs in the background ignores SIGINT, and so would the children of its tests."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_interrupted_quietly(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        process = subprocess.Popen(
            [sys.executable, "-m", "riverdelta.app.main", "ask", "base", "hi", "--url", url],
            cwd=tmp_path,
            stderr=subprocess.PIPE,
            text=True,
        )
        asked, _ = silent.accept()
        with asked:
            asked.recv(1)
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (130, "")


def test_clients_find_what_up_has_told_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KAFKA_BOOTSTRAP_SERVERS", raising=False)
    monkeypatch.delenv("RIVERDELTA_KAFKA__BOOTSTRAP", raising=False)
    (tmp_path / UP_FILE).write_text(json.dumps({"bootstrap": "127.0.0.1:7", "embedded": "false"}))
    assert Settings.read(data=tmp_path).kafka.bootstrap == "127.0.0.1:7"
    monkeypatch.setenv("KAFKA_BOOTSTRAP_SERVERS", "cluster:9092")
    assert Settings.read(data=tmp_path).kafka.bootstrap == "cluster:9092"
    assert Settings.read(data=tmp_path, kafka={"bootstrap": "given:1"}).kafka.bootstrap == "given:1"
    monkeypatch.delenv("KAFKA_BOOTSTRAP_SERVERS")
    (tmp_path / UP_FILE).write_text("not JSON")
    assert Settings.read(data=tmp_path).kafka.bootstrap == ""
