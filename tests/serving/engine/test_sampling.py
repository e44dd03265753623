"""Sampling: the distributions the parameters promise, from counters, each row on its own."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from riverdelta.core.errors import BadInput
from riverdelta.kernels import native
from riverdelta.serving.engine import SamplingParams
from riverdelta.serving.engine.head import ChunkedHead, FullScores, TiledHead, argmax
from riverdelta.serving.engine.sampling import RowSampler, choose, uniform

LOGITS = torch.randn(1500, generator=torch.Generator().manual_seed(3)) * 3


def draw(logits, count=400, **params):
    sampler = RowSampler(SamplingParams(**params), 11, [0], len(logits), "cpu")
    return [sampler.choose(logits, n).token for n in range(count)]


def test_greedy_takes_the_first_of_equals_at_any_width():
    for width in (5, 512, 1536):
        logits = torch.randint(0, 3, (7, width)).float()
        assert argmax(logits).tolist() == [row.index(max(row)) for row in logits.tolist()]


def test_frequencies_follow_the_softmax():
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    seen = torch.bincount(torch.tensor(draw(logits, 20000)), minlength=4) / 20000
    assert torch.allclose(seen, logits.softmax(0), atol=0.02)


@pytest.mark.parametrize("size", [1500, 40])
@pytest.mark.parametrize("params", [{"top_k": 5}, {"top_p": 0.6}, {"min_p": 0.2}, {"top_k": 30, "top_p": 0.7}])
def test_filters_keep_what_they_say(size, params):
    logits = LOGITS[:size]
    p = logits.softmax(0)
    order = p.argsort(descending=True)
    if "top_k" in params:
        order = order[: params["top_k"]]
    kept = p[order] / p[order].sum()
    if "top_p" in params:
        order = order[: int((kept.cumsum(0) - kept < params["top_p"]).sum())]
    if "min_p" in params:
        order = order[p[order] >= params["min_p"] * p[order[0]]]
    drawn = set(draw(logits, 2000, **params))
    assert drawn <= set(order.tolist())
    assert order[0].item() in drawn


def test_a_flat_distribution_needs_more_candidates_than_the_first():
    flat = torch.zeros(4000)
    tokens = draw(flat, 300, top_p=0.9)
    assert max(tokens) > 1024


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**64 - 1), st.integers(0, 100), st.integers(0, 5))
def test_a_draw_depends_on_seed_and_position_alone(seed, position, mates):
    def sampler(s):
        return RowSampler(SamplingParams(temperature=0.8, top_p=0.95), s, [1], 1500, "cpu")

    alone = choose(FullScores(LOGITS[None]), [sampler(seed)], [position])[0]
    batch = torch.cat([torch.randn(mates, 1500), LOGITS[None]])
    mixed = choose(FullScores(batch), [sampler(n) for n in range(mates)] + [sampler(seed)], [0] * mates + [position])[
        -1
    ]
    assert alone == mixed
    assert 0 <= uniform(seed, position) < 1


def test_penalties_bias_and_logprobs():
    logits = torch.tensor([2.0, 1.9, 0.5, -3.0])

    def first(prompt=(3,), accept=(), **params):
        sampler = RowSampler(SamplingParams(temperature=0, **params), 0, prompt, 4, "cpu")
        for token in accept:
            sampler.accept(token)
        return sampler.choose(logits, 0)

    assert first().token == 0
    assert first(accept=[0], presence_penalty=0.5).token == 1
    assert first(accept=[0, 1, 1], frequency_penalty=0.05).token == 0
    assert first(accept=[0, 0, 0, 1], frequency_penalty=0.1).token == 1
    assert first(prompt=[0], repetition_penalty=1.5).token == 1
    assert first(prompt=[3], repetition_penalty=1.5).token == 0
    assert first(logit_bias={2: 10.0}).token == 2
    choice = first(logit_bias={2: 10.0}, logprobs=2)
    assert math.isclose(choice.logprob, logits.log_softmax(0)[2].item(), abs_tol=1e-6)
    assert [t for t, _ in choice.top] == [0, 1]


@pytest.mark.parametrize(
    "bad",
    [
        {"max_tokens": 0},
        {"temperature": -1},
        {"temperature": float("nan")},
        {"top_p": 0},
        {"min_p": 2},
        {"stop": ("",)},
        {"logit_bias": {9: 1.0}},
        {"logprobs": 50},
        {"repetition_penalty": 0},
        {"seed": 2**70},
    ],
)
def test_bad_parameters_are_named(bad):
    with pytest.raises(BadInput, match=next(iter(bad))):
        SamplingParams(**bad).check(9)


SCREENS = [
    pytest.param(
        ChunkedHead, marks=pytest.mark.skipif(not torch.cpu._is_vnni_supported(), reason="int8 is exact with VNNI only")
    ),
    pytest.param(TiledHead, marks=pytest.mark.skipif(native.products() != "tiles", reason="no AMX, or no C compiler")),
]


@pytest.mark.parametrize("screen", SCREENS)
@pytest.mark.parametrize("spread", [0.0, 1.5])
def test_a_screened_head_finds_the_exact_argmax(screen, spread):
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(4096, 128, generator=generator)
    weight[777] = weight[123]  # a tie: the first wins
    hidden = torch.randn(70, 128, generator=generator) * torch.exp(spread * torch.randn(128, generator=generator))
    hidden[:8] = weight[123] * 2 + hidden[:8] * 0.1
    head = screen(weight, hidden[::2])
    exact = (hidden.double() @ weight.double().T).argmax(1)
    assert exact[:8].tolist() == [123] * 8
    assert torch.equal(head.greedy(hidden), exact)
    assert torch.equal(head.greedy(hidden[5:6]), exact[5:6])


@pytest.mark.parametrize("screen", SCREENS)
@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    width=st.sampled_from([64, 192, 640]),
    outliers=st.floats(0, 4),
    close=st.floats(1e-6, 1e-1),
    typical=st.booleans(),
)
def test_no_head_makes_a_screen_choose_another_token(screen, seed, width, outliers, close, typical):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(4096, width, generator=generator) * torch.exp(
        outliers * torch.randn(4096, width, generator=generator)
    )
    weight[:16] *= torch.logspace(-12, 6, 16)[:, None]
    hidden = torch.randn(5, width, generator=generator) * torch.exp(outliers * torch.randn(width, generator=generator))
    best = (hidden.double() @ weight.double().T).argmax(1)
    for token in best.tolist():  # rivals that int8 cannot tell from the best
        rivals = torch.randint(0, 4096, (40,), generator=generator)
        noise = torch.randn(40, width, generator=generator) * close
        weight[rivals] = weight[token] * (1 + noise)
    scores = hidden.double() @ weight.double().T
    rounding = hidden.double().abs() @ weight.double().abs().T * width * 2.0**-24
    found = screen(weight, hidden if typical else torch.randn(3, width)).greedy(hidden)
    if found is not None:
        rows = torch.arange(5)
        assert (scores[rows, found] >= (scores - rounding).amax(1) - rounding[rows, found]).all()


@pytest.mark.parametrize("screen", SCREENS)
def test_a_screen_gives_up_where_all_tokens_are_alike_or_a_row_is_no_number(screen):
    head = screen(torch.ones(4096, 64), torch.ones(4, 64))
    assert head.greedy(torch.ones(3, 64)) is None
    head = screen(torch.eye(64).repeat(64, 1), torch.ones(4, 64))
    hidden = torch.eye(64)[:3]
    hidden[1, 7] = float("nan")
    assert head.greedy(hidden) is None


@pytest.mark.parametrize(
    "extreme",
    [
        {"temperature": 1e-300},
        {"temperature": 1e-300, "repetition_penalty": 1e-300},
        {"temperature": 1.0, "top_p": 1e-300},
    ],
)
def test_extreme_parameters_choose_a_token(extreme):
    assert all(0 <= token < len(LOGITS) for token in draw(LOGITS, 20, **extreme))
