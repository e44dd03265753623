"""grouped_lora: gradients, and bits that do not depend on the other groups."""

from __future__ import annotations

import hashlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from riverdelta.kernels.training import Group, grouped_lora, grouped_lora_backward

SCALES = [2.0, 0.5, 1.0, 0.7071]


def _groups(runs, ranks, in_features, out_features, dtype=torch.float32):
    """Each group from a seed of its own, so that a group's data does not depend on the others."""
    groups = []
    for i, (rows, rank) in enumerate(zip(runs, ranks, strict=True)):
        random = torch.Generator().manual_seed(i)
        shapes = [(rows, in_features), (rank, in_features), (out_features, rank), (rows, out_features)]
        groups.append([torch.randn(*shape, generator=random).to(dtype) for shape in shapes])
    return groups


def _compute(groups, which, wants_x=True):
    """Output and gradients (x's, and A's and B's of each) of the groups `which` in one call, in that order."""
    x, slope = (torch.cat([groups[i][at] for i in which]) for at in (0, 3))
    taken = [Group(groups[i][1], groups[i][2], SCALES[i % 4], len(groups[i][0])) for i in which]
    out, slope_x = torch.zeros_like(slope), torch.zeros_like(x) if wants_x else None
    slopes = [(torch.zeros_like(group.a), torch.zeros_like(group.b)) for group in taken]
    hidden = grouped_lora(x, taken, out)
    grouped_lora_backward(x, taken, hidden, slope, slopes, slope_x)
    return out, slope_x, slopes


def _digests(groups, which):
    """SHA-256 of every group's output and gradients when the groups `which` are computed in one call, in that order."""
    out, slope_x, slopes = _compute(groups, which)
    runs = [len(groups[i][0]) for i in which]
    rows = zip(torch.split(out, runs), torch.split(slope_x, runs), strict=True)
    return {
        i: [hashlib.sha256(t.contiguous().numpy().tobytes()).hexdigest() for t in (y, dx, *slopes[at])]
        for at, (i, (y, dx)) in enumerate(zip(which, rows, strict=True))
    }


@pytest.mark.parametrize("widths", [(6, 5), (64, 128)])
def test_gradients_match_autograd_in_float64(widths):
    groups = _groups([3, 1, 5], [2, 4, 1], *widths, torch.float64)
    out, slope_x, slopes = _compute(groups, range(3))
    leaves = [[t.clone().requires_grad_() for t in group[:3]] for group in groups]
    wanted = torch.cat([s * (x @ a.T) @ b.T for s, (x, a, b) in zip(SCALES, leaves, strict=False)])
    wanted.backward(torch.cat([group[3] for group in groups]))
    torch.testing.assert_close(out, wanted.detach())
    torch.testing.assert_close(slope_x, torch.cat([x.grad for x, _, _ in leaves]))
    for (slope_a, slope_b), (_, a, b) in zip(slopes, leaves, strict=True):
        torch.testing.assert_close(slope_a, a.grad)
        torch.testing.assert_close(slope_b, b.grad)


def test_they_add_to_what_is_there():
    groups = _groups([3], [2], 64, 64)
    x, a, b, slope = groups[0]
    taken = [Group(a, b, 2.0, 3)]
    once, (_, slope_x, slopes) = torch.zeros(3, 64), _compute(groups, [0])
    grouped_lora(x, taken, once)
    out, twice_x, twice = once.clone(), slope_x.clone(), [tuple(t.clone() for t in pair) for pair in slopes]
    hidden = grouped_lora(x, taken, out)
    grouped_lora_backward(x, taken, hidden, slope, twice, twice_x)
    torch.testing.assert_close(out, 2 * once)
    torch.testing.assert_close(twice_x, 2 * slope_x)
    torch.testing.assert_close(twice[0], tuple(2 * t for t in slopes[0]))


@settings(max_examples=25, deadline=None)
@given(
    runs=st.lists(st.integers(1, 33), min_size=1, max_size=4),
    ranks=st.lists(st.sampled_from([1, 3, 8, 16]), min_size=4, max_size=4),
    widths=st.sampled_from([(64, 48), (100, 36), (640, 1024)]),
)
def test_a_groups_bits_do_not_depend_on_the_others(runs, ranks, widths):
    groups = _groups(runs, ranks[: len(runs)], *widths)
    order = list(range(len(runs)))
    together = _digests(groups, order)
    assert _digests(groups, order[::-1]) == together
    for i in order:
        assert _digests(groups, [i])[i] == together[i]


def test_an_unwanted_gradient_is_not_computed():
    groups = _groups([2, 3], [4, 4], 8, 8)
    (_, slope_x, slopes), (_, _, wanted) = _compute(groups, [0, 1], wants_x=False), _compute(groups, [0, 1])
    assert slope_x is None
    torch.testing.assert_close(slopes, wanted)


def test_groups_that_do_not_add_up_are_refused():
    (g,) = _groups([2], [4], 8, 8)
    with pytest.raises(ValueError, match="the groups have 3 rows, but x has 2"):
        grouped_lora(g[0], [Group(g[1], g[2], 1.0, 3)], torch.zeros(2, 8))
