"""The PyTorch path of lora_delta, its pools and its segments."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from riverdelta.kernels import LoraPool, Segments, lora_delta

RAGGED = [(-1, 2), (0, 2), (1, 2), (2, 1), (0, 17), (-1, 1), (2, 3)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("padding", [0, 32])
def test_ragged_runs_match_float64(make_case, dtype, padding):
    case = make_case([(8,), (8,), (5,)], RAGGED, dtype=dtype, padding=padding)
    out = case.out.clone()
    assert lora_delta(case.x, case.pool, case.segments(), out) is out
    case.check(out)


@pytest.mark.parametrize("rank", [1, 2, 7, 16, 64, 256])
def test_ranks(make_case, rank):
    case = make_case([(rank,)], [(0, 3)], max_rank=256)
    case.check(lora_delta(case.x, case.pool, case.segments(), case.out.clone()))


def test_merged_parts_of_different_ranks(make_case):
    ranks = [(8, 8, 8), (8, 8, 8), (4, 16, 1), (0, 3, 0), (0, 0, 0)]
    case = make_case(ranks, [(0, 2), (1, 2), (2, 2), (3, 1), (4, 2)], parts=(64, 16, 16))
    case.check(lora_delta(case.x, case.pool, case.segments(), case.out.clone()))


def test_rows_without_adapter_keep_their_bits(make_case):
    case = make_case([(8,)], [(-1, 2), (0, 1), (-1, 2)])
    out = case.out.clone()
    out[0], out[4] = float("nan"), float("inf")
    before = out.clone()
    lora_delta(case.x, case.pool, case.segments(), out)
    for row in (0, 1, 3, 4):
        assert torch.equal(out[row].view(torch.int32), before[row].view(torch.int32))


def test_nothing_happens_without_adapters(make_case):
    case = make_case([(8,)], [(-1, 3)])
    assert case.segments().empty
    assert torch.equal(lora_delta(case.x, case.pool, case.segments(), case.out.clone()), case.out)
    empty = Segments.build([], "cpu")
    assert empty.empty
    assert empty.rows == 0
    lora_delta(case.x[:0], case.pool, empty, case.out[:0])


@given(
    runs=st.lists(st.tuples(st.integers(-1, 5), st.integers(0, 20)), max_size=8),
    exact=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
@settings(max_examples=60, deadline=None)
def test_any_runs_match_float64(make_case, runs, exact, dtype):
    ranks = [(8, 8), (8, 8), (8, 8), (4, 2), (0, 3), (0, 0)]
    case = make_case(ranks, [*runs, (-1, 1)], parts=(24, 16), dtype=dtype)
    segments = case.segments(exact=exact)
    case.check(lora_delta(case.x, case.pool, segments, case.out.clone()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("in_features", [96, 100, 640])
def test_exact_rows_do_not_depend_on_their_batch_mates(make_case, dtype, in_features):
    runs = [(2, 3), (-1, 1), (0, 37), (1, 1), (2, 2), (3, 4)]
    ranks = [(16, 16), (16, 16), (9, 9), (16, 16)]
    case = make_case(ranks, runs, dtype=dtype, in_features=in_features, parts=(90, 36))
    together = lora_delta(case.x, case.pool, case.segments(exact=True), case.out.clone())
    row = 0
    for slot, rows in runs:
        for i in range(row, row + rows):
            alone = case.out[i : i + 1].clone()
            lora_delta(case.x[i : i + 1], case.pool, Segments.build([(slot, 1)], "cpu", exact=True), alone)
            assert torch.equal(alone[0], together[i])
        row += rows


def test_segments_tile_long_runs_and_refuse_what_does_not_fit():
    segments = Segments.build([(3, 33)], "cpu", capacity=4)
    assert segments.tiles.tolist() == [[3, 0, 16], [3, 16, 16], [3, 32, 1], [0, 0, 0]]
    segments.update([(1, 2)])
    assert segments.tiles.tolist() == [[1, 0, 2], [0, 0, 0], [0, 0, 0], [0, 0, 0]]
    with pytest.raises(ValueError, match="capacity of 4"):
        segments.update([(0, 100)])
    with pytest.raises(ValueError, match="slots are >= -1"):
        segments.update([(-2, 1)])


def test_a_slot_is_immutable_until_cleared():
    pool = LoraPool(2, 8, 4, 4)
    pool.write(0, torch.ones(2, 8), torch.ones(4, 2), 1.0)
    with pytest.raises(ValueError, match="immutable"):
        pool.write(0, torch.ones(2, 8), torch.ones(4, 2), 1.0)
    pool.clear(0)
    assert pool.layout(0).rank == 0
    assert not pool.a[0].any()
    pool.write(0, torch.ones(4, 8), torch.ones(4, 4), 1.0)
    assert pool.layout(0).rank == 4


@pytest.mark.parametrize(
    ("a", "b", "complaint"),
    [
        ((5, 8), (4, 5), "max_rank"),
        ((2, 7), (4, 2), "wants A"),
        ((2, 8), (4, 3), "wants A"),
        ((0, 8), (4, 0), "rank 0"),
    ],
)
def test_weights_that_do_not_fit_leave_the_slot_clear(a, b, complaint):
    pool = LoraPool(1, 8, 4, 4)
    with pytest.raises(ValueError, match=complaint):
        pool.write(0, torch.ones(a), torch.ones(b), 1.0)
    assert pool.layout(0).rank == 0
    assert not pool.a.any()


def test_wrong_calls_say_what_to_do(make_case):
    case = make_case([(8,)], [(0, 3)])
    with pytest.raises(ValueError, match="cover 3 rows"):
        lora_delta(case.x[:2], case.pool, case.segments(), case.out)
    with pytest.raises(ValueError, match="one dtype"):
        lora_delta(case.x.half(), case.pool, case.segments(), case.out)
    with pytest.raises(ValueError, match="maps 96 -> 80"):
        lora_delta(case.x[:, :90], case.pool, case.segments(), case.out)
    with pytest.raises(ValueError, match="sum to out_features"):
        LoraPool(1, 8, 9, 4, parts=(4, 4))


@pytest.mark.parametrize("into", [64, 128])
@pytest.mark.parametrize("rank", [1, 2, 3, 8])
def test_exact_runs_have_the_same_bits_alone_and_among_others(into, rank):
    generator = torch.Generator().manual_seed(rank)
    pool = LoraPool(3, into, 64, 8)
    for slot in range(3):
        a, b = torch.randn(rank, into, generator=generator), torch.randn(64, rank, generator=generator)
        pool.write(slot, a, b, 1.0)
    for count in (1, 2, 5, 16, 17, 40):
        x = torch.randn(count + 171, into, generator=generator)
        alone = lora_delta(x[:count], pool, Segments.build([(1, count)], "cpu", exact=True), torch.zeros(count, 64))
        for before, after in ((1, 0), (2, 40), (128, 3)):
            rows = torch.cat([x[-before:], x[:count], x[count : count + after]])
            runs = [(0, before), (1, count), (2, after)]
            among = lora_delta(rows, pool, Segments.build(runs, "cpu", exact=True), torch.zeros(len(rows), 64))
            assert torch.equal(among[before : before + count], alone), (count, before, after)
