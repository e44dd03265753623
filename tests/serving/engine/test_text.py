"""Text deltas join to the decoded answer, whole characters at a time, and never show a stop string."""

from hypothesis import given, settings
from hypothesis import strategies as st

from riverdelta.serving.engine.text import TextStream

from . import models

TOKENIZER = models.tokenizer()


@settings(deadline=None)
@given(st.text(max_size=40), st.text(max_size=5))
def test_deltas_join_to_the_text(text, prompt):
    stream = TextStream(TOKENIZER.backend_tokenizer, TOKENIZER.encode(prompt or "x"), ())
    deltas = [stream.push(t) for t in TOKENIZER.encode(text)]
    assert all("�" not in d for d in deltas) or "�" in text
    assert "".join(deltas) + stream.flush() == text


@settings(deadline=None)
@given(st.text("abé🎉", max_size=20), st.lists(st.text("abé🎉", min_size=1, max_size=4), min_size=1, max_size=3))
def test_the_text_ends_before_the_first_stop_string(text, stop):
    stream = TextStream(TOKENIZER.backend_tokenizer, [5], stop)
    shown = ""
    for token in TOKENIZER.encode(text):
        shown += stream.push(token)
        if stream.stopped:
            break
    shown += stream.flush()
    ends = [(text.find(s) + len(s), text.find(s)) for s in stop if s in text]
    # Strings complete in the order of their ends; of those that end together the longest starts first.
    assert stream.stopped == bool(ends)
    assert shown == (text[: min(ends)[1]] if ends else text)


def test_a_prompt_that_ends_inside_a_character_adds_nothing():
    stream = TextStream(TOKENIZER.backend_tokenizer, TOKENIZER.encode("a🎉")[:-1], ())
    assert "".join(stream.push(t) for t in TOKENIZER.encode("yes")) == "yes"


def test_an_incomplete_character_is_shown_only_at_the_end():
    stream = TextStream(TOKENIZER.backend_tokenizer, [5], ())
    tokens = TOKENIZER.encode("🎉")
    assert [stream.push(t) for t in tokens[:3]] == ["", "", ""]
    assert stream.flush() == "�"
