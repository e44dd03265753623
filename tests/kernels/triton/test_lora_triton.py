"""lora_delta's Triton kernels against float64, and the bits they promise."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from riverdelta.kernels import Segments, lora_delta, lora_triton
from riverdelta.kernels.plans import default_plan

CUDA = torch.cuda.is_available()
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if CUDA else [])]
RAGGED = [(-1, 2), (0, 2), (1, 17), (2, 1), (0, 1), (-1, 1)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("padding", [0, 16])
def test_ragged_runs_match_float64(make_case, device, dtype, padding):
    case = make_case([(8,), (16,), (5,)], RAGGED, dtype=dtype, padding=padding, device=device)
    case.check(lora_delta(case.x, case.pool, case.segments(capacity=7), case.out.clone()))


@pytest.mark.parametrize("rank", [1, 16, 33, 64, 200, 256])
def test_ranks(make_case, device, rank):
    case = make_case([(rank,), (3,)], [(0, 2), (1, 1)], max_rank=256, device=device)
    case.check(lora_delta(case.x, case.pool, case.segments(), case.out.clone()))


@pytest.mark.parametrize("in_features", [16, 100, 640])
@pytest.mark.parametrize("fused", [False, True])
def test_widths_and_merged_parts(make_case, device, in_features, fused):
    ranks = [(8, 8, 8), (4, 16, 1), (0, 3, 0), (0, 0, 0)]
    runs = [(0, 1), (1, 2), (2, 1), (3, 2)]
    case = make_case(ranks, runs, in_features=in_features, parts=(70, 24, 16), device=device)
    plan = replace(default_plan(in_features, (70, 24, 16), 16), fused=fused)
    out = case.out.clone()
    lora_triton.delta(case.x, case.pool, case.segments(), out, plan)
    case.check(out)


@pytest.mark.parametrize("dtype", DTYPES)
def test_fused_and_split_agree_in_every_bit(make_case, device, dtype):
    case = make_case([(8, 16), (16, 1)], [(0, 3), (1, 1)], parts=(48, 32), dtype=dtype, device=device)
    base = default_plan(96, (48, 32), 16)
    variants = [
        base,
        replace(base, fused=True),
        replace(base, shrink_rank=16, block_n=16, shrink_warps=2, expand_warps=8),
        replace(base, stages=1, block_n=64),
    ]
    results = []
    for plan in variants:
        results.append(case.out.clone())
        lora_triton.delta(case.x, case.pool, case.segments(), results[-1], plan)
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_rows_bits_do_not_depend_on_its_batch_mates(make_case, device, dtype):
    runs = [(2, 3), (-1, 1), (0, 20), (1, 1), (2, 2)]
    case = make_case([(4,), (16,), (9,)], runs, dtype=dtype, device=device)
    together = lora_delta(case.x, case.pool, case.segments(capacity=9), case.out.clone())
    row = 0
    for slot, rows in runs:
        for i in range(row, row + rows):
            alone = case.out[i : i + 1].clone()
            lora_delta(case.x[i : i + 1], case.pool, Segments.build([(slot, 1)], device), alone)
            assert torch.equal(alone[0], together[i])
        row += rows


def test_rows_without_adapter_and_slack_keep_their_bits(make_case, device):
    case = make_case([(8,)], [(-1, 1), (0, 2), (-1, 1)], padding=16, device=device)
    whole = case.out.clone()
    case.out[0], case.out[3] = float("nan"), float("inf")
    padded = torch.full((4, 128), float("nan"), device=device)
    out = padded[:, 16:96]
    out.copy_(case.out)
    lora_delta(case.x, case.pool, case.segments(), out)
    assert padded[:, :16].isnan().all()
    assert padded[:, 96:].isnan().all()
    assert out[0].isnan().all()
    assert out[3].isposinf().all()
    case.out.copy_(whole)
    out[0], out[3] = whole[0], whole[3]
    case.check(out)


def test_segments_updated_in_place(make_case, device):
    case = make_case([(8,), (16,)], [(0, 2), (1, 2)], device=device)
    segments = case.segments(capacity=4)
    case.runs = [(1, 1), (-1, 2), (0, 1)]
    segments.update(case.runs)
    case.check(lora_delta(case.x, case.pool, segments, case.out.clone()))


@pytest.mark.skipif(not CUDA, reason="CUDA graphs need a GPU")
def test_a_captured_graph_serves_other_adapters(make_case, device):
    case = make_case([(8,), (16,), (3,)], [(0, 2), (1, 2)], device=device, dtype=torch.bfloat16)
    segments = case.segments(capacity=4)
    out = case.out.clone()
    lora_delta(case.x, case.pool, segments, out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        lora_delta(case.x, case.pool, segments, out)
    for runs in ([(2, 1), (-1, 2), (0, 1)], [(1, 4)], [(0, 1), (1, 1), (2, 1), (0, 1)]):
        case.runs = runs
        segments.update(runs)
        out.copy_(case.out)
        graph.replay()
        torch.cuda.synchronize()
        case.check(out)
