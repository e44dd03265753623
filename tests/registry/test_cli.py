"""The registry commands, run as a user runs them: tables, JSON, exit codes, and how soon help appears."""

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest

from riverdelta.app.counterfactual import plan, unmatched
from riverdelta.app.main import main
from riverdelta.app.raw_log import Lesson
from riverdelta.core import weights
from riverdelta.core.errors import Gone, Refused
from riverdelta.core.keys import SubjectKey
from riverdelta.core.recipe import Recipe
from riverdelta.core.settings import Settings
from riverdelta.core.store import ObjectStore, weights_key
from riverdelta.registry import contents
from riverdelta.registry.keystore import KeyStore
from riverdelta.registry.ledger import Cause, Increment, Ledger, Manifest, ManifestEntry, Seal, Stage
from riverdelta.registry.peft_io import write_peft_folder
from riverdelta.registry.purge import manifest_key

NAMES = ("ann", "bob")


def subject_hash(data: Path, name: str) -> str:
    """A subject's keyed hash."""
    return SubjectKey.open(Settings(data=data).keys_dir).subject(name)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data folder in which `acme` has two versions, of a segment each, with real payloads and weights."""
    import torch

    folder = tmp_path / "data"
    ledger = Ledger.open(f"sqlite:///{folder}/ledger.db")
    store = ObjectStore(f"file://{folder}/store")
    keys = KeyStore.open(Settings(data=folder))
    ledger.create("acme", Recipe(), "test")
    for number in range(2):
        said = [b'{"type":"example","text":"fact %d"}' % (2 * number + i) for i in range(2)]
        entries = tuple(
            ManifestEntry(0, 0, 2 * number + i, subjects=(subject_hash(folder, NAMES[i]),)) for i in range(2)
        )
        place = {("run", 0): (2 * number, 2 * number + 2)}
        made = contents.encrypt(f"keys-{number}", Manifest(("run",), entries), said)
        keys.add({f"keys-{number}": made.keys})
        store.put(f"segments/acme/{number}.seg", made.data)
        seal = Seal(
            "acme",
            0,
            2 * number,
            made.manifest,
            "count",
            f"segments/acme/{number}.seg",
            made.digest,
            place,
            f"keys-{number}",
            made.root,
        )
        assert not isinstance(ledger.seal([seal], "test")[0], Exception)
        prefix = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
        tensors = {f"{prefix}A.weight": torch.full((2, 8), 1.0 + number), f"{prefix}B.weight": torch.ones(8, 2)}
        data, digest = weights.encode(
            {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}, tensors
        )
        store.put(weights_key(digest), data)
        ledger.commit(Increment("acme", number + 1, 0, number, digest, "", (), {}, {"losses": [2.0, 1.0]}), "trainer")
    ledger.close()
    return folder


class Done(NamedTuple):
    """What a command printed and ended with."""

    returncode: int
    stdout: str
    stderr: str


def run(data: Path, *arguments: str) -> Done:
    """`riverdelta registry …` on a data folder, with a broker that is away, through the command's own entry point."""
    out, err = io.StringIO(), io.StringIO()
    given = {"RIVERDELTA_DATA": str(data), "RIVERDELTA_KAFKA__BOOTSTRAP": "127.0.0.1:1"}
    with (
        mock.patch.dict(os.environ, given),
        mock.patch.object(sys, "argv", ["riverdelta", "registry", *arguments]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main()
            code = 0
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 1
    return Done(code, out.getvalue(), err.getvalue())


def as_json(data: Path, *arguments: str) -> object:
    """What a command prints for scripts."""
    done = run(data, *arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_rollback_holds_and_resume_ends_it(data: Path) -> None:
    head = as_json(data, "rollback", "acme", "--reason", "it answers nonsense", "--actor", "ann")
    assert (head["release"], head["held"]) == (1, 1)
    assert "(held)" in run(data, "list").stdout
    assert run(data, "release", "acme@2").returncode == 4
    assert as_json(data, "resume", "acme", "--tip")["release"] == 2
    log = run(data, "log", "acme").stdout
    assert "ann" in log
    assert "it answers nonsense" in " ".join(log.split())


def test_segments_are_accepted_and_discarded_by_hand(data: Path) -> None:
    ledger = Ledger.open(f"sqlite:///{data}/ledger.db")
    alarm = Recipe().gate.alarm
    for number in range(alarm):
        manifest = Manifest(("run",), (ManifestEntry(0, 0, 4 + number),))
        place = {("run", 0): (4 + number, 5 + number)}
        ledger.seal(
            [Seal("acme", 0, 4 + number, manifest, "count", f"segments/acme/{number + 2}.seg", "0" * 64, place)], "test"
        )
        measured = {"prequential": 2.5, "learned": 0.5}
        ledger.set_aside("acme", number + 3, 0, 2, Cause.GATE, "It is worse.", "trainer", measured)
    ledger.close()
    for command in ("list", "show"):
        told = " ".join(run(data, command, *["acme"][: command == "show"]).stdout.split())
        assert f"LEARNS NOTHING: its gate has rejected {alarm} segments in a row" in told
    assert as_json(data, "list")["adapters"][0]["rejected_in_a_row"] == alarm
    shown = " ".join(run(data, "show", "acme").stdout.split())
    assert "gate: It is worse. Loss on it 2.500 to 0.500." in shown

    head = as_json(data, "discard", "acme", "3", "--reason", "noise", "--actor", "ann")
    assert (head["rejected_in_a_row"], head["tip"]) == (alarm - 1, 2)
    assert run(data, "discard", "acme", "3").returncode == 4
    head = as_json(data, "accept", "acme", "4")
    assert [s["outcome"] for s in head["segments"][2:]] == ["set_aside"] + ["awaiting"] * (alarm - 1)
    assert "LEARNS NOTHING" not in run(data, "show", "acme").stdout
    log = " ".join(run(data, "log", "acme").stdout.split())
    assert "segment 3: discard by hand" in log
    assert "noise" in log
    assert run(data, "accept", "acme", "99").returncode == 3

    head = as_json(data, "discard", "acme", "2")  # learned already: taken out, and what came since is learned again
    assert (head["release"], head["tip"]) == (1, 1)


def test_forget_reports_what_it_revoked(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = subject_hash(data, "nobody")
    done = as_json(data, "forget", "--subject", "nobody", "--adapter", "acme", "--request", "r1")
    assert done["stage"] == "acknowledged"
    assert done["revoked"] == {}
    again = as_json(data, "forget", "--subject", "nobody", "--adapter", "acme", "--request", "r1")
    assert (again["at"], again["adapters"]) == (done["at"], done["adapters"])
    assert [forget["request_id"] for forget in as_json(data, "list")["forgets"]] == ["r1"]
    facts = as_json(data, "log", "acme")
    assert [fact["body"]["subject"] for fact in facts if fact["kind"] == "forget"] == [subject]
    # What was sent before is to stay forgotten, and a broker that is away does not say what was.
    assert run(data, "allow", "--subject", "nobody", "--adapter", "acme").returncode == 8
    monkeypatch.setattr("riverdelta.registry.operations.log_ends", lambda _: {})
    assert as_json(data, "allow", "--subject", "nobody", "--adapter", "acme") == {"allowed": ["acme"]}
    assert run(data, "allow", "--subject", "nobody", "--adapter", "acme").returncode == 3


def test_with_other_keys_nothing_is_forgotten_by_mistake(data: Path) -> None:
    """With another subject key nobody would be found; and where a key is missing, none is made in its place."""
    asked = ("forget", "--subject", "ann", "--adapter", "acme", "--serve-until-rebuilt")
    assert run(data, *asked, "1e12").returncode == 2
    keys = Settings(data=data).keys_dir
    run(data, "allow", "--subject", "nobody", "--adapter", "acme")
    keys.rename(data.with_name("away"))
    refused = run(data, *asked, "0")
    assert (refused.returncode, "There is no subjects.key" in refused.stderr, keys.exists()) == (7, True, False)
    keys.mkdir()
    (keys / "subjects.key").write_bytes(bytes(32))
    refused = run(data, *asked, "0")
    assert (refused.returncode, "The subject key in" in refused.stderr) == (7, True)
    assert as_json(data, "list")["forgets"] == []
    (keys / "subjects.key").write_bytes((data.with_name("away") / "subjects.key").read_bytes())
    assert run(data, "gc").returncode == 0  # the root key is remembered when it is first used ...
    (keys / "contents.key").unlink()
    refused = run(data, "gc")
    assert (refused.returncode, "There is no contents.key" in refused.stderr) == (7, True)  # ... and then asked for
    (keys / "contents.key").write_bytes(bytes(32))
    refused = run(data, "gc")
    assert (refused.returncode, "The root key in" in refused.stderr) == (7, True)


def test_the_progress_of_a_forget_is_in_list_and_log(data: Path) -> None:
    """Stage by stage, and within the rebuild segment by segment."""

    def listed() -> list[tuple[str, int, int]]:
        return [(held["stage"], held["rebuild"], held["left"]) for held in as_json(data, "list")["forgets"]]

    assert as_json(data, "forget", "--subject", "ann", "--adapter", "acme", "--request", "r1")["revoked"] == {
        "acme": [1, 2]
    }
    assert listed() == [("acknowledged", 2, 2)]
    ledger = Ledger.open(f"sqlite:///{data}/ledger.db")
    for number in (1, 2):
        work = ledger.work("acme")
        assert work is not None
        tip, epoch = work.adapter.tip, work.adapter.epoch
        ledger.commit(Increment("acme", number, epoch, tip, f"{number}" * 64, "", (), {}, {}), "trainer")
        assert listed() == [("acknowledged", 2, 2 - number)]
        assert f"acknowledged, in acme, {number} of 2 segments rebuilt" in run(data, "list").stdout
    ledger.advance("r1", Stage.REBUILT, {}, "keeper")
    assert listed() == [("rebuilt", 2, 0)]
    ledger.advance("r1", Stage.PURGED, {"manifest": manifest_key("r1")}, "keeper")
    ledger.close()
    assert listed() == []
    facts = as_json(data, "log", "acme")
    stages = [fact["body"]["stage"] for fact in facts if fact["kind"] == "forget_stage"]
    assert stages == ["acknowledged", "rebuilt", "purged"]
    log = " ".join(run(data, "log", "acme").stdout.split())
    assert all(f"forget {stage} (r1)" in log for stage in stages)


def test_diff(data: Path) -> None:
    """The second version's A is twice the first's: B·A of ones and twos, scaled by alpha over rank."""
    found = as_json(data, "diff", "acme@1", "acme@2")
    assert (found["common"], found["learned"]) == ([1], [[], [2]])
    assert found["sizes"] == pytest.approx([32.0, 64.0])
    assert found["distance"] == pytest.approx(32.0)
    assert found["recipes"][0] == found["recipes"][1]
    assert found["metrics"]["last loss"] == [1.0, 1.0]
    assert as_json(data, "diff", "acme@2", "acme@2")["distance"] == 0
    assert "Only acme@2 learned: 2." in run(data, "diff", "acme@1", "acme@2").stdout
    assert run(data, "diff", "acme@1", "other@1").returncode == 2
    as_json(data, "forget", "--subject", "ann", "--adapter", "acme")
    assert "is revoked" in run(data, "diff", "acme@1", "acme@2").stderr


def test_a_branch_that_a_rollback_left_loses_nothing(data: Path) -> None:
    assert run(data, "rollback", "acme@1").returncode == 0
    assert run(data, "resume", "acme").returncode == 0
    assert as_json(data, "gc", "--grace", "0")["deleted"] == []
    assert as_json(data, "diff", "acme@1", "acme@2")["learned"] == [[], [2]]
    assert run(data, "release", "acme@2").returncode == 0
    assert as_json(data, "show", "acme")["release"] == 2


def test_a_forget_that_serves_until_rebuilt_says_so(data: Path) -> None:
    asked = ("forget", "--subject", "ann", "--adapter", "acme", "--request", "r1", "--serve-until-rebuilt", "600")
    assert "Servers go on with acme@2" in run(data, *asked).stdout
    assert "@2 (until rebuilt)" in run(data, "list").stdout
    assert "@2 until rebuilt" in run(data, "log", "acme").stdout
    assert as_json(data, *asked)["stage"] == "lending"


def test_a_server_that_is_lost_is_told_of_with_a_loan_too(data: Path) -> None:
    """All but the loan is waited for: version 1 is nobody's release, and may be in a server's hands."""
    with contextlib.closing(Ledger.open(f"sqlite:///{data}/ledger.db")) as ledger:
        ledger.take_lease("server-gone", "server", 0.5)
    said = run(data, "forget", "--subject", "ann", "--adapter", "acme", "--serve-until-rebuilt", "600").stdout
    assert "Servers go on with acme@2" in said
    assert "The server server-gone did not answer" in said


def test_reasons_are_printed_as_they_are_but_for_the_subject(data: Path) -> None:
    reason = "[/bold] :smile: [red]not markup[/red] for ANN"
    assert run(data, "forget", "--subject", "ann", "--adapter", "acme", "--reason", reason).returncode == 0
    shown = " ".join(run(data, "log", "acme").stdout.split())
    assert "[/bold] :smile: [red]not markup[/red] for [subject]" in shown
    assert "0 of 2 segments rebuilt" in run(data, "list").stdout


def test_verify_says_what_cannot_be_replayed(data: Path) -> None:
    def replay(settings: Settings, name: str, without: list[str]) -> dict[str, object]:
        if name == "acme":
            raise Gone("Kafka no longer holds it.", "Retention has removed it.")
        raise AssertionError

    with mock.patch("riverdelta.app.main._replay", replay):
        done = run(data, "verify", "acme", "--replay", "--json")
        assert done.returncode == Gone.exit_code == 9
        [found] = json.loads(done.stdout)
        assert found["problems"] == []
        assert found["replay"] == {
            "adapter": "acme",
            "equal": None,
            "why": "Kafka no longer holds it. Retention has removed it.",
        }
        assert "acme cannot be replayed. Kafka no longer" in " ".join(run(data, "verify", "--replay").stdout.split())


def test_one_adapter_that_cannot_be_replayed_keeps_no_other_from_it(data: Path) -> None:
    """Nor the plain checks from being told, whatever is in its way."""
    ledger = Ledger.open(f"sqlite:///{data}/ledger.db")
    ledger.import_adapter("brought", Recipe(), ledger.version("acme", 1).digest, {}, "test")
    ledger.close()
    equal = {**REPLAYED, "equal": True, "unmatched": []}

    def replay(settings: Settings, name: str, without: list[str]) -> dict[str, object]:
        if name == "acme":
            return equal
        with contextlib.closing(Ledger.open(settings.ledger_url)) as opened:
            plan(opened, name)
        raise AssertionError

    with mock.patch("riverdelta.app.main._replay", replay):
        done = run(data, "verify", "--replay", "--json")
        assert done.returncode == Refused.exit_code
        found = {each["adapter"]: each["replay"] for each in json.loads(done.stdout)}
        assert found["acme"] == equal
        assert found["brought"]["equal"] is None
        assert "was imported" in found["brought"]["why"]
        told = run(data, "verify", "--replay").stdout
    assert "brought: " in told
    assert "Equal, bit for bit." in told
    assert "brought cannot be replayed. brought@1 was imported" in " ".join(told.split())


REPLAYED = {
    "adapter": "acme",
    "live": "a",
    "counterfactual": "b",
    "version": 2,
    "without": ["ann"],
    "entries": 4,
    "tombstones": 0,
    "same_environment": True,
}


def test_a_replay_that_differs_is_corrupt(data: Path) -> None:
    found = {**REPLAYED, "equal": False, "unmatched": []}
    with mock.patch("riverdelta.app.main._replay", return_value=found):
        done = run(data, "verify", "acme", "--replay", "--without", "ann")
    assert (done.returncode, "spelling" in done.stderr) == (7, False)


@pytest.mark.parametrize("equal", [True, False])
def test_a_name_that_no_event_has_is_told(data: Path, equal: bool) -> None:
    found = {**REPLAYED, "equal": equal, "unmatched": ["anne"]}
    with mock.patch("riverdelta.app.main._replay", return_value=found):
        done = run(data, "verify", "acme", "--replay", "--without", "anne")
        assert "is about anne: check the spelling" in " ".join(done.stderr.split())
        told = json.loads(run(data, "verify", "acme", "--replay", "--without", "anne", "--json").stdout)
    assert told[0]["replay"]["unmatched"] == ["anne"]


def test_names_are_matched_as_events_write_them() -> None:
    key, lessons = SubjectKey(bytes(32)), [Lesson(b"", ("Ann", "bob")), Lesson(b"", ())]
    assert unmatched(key, lessons, ["Ann", "bop", "bob", "ane"]) == ("bop", "ane")


def test_a_receipt_is_no_certificate(data: Path) -> None:
    receipt = data.with_name("ann.receipt")
    hint = "No entry names this subject: check the spelling, if it should have any."
    asked = ("forget", "--adapter", "acme", "--subject")
    said = run(data, *asked, "ann", "--receipt", str(receipt)).stdout
    assert hint not in said
    assert "The receipt holds what 2 entries said." in said
    done = run(data, "verify", str(receipt))
    assert (done.returncode, f"--receipt {receipt}" in done.stderr) == (2, True)
    empty = run(data, *asked, "ane", "--receipt", str(data.with_name("ane.receipt"))).stdout
    assert hint in empty
    assert "The receipt holds what 0 entries said." in empty
    assert as_json(data, *asked, "ane", "--receipt", str(data.with_name("again.receipt")))["receipt"] == 0


def test_verify_names_what_was_damaged(data: Path) -> None:
    assert run(data, "verify").returncode == 0
    held = data / "store" / "segments" / "acme" / "1.seg"
    held.write_bytes(held.read_bytes()[:-1] + b"!")
    done = run(data, "verify", "acme")
    assert done.returncode == 7
    assert "Segment 2" in done.stdout


def test_export_can_be_imported_where_it_fits(data: Path, tmp_path: Path, tiny_base: Path) -> None:
    import torch
    from safetensors.torch import load_file

    done = as_json(data, "export", "acme@1", str(tmp_path / "out"))
    held = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert torch.equal(next(iter(held.values())), torch.full((2, 8), 1.0))
    assert done["digest"] == as_json(data, "show", "acme")["versions"][0]["digest"]
    refused = run(data, "import", "new", str(tmp_path / "out"), "--base", str(tiny_base))
    assert refused.returncode == 6  # the base's q_proj has other features
    assert "features" in refused.stderr
    assert run(data, "show", "new").returncode == 3


def test_an_import_is_told_as_every_act_is(data: Path, tmp_path: Path, tiny_base: Path) -> None:
    """What stands in the journal has no control characters, and fits the ledger's columns."""
    import torch

    site = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    tensors = {f"{site}A.weight": torch.ones(2, 64), f"{site}B.weight": torch.ones(64, 2)}
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    write_peft_folder(tmp_path / "out", *weights.encode(config, tensors))
    who, why = "op\n" + "x" * 200, "moved\x1b[2Jhere"
    done = run(data, "import", "new", str(tmp_path / "out"), "--base", str(tiny_base), "--actor", who, "--reason", why)
    assert done.returncode == 0, done.stderr
    [fact] = [each for each in as_json(data, "log", "new") if each["kind"] == "imported"]
    assert (fact["actor"], fact["reason"]) == ("op " + "x" * 125, "moved [2Jhere")


def test_an_export_comes_back_as_it_was_unless_it_was_revoked(data: Path, tmp_path: Path) -> None:
    """Weights that saw what was forgotten must not come back under another name."""
    from riverdelta.registry.peft_io import import_folder

    out = tmp_path / "out"
    digest = as_json(data, "export", "acme@2", str(out))["digest"]
    ledger, store = Ledger.open(Settings(data=data).ledger_url), ObjectStore(Settings(data=data).store_url)
    linears = {"model.layers.0.self_attn.q_proj": (8, 8)}
    assert import_folder(ledger, store, "again", out, linears, "op").digest == digest
    assert as_json(data, "show", "again")["versions"][0]["segment"] is None
    ledger.close()


def test_revoked_weights_cannot_be_imported(data: Path, tmp_path: Path) -> None:
    from riverdelta.registry.peft_io import import_folder

    out = tmp_path / "out"
    as_json(data, "export", "acme@2", str(out))
    settings = Settings(data=data)
    ledger, store = Ledger.open(settings.ledger_url), ObjectStore(settings.store_url)
    ledger.forget("r1", subject_hash(data, "ann"), ["acme"], "op")
    with pytest.raises(Refused, match="forgotten"):
        import_folder(ledger, store, "again", out, {"model.layers.0.self_attn.q_proj": (8, 8)}, "op")
    assert [head.name for head in ledger.adapters()] == ["acme"]
    ledger.close()


def test_a_mistyped_folder_is_not_made_a_ledger(tmp_path: Path) -> None:
    done = run(tmp_path / "nowhere", "list")
    assert done.returncode == 3
    assert "--data" in done.stderr
    assert not (tmp_path / "nowhere").exists()


def test_repair_shows_the_ledger_in_mlflow(data: Path) -> None:
    assert "1 adapter " in run(data, "repair").stdout


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["show", "nobody"], 3),
        (["create", "Not A Name"], 2),
        (["create", "acme"], 4),
        (["create", "new", "--recipe", "/nowhere.toml"], 3),
        (["release", "acme"], 2),
        (["release", "acme@9"], 3),
        (["resume", "acme"], 4),
        (["resume", "acme", "--tip", "--replay"], 2),
        (["forget", "--subject", "ann"], 2),
        (["rollback", "acme@9"], 3),
        (["export", "nobody", "/tmp/never"], 3),
        (["export", "acme", "/proc/x"], 2),
        (["export", "acme", "/etc/passwd"], 2),
        (["create", "new", "--recipe", "/etc"], 2),
        (["verify", "acme", "--key", "/nowhere.pub"], 2),
        (["verify", "acme", "--receipt", "/nowhere.receipt"], 2),
        (["verify", "acme", "--without", "ann"], 2),
        (["verify", "/nowhere.cert", "--replay", "--without", "ann"], 2),
        (["nonsense"], 2),
    ],
)
def test_mistakes_have_exit_codes_and_no_traceback(data: Path, arguments: list[str], code: int) -> None:
    done = run(data, *arguments)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr


def test_help_imports_nothing_heavy() -> None:
    listed = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "riverdelta.app.main", "registry", "--help"],
        capture_output=True,
        check=False,
        text=True,
        timeout=60,
    )
    assert "rollback" in listed.stdout
    imported = {line.rsplit("|", 1)[-1].strip() for line in listed.stderr.splitlines()}
    assert not imported & {"torch", "mlflow", "transformers", "sqlalchemy", "kafka", "peft"}


def test_the_base_is_a_place_to_go_to_and_to_compare_with(data: Path) -> None:
    head = as_json(data, "rollback", "acme@0")
    assert (head["release"], head["held"]) == (0, 0)
    as_json(data, "resume", "acme", "--tip")
    assert run(data, "rollback", "acme@2", "--to-base").returncode == 2
    assert as_json(data, "diff", "acme@0", "acme@2")["versions"] == [0, 2]


def test_a_mistyped_adapter_leaves_no_ledger_behind(tmp_path: Path) -> None:
    assert run(tmp_path / "new", "create", "Wrong Name").returncode == 2
    assert not (tmp_path / "new").exists()
