"""Certificates: what each of three readers finds, and every changed byte detected and named."""

import base64
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from riverdelta.core.digests import canonical_json, sha256
from riverdelta.core.errors import BadInput, Corrupt
from riverdelta.core.recipe import Recipe
from riverdelta.core.settings import Settings
from riverdelta.core.times import later, now
from riverdelta.registry import cli, operations
from riverdelta.registry.certificate import check, check_stored, open_receipt, read_receipt
from riverdelta.registry.keeper import Keeper
from riverdelta.registry.ledger import Hand, forgetting, journal, lending
from riverdelta.registry.ledger import tables as t
from riverdelta.registry.ledger.journal import chained
from riverdelta.registry.operations import Operations
from riverdelta.registry.purge import PUBLIC_KEY, certificate_key, manifest_key
from riverdelta.registry.signing import key_of, opened, sign
from riverdelta.registry.verify import verify
from tests.registry.stack import Stack, two_versions
from tests.registry.test_cli import run


class Issued(NamedTuple):
    """A stack in which ann was forgotten, her receipt, and the certificate with the issuer's public key."""

    stack: Stack
    receipt: bytes
    data: bytes
    pem: bytes


def forget(stack: Stack, subject: str, request: str) -> bytes:
    """Forget a subject; the certificate."""
    Operations(stack.ledger, stack.settings, "op").forget(subject, ["acme"], request=request)
    stack.train("acme")
    keep(stack)
    return stack.store.get(certificate_key(request))


def keep(stack: Stack) -> None:
    """Bring every forget to its end."""
    keeper = Keeper(stack.ledger, stack.settings, stack.store, orphan_seconds=0.0)
    while keeper.advance_forgets():
        pass


@pytest.fixture(scope="module")
def issued(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Issued]:
    folder = tmp_path_factory.mktemp("issued")
    stack = two_versions(Settings(data=folder / "data"))
    operations.write_receipt(stack.ledger, stack.settings, "ann", ["acme"], folder / "receipt.json")
    data = forget(stack, "ann", "req")
    yield Issued(stack, (folder / "receipt.json").read_bytes(), data, stack.store.get(PUBLIC_KEY))
    stack.ledger.close()


def test_anyone_checks_it_without_data(issued: Issued) -> None:
    told = opened(issued.data, key_of(issued.pem))
    found = check(told)
    assert (found.request, found.erased, found.revoked, found.problems) == ("req", 1, 1, ())
    assert [each["name"] for each in told["subject"]] == ["acme@3"]
    assert check_stored(issued.stack.ledger, told, sha256(issued.data)) == ([], [])
    assert b"canary" not in issued.data
    assert b'"ann"' not in issued.data


def test_the_subject_opens_their_entries(issued: Issued) -> None:
    told = opened(issued.data, key_of(issued.pem))
    assert open_receipt(told, read_receipt(issued.receipt)) == (1, [])
    held = json.loads(issued.receipt)
    assert len(held["entries"]) == 1
    for name, wrong in (("content", "AAAA"), ("salt", "A" * 24), ("index", 3)):
        changed = {"entries": [{**held["entries"][0], name: wrong}]}
        count, [problem] = open_receipt(told, read_receipt(json.dumps(changed).encode()))
        assert count == 0
        assert "acme" in problem
    with pytest.raises(BadInput):
        read_receipt(issued.receipt[:-3])
    receipt = Path(issued.stack.settings.data.parent / "receipt.json")
    assert receipt.stat().st_mode & 0o077 == 0


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_every_changed_byte_of_a_certificate_is_found(issued: Issued, data: st.DataObject) -> None:
    place = data.draw(st.integers(0, len(issued.data) - 1))
    byte = data.draw(st.integers(0, 255).filter(lambda byte: byte != issued.data[place]))
    key = key_of(issued.pem)
    for wrong in (issued.data[:place] + bytes([byte]) + issued.data[place + 1 :], issued.data[:place]):
        with pytest.raises(Corrupt, match="certificate"):
            opened(wrong, key)


def test_what_another_signed_is_not_the_issuers(issued: Issued, tmp_path: Path) -> None:
    told = opened(issued.data, key_of(issued.pem))
    with pytest.raises(Corrupt, match="its signature does not fit its contents"):
        opened(canonical_json({**json.loads(issued.data), "payload": "e30="}) + b"\n", key_of(issued.pem))
    with pytest.raises(Corrupt, match="not signed by the key"):
        opened(sign(tmp_path / "other", told), key_of(issued.pem))
    assert sign(issued.stack.settings.keys_dir, told) == issued.data
    with pytest.raises(BadInput):
        key_of(b"not a key")


