"""Files and names: one form for equal things, and a clear error for whatever is not in that form."""

import contextlib
import json
import os
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from riverdelta.core import weights
from riverdelta.core.digests import canonical_json, digest_of, seed_of, sha256
from riverdelta.core.errors import BadInput, Corrupt
from riverdelta.core.keys import SubjectKey
from riverdelta.core.names import ModelRef
from riverdelta.core.recipe import Recipe

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)


@given(values)
def test_equal_values_have_equal_bytes(value: object) -> None:
    again = json.loads(canonical_json(value))
    assert again == value
    assert digest_of(again) == digest_of(value) == sha256(canonical_json(value))


@given(st.lists(st.text() | st.integers(), max_size=3), st.lists(st.text() | st.integers(), max_size=3))
def test_seeds_differ_where_their_parts_do(one: list[str | int], other: list[str | int]) -> None:
    assert (seed_of(*one) == seed_of(*other)) == (one == other)
    assert 0 <= seed_of(*one) < 2**63


def test_weights_have_one_form() -> None:
    tensors = {name: torch.randn(3, 4) for name in ("b", "a", "c")}
    config = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    data, digest = weights.encode(config, tensors)
    mirrored = {name: tensors[name].t().contiguous().t() for name in sorted(tensors)}
    assert weights.encode(dict(reversed(config.items())), mirrored) == (data, digest)
    held, again = weights.decode(data, digest)
    assert held == config
    assert all(torch.equal(again[name], tensors[name]) for name in tensors)
    assert weights.encode(config, {**tensors, "a": tensors["a"] + 1})[1] != digest
    assert weights.encode({**config, "lora_alpha": 8}, tensors)[1] != digest


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_damaged_weights_are_corrupt_and_nothing_else(data: st.DataObject) -> None:
    written, digest = weights.encode({"r": 1}, {"a": torch.ones(2)})
    place = data.draw(st.integers(0, len(written) - 1))
    damaged = written[:place] + data.draw(st.binary(min_size=1, max_size=3)) + written[place + 1 :]
    if damaged != written:
        with pytest.raises(Corrupt):
            weights.decode(damaged, digest)
    with contextlib.suppress(Corrupt):  # without a digest it may be another valid file
        weights.decode(damaged)


@settings(deadline=None)
@given(st.binary(max_size=60), st.integers(0, 2**64 - 1))
def test_whatever_is_read_as_weights_fails_cleanly(tail: bytes, size: int) -> None:
    for raw in (tail, size.to_bytes(8, "little") + tail, len(tail).to_bytes(8, "little") + tail):
        with pytest.raises(Corrupt):
            weights.decode(raw)


@given(st.text(max_size=80))
def test_names_are_read_as_they_are_written(text: str) -> None:
    try:
        ref = ModelRef.parse(text)
    except BadInput:
        return
    assert str(ref) == text


@pytest.mark.parametrize("text", ["", "a@", "a@0", "a@07", "a@-1", "a@1@2", "a b", "a/b", "../a", "A", "a@٣", "base@1"])
def test_what_is_no_name_is_refused(text: str) -> None:
    with pytest.raises(BadInput):
        ModelRef.parse(text)


def test_recipes_round_trip_and_refuse_what_they_do_not_know() -> None:
    recipe = Recipe.from_dict({"lora": {"rank": 4, "targets": ["q_proj"]}, "curate": {"languages": ["en"]}, "seed": 7})
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert Recipe.from_dict(recipe.to_dict()).digest == recipe.digest != Recipe().digest
    for wrong in ({"lora": {"rnak": 4}}, {"lora": {"rank": 0}}, {"optimiser": {"beta1": 1.0}}, {"seed": -1}):
        with pytest.raises(BadInput):
            Recipe.from_dict(wrong)


def test_a_key_is_made_once_and_only_its_owner_reads_it(tmp_path: Path) -> None:
    folder = tmp_path / "keys"
    made: list[str] = []
    threads = [threading.Thread(target=lambda: made.append(SubjectKey.open(folder).subject("ann"))) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(made)) == 1
    assert len(made) == 16
    [file] = folder.iterdir()
    assert file.stat().st_mode & 0o777 == 0o600
    assert os.stat(folder).st_mode & 0o777 == 0o700
    file.write_bytes(b"short")
    with pytest.raises(Corrupt):
        SubjectKey.open(folder)


@given(st.text(max_size=20), st.text(max_size=20))
def test_hashes_tell_apart_what_they_are_of(one: str, other: str) -> None:
    key, stranger = SubjectKey(b"k" * 32), SubjectKey(b"s" * 32)
    assert (key.subject(one) == key.subject(other)) == (one == other)
    assert key.subject(one) != stranger.subject(one)
    assert key.subject(one) != key.request(one)
    assert (key.event(one, other) == key.event(other, one)) == (one == other)
