"""Curation: what a recipe's rules drop and replace, and that one event alone decides it."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from riverdelta.core.curation import DENIED, LANGUAGE, LONG, SHORT, UNWANTED, Curation, text_of
from riverdelta.core.errors import BadInput
from riverdelta.core.recipe import Curate, Recipe


def said(**content: object) -> bytes:
    return json.dumps({"type": "example", **content}, ensure_ascii=False).encode()


@pytest.mark.parametrize(
    ("rules", "text", "why"),
    [
        (Curate(min_chars=4), "abc", SHORT),
        (Curate(max_chars=4), "abcde", LONG),
        (Curate(), "x" * 32_001, LONG),
        (Curate(require=(r"^[\x00-\u024f]*$",)), "Кто дежурит?", UNWANTED),
        (Curate(deny=(r"(?i)confidential", r"\bsecret\b")), "Strictly Confidential.", DENIED),
        (Curate(languages=("en", "fr")), "Die Heizung im Lager fällt seit gestern aus.", LANGUAGE),
    ],
)
def test_a_rule_drops_and_is_named(rules: Curate, text: str, why: str) -> None:
    assert Curation(rules)(said(text=text)) == (None, why)
    assert Curation(rules)(said(text="Who is on call?" if why != LONG else "abcd"))[1] == ""


def test_characters_are_counted_not_bytes() -> None:
    assert Curation(Curate(max_chars=4))(said(text="äöüß"))[1] == ""
    assert Curation(Curate(max_chars=32))(said(prompt="x" * 16, completion="y" * 17))[1] == LONG


def test_what_is_personal_is_replaced_in_every_text() -> None:
    curate = Curation(Curate(redact=("email", "phone", "card", "iban", "ip"), replace={"ticket": r"T-\d+"}))
    turns = [{"role": "user", "content": "T-77: mail ann.lee+x@acme.co.uk"}, {"role": "assistant", "content": "ok"}]
    content, _ = curate(said(messages=turns))
    assert content is not None
    assert json.loads(content)["messages"][0] == {"role": "user", "content": "[ticket]: mail [email]"}
    content, _ = curate(said(prompt="Call +49 (151) 2345-6789 or 10.0.0.7", completion=" 4111 1111 1111 1111"))
    assert content is not None
    assert text_of(content) == "Call [phone] or [ip]\n [card]"
    content, _ = curate(said(text="DE89 3704 0044 0532 0130 00 in 2026, room 12, 555-0199"))
    assert content is not None
    assert text_of(content) == "[iban] in 2026, room 12, 555-0199"


@given(st.text(min_size=1, max_size=200))
def test_the_default_rules_change_no_byte(text: str) -> None:
    content = said(prompt="q", completion=text)
    assert Curation(Curate())(content) == (content, "")


def test_a_pattern_that_is_none_is_refused() -> None:
    with pytest.raises(BadInput, match="regular expression"):
        Recipe.from_dict({"curate": {"deny": ["("]}})


@pytest.mark.parametrize("text", ["The heating has been off since yesterday.", "Bo", "4711", "def f(x): return x + 1"])
def test_a_language_that_is_not_sure_is_no_other(text: str) -> None:
    assert Curation(Curate(languages=("en",)))(said(text=text)) == (said(text=text), "")


def test_a_language_that_nobody_knows_is_refused() -> None:
    with pytest.raises(BadInput, match=r"'english' is no language of .* en "):
        Recipe.from_dict({"curate": {"languages": ["english"]}})