def test_a_signed_lie_does_not_fit_together(issued: Issued) -> None:
    """Whoever holds the key cannot sign what contradicts itself or the ledger and have it pass."""
    told = opened(issued.data, key_of(issued.pem))

    def changed(*path: object) -> list[str]:
        copy = json.loads(json.dumps(told))
        place = copy["predicate"]
        *way, last, value = path
        for step in way:
            place = place[step]
        place[last] = value
        return [*check(copy).problems, *check_stored(issued.stack.ledger, copy, sha256(issued.data))[0]]

    other = "0" * 64
    assert "not in the tree" in changed("erased", 0, "commitment", other)[0]
    assert any("another root" in problem for problem in changed("segments", 0, "root", other))
    assert "other weights" in changed("adapters", 0, "tip", "digest", other)[0]
    assert "stands in its own place" in changed("adapters", 0, "revoked", 0, "version", 3)[0]
    assert "does not lead" in changed("adapters", 0, "journal", "lines", 0, other)[0]
    assert "before it was fenced" in changed("purged_at", "2000-01-01T00:00:00.000Z")[0]
    assert "other revoked" in changed("adapters", 0, "revoked", [])[0]
    assert "other entries" in changed("erased", [])[0]
    for name, value in (("request", "other"), ("subject", other), ("epochs", {"acme": 2})):
        assert f"other {name.rstrip('s')}" in changed(name, value)[0]
    for place in (("clean_parent",), ("rebuilt", 0), ("revoked", 0)):
        assert any("other weights" in problem for problem in changed("adapters", 0, *place, "digest", other))
    # What nothing contradicts is still not what was issued.
    said = told["predicate"]
    told_otherwise = {**told, "predicate": {**said, "kafka": []}}
    again = sign(issued.stack.settings.keys_dir, told_otherwise)
    assert check(opened(again, key_of(issued.pem))).problems == ()
    [problem] = check_stored(issued.stack.ledger, told_otherwise, sha256(again))[0]
    assert "not the certificate that was issued" in problem
    for lie in ("2000-01-01T00:00:00.000Z", told["predicate"]["purged_at"]):
        assert any("at another time" in problem for problem in changed("fenced_at", lie))
        assert any("was not made at" in problem for problem in changed("fenced_at", lie))


