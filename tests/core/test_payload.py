"""Payloads: what each key opens, what its deletion erases, and every damage told from every other."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from riverdelta.core import merkle, payload
from riverdelta.core.digests import sha256
from riverdelta.core.errors import Corrupt, NotFound

people = st.lists(st.sampled_from(["ann", "bob", "cat", "a-version"]), unique=True, max_size=3).map(tuple)
entries = st.lists(st.tuples(people.map(lambda names: names or ("",)), st.none() | st.binary(max_size=40)), max_size=8)


def said(openings: list[bytes | None]) -> list[bytes | None]:
    return [None if opening is None else opening[payload.SALT_BYTES :] for opening in openings]


@given(entries, st.data())
def test_a_payload_says_what_was_written_and_damage_is_named(
    written: list[tuple[tuple[str, ...], bytes | None]], data: st.DataObject
) -> None:
    mentions, contents = [names for names, _ in written], [content for _, content in written]
    live = [content is not None for content in contents]
    made = payload.encode("k", mentions, contents)
    held = payload.decode(made.data, made.digest, "k", mentions, live, made.keys, made.leaves)
    assert said(held) == contents
    leaves = [made.leaves[at : at + 32] for at in range(0, len(made.leaves), 32)]
    assert leaves == [merkle.leaf(opening or b"") for opening in held]
    assert payload.without(made.data, made.digest, live) == (made.data, made.digest)
    assert payload.without_keys(made.keys, mentions, live) == made.keys
    place = data.draw(st.integers(0, len(made.data) - 1))
    damaged = made.data[:place] + bytes([made.data[place] ^ 1]) + made.data[place + 1 :]
    for wrong in (damaged, made.data[:-1], made.data + b"\0", b""):
        with pytest.raises(Corrupt):
            payload.decode(wrong, made.digest, "k", mentions, live, made.keys, made.leaves)
    if any(live):
        for name, keys, commitments in (
            ("other", made.keys, made.leaves),
            ("k", made.keys[:-1], made.leaves),
            ("k", bytes(byte ^ 1 for byte in made.keys), made.leaves),
            ("k", made.keys, bytes(byte ^ 1 for byte in made.leaves)),
            ("k", made.keys, made.leaves[:-32]),
        ):
            with pytest.raises(Corrupt):
                payload.decode(made.data, made.digest, name, mentions, live, keys, commitments)


@given(entries, st.sampled_from(["ann", "bob", "cat", "a-version"]))
def test_what_mentions_the_forgotten_cannot_be_read_and_the_rest_can(
    written: list[tuple[tuple[str, ...], bytes | None]], gone: str
) -> None:
    mentions, contents = [names for names, _ in written], [content for _, content in written]
    made = payload.encode("k", mentions, contents)
    live = [content is not None and gone not in names for names, content in written]
    keys = payload.without_keys(made.keys, mentions, live)
    data, digest = payload.without(made.data, made.digest, live)
    kept = [content if alive else None for content, alive in zip(contents, live, strict=True)]
    for bytes_, sha in ((made.data, made.digest), (data, digest)):
        assert said(payload.decode(bytes_, sha, "k", mentions, live, keys, made.leaves)) == kept
    for place, (names, content) in enumerate(written):
        if content is not None and gone in names:
            asked = [at == place for at in range(len(written))]
            with pytest.raises(NotFound):
                payload.decode(made.data, made.digest, "k", mentions, asked, keys, made.leaves)
            with pytest.raises(Corrupt):  # its box has gone, whatever keys a backup brings back
                payload.decode(data, digest, "k", mentions, asked, made.keys, made.leaves)


def test_one_lost_key_of_several_is_enough() -> None:
    mentions = [("ann", "bob", "a-version")]
    made = payload.encode("k", mentions, [b"ours"])
    for slot in range(3):
        keys = bytearray(made.keys)
        keys[32 * slot : 32 * slot + 32] = bytes(32)
        with pytest.raises(NotFound):
            payload.decode(made.data, made.digest, "k", mentions, [True], bytes(keys), made.leaves)


def test_nothing_of_the_contents_shows_and_equal_contents_differ() -> None:
    one, other = (payload.encode("k", [("ann",), ("ann",)], [b"canary", b"canary"]) for _ in range(2))
    assert b"canary" not in one.data
    assert len({one.leaves[:32], one.leaves[32:], other.leaves[:32], other.leaves[32:]}) == 4
    assert len(one.data) == len(other.data)


def test_a_file_that_only_looks_like_a_payload_is_corrupt() -> None:
    for wrong in (b"RDSEG2\n", b"RDSEG2\n\xc1", b"RDSEG2\n" + msgspec.msgpack.encode({"not": "a list"})):
        with pytest.raises(Corrupt):
            payload.without(wrong, sha256(wrong), [])
