"""API keys: files that fit and files that do not, and what a caller may know of."""

import hashlib

import pytest

from riverdelta.core.errors import BadInput, NotFound
from riverdelta.serving.api_keys import LOCAL, Keys

SECRET = "0123456789abcdef"
FILE = f"""
[[key]]
name = "acme"
key = "{SECRET}"
adapters = ["acme-support"]

[[key]]
name = "ops"
hash = "{hashlib.sha256(b"the operator's secret").hexdigest()}"
adapters = "*"
role = "admin"
base = false
"""


def load(tmp_path, text):
    path = tmp_path / "keys.toml"
    path.write_text(text)
    return Keys.load(str(path))


def test_without_a_file_everybody_is_local():
    keys = Keys.load("")
    assert not keys.required
    assert keys.caller("") is LOCAL


def test_callers(tmp_path):
    keys = load(tmp_path, FILE)
    assert keys.required
    acme, ops = keys.caller(f"Bearer {SECRET}"), keys.caller("bearer the operator's secret")
    assert acme.name == "acme"
    assert not acme.admin
    assert [acme.sees(name) for name in ("acme-support", "other", None)] == [True, False, True]
    assert ops.admin
    assert [ops.sees(name) for name in ("acme-support", "other", None)] == [True, True, False]
    for wrong in ("", SECRET, f"Basic {SECRET}", f"Bearer {SECRET}x", "Bearer ", "Bearer é"):
        assert keys.caller(wrong) is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "key = 3",
        "[[key]]\nname='a'",
        "[[key]]\nname='a'\nkey='short'",
        "[[key]]\nname='a'\nhash='xyz'",
        f"[[key]]\nname='a'\nkey='{SECRET}'\nhash='{'0' * 64}'",
        f"[[key]]\nname='a'\nkey='{SECRET}'\nrole='root'",
        f"[[key]]\nname='a'\nkey='{SECRET}'\nadapter=['acme']",
        f"[[key]]\nname='a'\nkey='{SECRET}'\nadapters=['No Name']",
        f"[[key]]\nname='a'\nkey='{SECRET}'\n[[key]]\nname='b'\nkey='{SECRET}'",
        f"[[key]]\nname='a'\nkey='{SECRET}'\n[[key]]\nname='a'\nkey='{SECRET}2'",
        "not toml",
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, text):
    with pytest.raises(BadInput):
        load(tmp_path, text)


def test_an_absent_file(tmp_path):
    with pytest.raises(NotFound):
        Keys.load(str(tmp_path / "none.toml"))