@pytest.mark.parametrize("what", ["payload", "weights", "state"])
def test_every_changed_byte_of_the_store_is_found(issued: Issued, what: str) -> None:
    stack, version = issued.stack, issued.stack.ledger.version("acme", 1)
    key, named = {
        "payload": (stack.ledger.segment("acme", 1).payload, "Segment 1"),
        "weights": (f"weights/{version.digest}.safetensors", "Version 1"),
        "state": (f"states/{version.state}.safetensors", "Version 1"),
    }[what]
    written = stack.store.get(key)
    for place in range(0, len(written), max(1, len(written) // 40)):
        stack.store.put(key, written[:place] + bytes([written[place] ^ 1]) + written[place + 1 :])
        [problem] = verify(stack.ledger, stack.store, stack.keys, "acme").problems
        assert problem.startswith(named)
    stack.store.put(key, written)
    assert verify(stack.ledger, stack.store, stack.keys, "acme").problems == ()


def test_every_changed_byte_of_a_manifest_is_found(issued: Issued) -> None:
    stack, s = issued.stack, t.segments.c
    written = stack.ledger.manifest("acme", 2).pack()
    this = t.segments.update().where(s.adapter == "acme", s.number == 2)
    for place in range(0, len(written), 3):
        wrong = written[:place] + bytes([written[place] ^ 1]) + written[place + 1 :]
        with stack.ledger.db.write() as c:
            c.execute(this.values(manifest=wrong))
        problems = verify(stack.ledger, stack.store, stack.keys, "acme").problems
        assert problems, place
    with stack.ledger.db.write() as c:
        c.execute(this.values(manifest=written))
    assert verify(stack.ledger, stack.store, stack.keys, "acme").problems == ()


def test_the_time_of_the_fence_is_when_the_loan_was_called_in(tmp_path: Path) -> None:
    stack = two_versions(Settings(data=tmp_path / "data"))
    acts = Operations(stack.ledger, stack.settings, "op")
    begun = acts.forget("ann", ["acme"], request="late", serve_until_rebuilt=600.0).forget
    keeper = Keeper(stack.ledger, stack.settings, stack.store, orphan_seconds=0.0)
    keeper.advance_forgets()
    stack.train("acme")
    while keeper.advance_forgets():
        pass
    data = stack.store.get(certificate_key("late"))
    told = opened(data, key_of(stack.store.get(PUBLIC_KEY)))
    held = told["predicate"]
    dirty = stack.ledger.version("acme", 2).digest
    [fence] = [each for each in stack.ledger.fences(0) if dirty in each.digests]
    assert (held["fence"], held["fenced_at"]) == (fence.number, fence.at)
    assert held["fenced_at"] > begun.at
    assert check(told).problems == ()
    assert check_stored(stack.ledger, told, sha256(data)) == ([], [])
    held["fenced_at"] = begun.at  # as if nothing had been served meanwhile
    assert any("was served until" in problem for problem in check(told).problems)
    assert any("was not made at" in problem for problem in check_stored(stack.ledger, told, sha256(data))[0])


@pytest.mark.parametrize("lent", [0.0, 600.0])
@pytest.mark.parametrize("ahead", [-3600.0, -0.2, 0.2, 3600.0])
def test_clocks_that_differ_make_no_certificate_corrupt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ahead: float, lent: float
) -> None:
    """Who forgets and who keeps are two machines; one's clock is so many seconds ahead of the other's."""
    stack = two_versions(Settings(data=tmp_path / "data"))
    stack.ledger.create("other", Recipe(), "test")
    stack.seal("other", [("ann", "canary-ann-there")])
    keeper = Keeper(stack.ledger, stack.settings, stack.store, orphan_seconds=0.0)
    purged_at = ""
    for request, subject in (("r1", "ann"), ("r2", "bob")):
        with monkeypatch.context() as machine:
            for module in (forgetting, journal, lending):
                machine.setattr(module, "now", lambda: later(now(), ahead))
            acts = Operations(stack.ledger, stack.settings, "op")
            acts.fence(subject, None, "", request, serve_until_rebuilt=lent)
        for _ in range(5):
            keeper.advance_forgets()
            stack.train("acme")
            stack.train("other")
        data = stack.store.get(certificate_key(request))
        told = opened(data, key_of(stack.store.get(PUBLIC_KEY)))
        assert check(told).problems == ()
        assert check_stored(stack.ledger, told, sha256(data))[0] == []
        assert told["predicate"]["purged_at"] > purged_at, "they are issued one after the other"
        purged_at = told["predicate"]["purged_at"]


def test_the_order_of_the_stages_is_the_journals(issued: Issued) -> None:
    told = opened(issued.data, key_of(issued.pem))
    held = told["predicate"]["adapters"][0]["journal"]
    lines = [line for line in held["lines"] if not isinstance(line, str)]
    assert len(lines) > 2
    chain = held["before"]
    held["lines"] = [lines[0], *reversed(lines[1:])]
    for line in held["lines"]:
        chain = chained(chain, sha256(canonical_json(line)))
    held["chain"] = chain
    [problem] = check(told).problems
    assert "in another order" in problem


def test_superseded_is_not_tampered(tmp_path: Path) -> None:
    stack = two_versions(Settings(data=tmp_path / "data"))
    stack.seal("acme", [("cat", "canary-cat"), ("bob", "more")])
    stack.train("acme")
    first = forget(stack, "ann", "first")
    second = forget(stack, "cat", "second")
    key = key_of(stack.store.get(PUBLIC_KEY))
    earlier, later = opened(first, key), opened(second, key)
    problems, superseded = check_stored(stack.ledger, earlier, sha256(first))
    assert problems == []
    assert [each.split(" by the forget ")[1] for each in superseded] == ["second"]
    assert check_stored(stack.ledger, later, sha256(second)) == ([], [])
    assert later["predicate"]["previous"] == stack.ledger.forget_of("first").body["certificate_sha"]
    assert os.stat(stack.settings.keys_dir / "certificates.key").st_mode & 0o077 == 0


def test_who_runs_the_deployment_is_told_what_its_ledger_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without `--replay` too; who gives a key is elsewhere, and is told what the certificate alone says."""
    stack = two_versions(Settings(data=tmp_path / "data"))
    stack.seal("acme", [("cat", "canary-cat"), ("bob", "more")])
    stack.train("acme")
    file, pem = tmp_path / "first.cert", tmp_path / "issuer.pub"
    file.write_bytes(forget(stack, "ann", "first"))
    pem.write_bytes(stack.store.get(PUBLIC_KEY))
    forget(stack, "cat", "second")

    def verified(data: Path, *more: str) -> tuple[int, str]:
        monkeypatch.setenv("RIVERDELTA_DATA", str(data))
        done = CliRunner().invoke(cli.app, ["verify", str(file), *more])
        return done.exit_code, " ".join(done.output.split())

    code, said = verified(stack.settings.data)
    assert (code, "Superseded: acme@" in said, "by the forget second" in said) == (0, True, True)
    for data in (stack.settings.data, tmp_path / "elsewhere"):
        code, said = verified(data, "--key", str(pem))
        assert (code, "in order" in said, "Superseded" in said) == (0, True, False)
    with stack.ledger.db.write() as c:
        c.execute(t.forgets.update().where(t.forgets.c.id == "first").values(body={}))
    code, said = verified(stack.settings.data)
    assert (code, "not the certificate that was issued" in said) == (7, True)


def test_operators_acts_are_named_each_at_its_index(tmp_path: Path) -> None:
    stack = two_versions(Settings(data=tmp_path / "data"))
    acts = Operations(stack.ledger, stack.settings, "op")
    forget(stack, "ann", "first")
    acts.rollback("acme", 1)
    acts.resume("acme", "tip")
    stack.seal("acme", [("cy", "three"), ("di", "four")])
    acts.allow("ann", ["acme"])
    acts.decide("acme", 3, Hand.DISCARD)
    told = json.loads(forget(stack, "di", "second"))
    [adapter] = json.loads(base64.b64decode(told["payload"]))["predicate"]["adapters"]
    assert [(each["kind"], each["index"]) for each in adapter["residual"]["acts"]] == [
        ("rollback", 4),
        ("resume", 4),
        ("allow", 6),
        ("by_hand", 6),
    ]


def said(issued: Issued, *arguments: str, code: int = 0) -> str:
    done = run(issued.stack.settings.data, "verify", *arguments)
    assert done.returncode == code, done.stderr
    return " ".join(f"{done.stdout} {done.stderr}".split())


def test_what_a_receipt_opens_is_told_even_where_it_is_nothing(issued: Issued, tmp_path: Path) -> None:
    def told(*arguments: str) -> tuple[int | None, int | None]:
        found = json.loads(said(issued, "--request", "req", "--json", *arguments))
        return found["opened"], found["receipt_gone"]

    empty, gone, whole = tmp_path / "empty.json", tmp_path / "gone.json", tmp_path / "whole.json"
    empty.write_text('{"entries": []}')
    gone.write_text('{"entries": [], "gone": 2}')
    whole.write_bytes(issued.receipt)
    assert told() == (None, None)
    assert told("--receipt", str(empty)) == (0, 0)
    assert told("--receipt", str(gone)) == (0, 2)
    assert told("--receipt", str(whole)) == (1, 0)
    assert "receipt" not in said(issued, "--request", "req")
    assert "The receipt opens 0 of 1 erased entry." in said(issued, "--request", "req", "--receipt", str(empty))
    more = said(issued, "--request", "req", "--receipt", str(gone))
    assert "The receipt opens 0 of 1 erased entry; 2 more lay beyond the forget horizon." in more


def test_a_certificate_is_found_by_its_request(issued: Issued) -> None:
    stack, data = issued.stack, issued.stack.settings.data
    assert "Forget req: 1 entry erased" in said(issued, "--request", "req")
    listed = [json.loads(run(data, "list", *more, "--json").stdout)["forgets"] for more in ([], ["--all"])]
    assert [[each["request_id"] for each in forgets] for forgets in listed] == [[], ["req"]]
    assert "Forget req of" in run(data, "list", "--all").stdout
    waited = run(data, "forget", "--adapter", "acme", "--subject", "ann", "--request", "req", "--wait").stdout
    where = f"{data}/store/{certificate_key('req')}"
    assert f"certified by {where}." in waited
    assert Path(where).read_bytes() == issued.data
    assert "in order" in said(issued, where)
    assert "list --all" in said(issued, "--request", "nobody's", code=3)
    said(issued, "acme", "--request", "req", code=2)
    Operations(stack.ledger, stack.settings, "op").fence("zoe", ["acme"], "", "young")
    assert "The forget young is fenced: its certificate comes" in said(issued, "--request", "young", code=4)


def test_what_is_no_certificate_is_told_in_a_line(issued: Issued, tmp_path: Path) -> None:
    data = issued.stack.settings.data
    file, pem = tmp_path / "it.json", tmp_path / "issuer.pub"

    def verified(held: bytes, code: int) -> str:
        file.write_bytes(held)
        told = said(issued, str(file), code=code)
        assert len(told) < 250
        return told

    place = len(issued.data) // 3
    for damaged in (
        issued.data[:place],
        issued.data[:place] + b"!" + issued.data[place + 1 :],
        issued.data[:place] + b"\xff" + issued.data[place + 1 :],
    ):
        assert "certificate" in verified(damaged, 7)
    manifest = issued.stack.store.get(manifest_key("req"))
    assert "is the manifest. Give the certificate.dsse.json that lies beside it" in verified(manifest, 2)
    for other in (b"hello", b"[]", b"{}", b"\x89PNG\xff", b'{"payload": 1}', b"[" * 100_000):
        assert "That is no certificate." in verified(other, 2)
    lacking = opened(issued.data, key_of(issued.pem))
    del lacking["predicate"]["erased"]
    assert "The certificate lacks 'erased'." in verified(sign(issued.stack.settings.keys_dir, lacking), 2)
    for key in (b"no key", b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n", issued.data):
        pem.write_bytes(key)
        done = run(data, "verify", "--request", "req", "--key", str(pem))
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1
        assert "That is no public key in PEM form." in done.stderr


def test_another_certificate_in_the_place_of_one_is_found(tmp_path: Path) -> None:
    stack = two_versions(Settings(data=tmp_path / "data"))
    stack.ledger.create("other", Recipe(), "test")
    anns, bobs = forget(stack, "ann", "req-a"), forget(stack, "bob", "req-b")
    data = stack.settings.data
    assert run(data, "verify").returncode == 0
    stack.store.put(certificate_key("req-b"), anns)
    done = run(data, "verify", "--request", "req-b")
    assert done.returncode == 7
    assert "is not the certificate that was issued of the forget req-b" in " ".join(done.stderr.split())
    for name in ((), ("acme",)):
        done = run(data, "verify", *name)
        assert done.returncode == 7
        assert "The certificate of the forget req-b is not the one that was issued." in " ".join(done.stdout.split())
    assert run(data, "verify", "other").returncode == 0
    assert run(data, "verify", "--request", "req-a").returncode == 0
    stack.store.put(certificate_key("req-b"), bobs)
    stack.store.delete(manifest_key("req-a"))
    [told] = [each for each in json.loads(run(data, "verify", "--json").stdout) if each["adapter"] == "acme"]
    assert told["problems"] == ["The manifest of the forget req-a is not the one that was issued."]


def test_the_certificate_of_a_forget_ahead_of_its_adapter_is_checked_too(tmp_path: Path) -> None:
    stack = two_versions(Settings(data=tmp_path / "data"))
    acts = Operations(stack.ledger, stack.settings, "test")
    asked = {"topic": "control", "incarnation": "run", "partition": 0, "offset": 0}
    acts.fence("ann", ["later"], "", "ahead", 0.0, asked)
    keep(stack)
    data = stack.settings.data
    assert run(data, "verify").returncode == 0
    stack.store.put(certificate_key("ahead"), b"another")
    done = run(data, "verify")
    assert done.returncode == 7
    assert "later: 0 facts" in done.stdout
    assert "The certificate of the forget ahead is not the one that was issued." in " ".join(done.stdout.split())


def test_the_certificate_of_a_forget_where_there_are_no_adapters_is_checked_too(tmp_path: Path) -> None:
    stack = Stack(Settings(data=tmp_path / "data"))
    Operations(stack.ledger, stack.settings, "test").forget("ann", None, request="early")
    keep(stack)
    assert run(stack.settings.data, "verify").returncode == 0
    stack.store.delete(certificate_key("early"))
    done = run(stack.settings.data, "verify", "--json")
    assert done.returncode == 7
    [told] = json.loads(done.stdout)
    assert told["adapter"] == "*"
    assert told["problems"] == ["The certificate of the forget early is not the one that was issued."]


def test_a_forget_between_two_looks_makes_no_certificate_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stack = two_versions(Settings(data=tmp_path / "data"))
    stack.seal("acme", [("dan", "canary-dan"), ("bob", "canary-bob-four")])
    stack.train("acme")
    signed = forget(stack, "ann", "req")
    told, versions = opened(signed, key_of(stack.store.get(PUBLIC_KEY))), stack.ledger.versions

    def late(name: str) -> Any:
        Operations(stack.ledger, stack.settings, "op").forget("dan", ["acme"], request="late")
        return versions(name)

    monkeypatch.setattr(stack.ledger, "versions", late)
    problems, superseded = check_stored(stack.ledger, told, sha256(signed))
    assert problems == []
    assert len(superseded) == 1
