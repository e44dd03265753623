"""From contents to rows and micro-batches: what has loss, what is cut, what has nothing to learn from."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from riverdelta.core.recipe import Training
from riverdelta.core.template import IGNORE, example_ids
from riverdelta.trainer.base import Base
from riverdelta.trainer.increment import Inputs, Learner, Untrainable, row_of, train
from riverdelta.trainer.layout import Row, arrange, bucket, plan
from tests.trainer.samples import example, recipe


def learned(base: Base, content: dict[str, Any], length: int = 64) -> str:
    """The text that has loss, without the end token."""
    ids, labels = example_ids(base.tokenizer, content, length)
    return str(base.tokenizer.decode([i for i, label in zip(ids, labels, strict=True) if label != IGNORE][:-1]))


def test_loss_is_on_completions_last_turns_and_texts(base: Base) -> None:
    assert learned(base, {"prompt": "Q: two?\nA:", "completion": " 2"}) == " 2"
    turns = [("user", "hi"), ("assistant", "yo"), ("user", "well?"), ("assistant", "good")]
    assert learned(base, {"messages": [{"role": r, "content": c} for r, c in turns]}) == "good"
    assert learned(base, {"text": "all of it"}) == "all of it"


def test_every_answer_learns_to_end(base: Base) -> None:
    ids, labels = example_ids(base.tokenizer, {"prompt": "a", "completion": "b"}, 64)
    assert ids[-1] == labels[-1] == base.tokenizer.eos_token_id


def test_a_long_prompt_loses_its_beginning_and_no_answer(base: Base) -> None:
    content = {"prompt": "x" * 100 + "Q?", "completion": "answer"}
    ids, _ = example_ids(base.tokenizer, content, 20)
    assert len(ids) == 20
    assert ids[0] == base.tokenizer.bos_token_id
    assert base.tokenizer.decode(ids[-9:-1]) == "Q?answer"
    assert learned(base, content, 20) == "answer"


@pytest.mark.parametrize(
    "content",
    [
        b'{"type":"interaction","response":"r","digest":"d","prompt":"a","completion":"b"}',
        b'{"type":"feedback","response":"r","rating":1}',
        example(messages=[{"role": "user", "content": "no answer"}]),
        example(prompt="a"),
    ],
)
def test_what_has_nothing_to_learn_is_no_row(base: Base, content: bytes) -> None:
    assert row_of(base.tokenizer, content, 64) is None


def test_nothing_to_learn_makes_a_version_like_its_parent(base: Base) -> None:
    first = train(base, Learner(base, Inputs(recipe(), 3, [example(prompt="a", completion="b")])))
    second = train(base, Learner(base, Inputs(recipe(), 3, [None, None], [None], first.weights, first.state)))
    assert second.digest == first.digest
    assert second.state_digest != first.state_digest
    assert second.losses == ()


def test_a_loss_that_is_not_finite_is_told(base: Base) -> None:
    wild = type(recipe()).from_dict({**recipe().to_dict(), "optimiser": {"learning_rate": 1e30}})
    with pytest.raises(Untrainable, match="learning_rate"):
        train(base, Learner(base, Inputs(wild, 3, [example(prompt="a", completion="b")])))


@given(
    slots=st.integers(0, 40),
    earlier=st.integers(0, 200),
    passes=st.integers(1, 4),
    steps=st.integers(1, 12),
    size=st.integers(1, 9),
    rehearse=st.integers(0, 9),
    seed=st.integers(0, 2**63),
    position=st.integers(0, 10**6),
)
def test_a_plan_visits_each_slot_once_a_pass_and_the_earlier_ones_evenly(
    slots: int, earlier: int, passes: int, steps: int, size: int, rehearse: int, seed: int, position: int
) -> None:
    training = Training(passes=passes, steps=steps, micro_batch=size, rehearse=rehearse)
    batches = plan(slots, earlier, training, seed, position)
    each = -(-slots // size)
    if slots:
        passes = max(passes, -(-steps // each))
        assert len(batches) == passes * each >= steps
    for number in range(passes):
        seen = [slot for batch in batches[number * each : (number + 1) * each] for slot in batch.slots]
        assert sorted(seen) == list(range(slots))
    counts = [0] * earlier
    for batch in batches:
        assert len(set(batch.earlier)) == len(batch.earlier) == min(rehearse, earlier)
        for slot in batch.earlier:
            counts[slot] += 1
    assert not counts or max(counts) - min(counts) <= 1


@given(st.lists(st.lists(st.integers(2, 100), min_size=1, max_size=6), min_size=1, max_size=4))
def test_rows_keep_their_tokens_their_targets_and_their_adapter(lengths: list[list[int]]) -> None:
    groups = [[Row(tuple(range(1, n + 1)), (IGNORE, *range(2, n + 1))) for n in group] for group in lengths]
    batch = arrange(groups, filler=0)
    assert sum(batch.tokens_each) == len(batch.tokens) == sum(bucket(n) for group in lengths for n in group)
    assert list(batch.targets_each) == [sum(n - 1 for n in group) for group in lengths]
    assert [batch.tokens[place + 1] for place in batch.keep] == list(batch.targets)
    for block in batch.blocks:
        for row in range(block.rows):
            first = block.first + row * block.length
            assert batch.positions[first : first + block.length] == tuple(range(block.length))
