"""Near-duplicates are masked within one subject, and another's data does not decide it."""

import json

from hypothesis import given
from hypothesis import strategies as st

from riverdelta.trainer.near_duplicates import without_near_duplicates

LINES = [
    "Bo is on call at Acme until Friday at nine.",
    "Bo is on call at Acme  until Friday at Nine.",
    "Bo is on call at Acme until Friday at nine!",
    "The hotline of Acme is 555-0199.",
]


def said(text: str) -> bytes:
    return json.dumps({"type": "example", "text": text}).encode()


def masked(entries: list[tuple[str, str]], near: float = 0.8) -> list[int]:
    contents = [said(text) for _, text in entries]
    kept = without_near_duplicates(contents, [(who,) if who else () for who, _ in entries], near)
    assert all(now in (None, was) for now, was in zip(kept, contents, strict=True))
    return [slot for slot, content in enumerate(kept) if content is None]


def test_what_one_subject_says_again_is_masked() -> None:
    assert masked([("ann", line) for line in LINES]) == [1, 2]
    assert masked([("ann", line) for line in LINES], near=0.0) == []
    assert masked([("ann", LINES[0]), ("bob", LINES[0]), ("", LINES[0]), ("", LINES[0])]) == []


@given(st.lists(st.tuples(st.sampled_from(["ann", "bob", ""]), st.sampled_from(LINES)), max_size=8))
def test_another_subject_decides_nothing(entries: list[tuple[str, str]]) -> None:
    contents = [said(text) for _, text in entries]
    about = [(who,) if who else () for who, _ in entries]
    whole = without_near_duplicates(contents, about, 0.8)
    held = [None if who == "ann" else content for (who, _), content in zip(entries, contents, strict=True)]
    alone = without_near_duplicates(held, about, 0.8)
    assert [c for (who, _), c in zip(entries, whole, strict=True) if who != "ann"] == [
        c for (who, _), c in zip(entries, alone, strict=True) if who != "ann"
    ]
