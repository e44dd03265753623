"""The vocabulary projection: all scores where sampling needs them, the greedy token alone for much less.

With a vocabulary of 262k this product is more than half of a small model's decode step. `ScreenedHead` multiplies in
int8 first, knows the standard deviation of that product's rounding error, and computes in fp32 only the tokens
within eight of them of the best: the result is the argmax of the fp32 product, which bf16 would round away.
Smoothing after SmoothQuant (Xiao et al. 2023).
"""

import time
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from .linears import Frozen

_CHUNK = 65536  # vocabulary rows a product: its scores stay in the last-level cache until they are reduced
_BLOCK = 64  # tokens that are ruled out together
_DEVIATIONS = 8.0
_MOST = 512  # pairs a row worth checking one by one


class Scores(Protocol):
    """The scores of a step's sampled rows."""

    def greedy(self, rows: list[int]) -> list[int]:
        """The best token of each of `rows`; the first of equals."""

    def logits(self, rows: list[int]) -> Tensor:
        """fp32 scores [len(rows), vocab]."""


class FullScores:
    """Scores that are computed already: `logits` [rows, vocab]."""

    def __init__(self, logits: Tensor) -> None:
        self._logits = logits

    def greedy(self, rows: list[int]) -> list[int]:
        """See `Scores`."""
        return [int(t) for t in argmax(self._logits[rows]).tolist()]

    def logits(self, rows: list[int]) -> Tensor:
        """See `Scores`."""
        return self._logits[rows].float()


class ScreenedScores:
    """Scores that are computed when they are asked for, from `hidden` [rows, width]."""

    def __init__(self, hidden: Tensor, screen: "ScreenedHead", full: Frozen) -> None:
        self._hidden, self._screen, self._full = hidden, screen, full

    def greedy(self, rows: list[int]) -> list[int]:
        """See `Scores`."""
        tokens = self._screen.greedy(self._hidden[rows])
        if tokens is None:
            tokens = argmax(self._full(self._hidden[rows]))
        return [int(t) for t in tokens.tolist()]

    def logits(self, rows: list[int]) -> Tensor:
        """See `Scores`."""
        return torch.as_tensor(self._full(self._hidden[rows])).float()


def argmax(logits: Tensor) -> Tensor:
    """Argmax [rows] of `logits` [rows, vocab], the first of equals; in two levels, which a wide row makes faster."""
    rows, size = logits.shape
    width = 512
    if size % width:
        return logits.argmax(-1)
    blocks = logits.view(rows, size // width, width)
    best = blocks.amax(-1).argmax(-1)
    inside = blocks[torch.arange(rows, device=logits.device), best].argmax(-1)
    return best * width + inside


class ScreenedHead:
    """Greedy tokens of `hidden @ weight.T` by an int8 screen and an fp32 check of what it cannot rule out."""

    def __init__(self, weight: Tensor, sample: Tensor) -> None:
        """`weight` [vocab, width]; `sample` [rows, width]: hidden states typical enough to balance dimensions by."""
        self.weight = weight
        spread = sample.float().abs().amax(0).clamp_min(1e-6).sqrt()
        # Divides activations and multiplies weights: both are then rounded with about equal harm.
        self.smooth = spread / weight.float().abs().amax(0).clamp_min(1e-6).sqrt()
        self.chunks = []
        for begin in range(0, len(weight), _CHUNK):
            scaled = weight[begin : begin + _CHUNK].float() * self.smooth
            scale = scaled.abs().amax(1).clamp_min(1e-12) / 127
            rounded = (scaled / scale[:, None]).round_()
            kept = rounded * scale[:, None]
            packed = torch.ops.onednn.qlinear_prepack(rounded.to(torch.int8), [32, weight.shape[1]])
            lost = _by_block((scaled - kept).square_().sum(1))
            self.chunks.append(
                (packed, scale, torch.zeros(len(scale), dtype=torch.int64), _by_block(kept.square().sum(1)), lost)
            )

    def greedy(self, hidden: Tensor) -> Tensor | None:
        """Argmax int64 [rows] for `hidden` [rows, width], the first of equals; None if the screen lets too much by."""
        hidden = hidden.float()
        x = hidden / self.smooth
        x /= x.abs().amax(1, keepdim=True).clamp_min_(1e-12) / 127
        q = x.round()
        unit = _DEVIATIONS**2 / x.shape[1]
        missing = (x - q).square_().sum(1, keepdim=True) * unit
        length = x.square().sum(1, keepdim=True) * unit
        q = (q + 128).to(torch.uint8)
        screened = []
        for packed, scale, zero, kept, lost in self.chunks:
            scores = torch.ops.onednn.qlinear_pointwise(
                q, 1.0, 128, packed, scale, zero, None, 1.0, 0, torch.float32, "none", [], ""
            ).unflatten(1, (-1, _BLOCK))
            margin = torch.addmm(length @ lost[None], missing, kept[None]).sqrt_()
            screened.append((scores, scores.amax(2), margin))
        certain = torch.stack([(best - margin).amax(1) for _, best, margin in screened]).amax(0)
        rows, tokens = self._candidates(screened, certain)
        if len(rows) > _MOST * len(hidden):
            return None
        exact = (hidden[rows] * self.weight[tokens].float()).sum(1)
        best = torch.full_like(certain, float("-inf")).scatter_reduce(0, rows, exact, "amax")
        first = torch.where(exact == best[rows], tokens, len(self.weight))
        return torch.full_like(best, len(self.weight), dtype=torch.int64).scatter_reduce(0, rows, first, "amin")

    @staticmethod
    def _candidates(screened: list[tuple[Tensor, Tensor, Tensor]], certain: Tensor) -> tuple[Tensor, Tensor]:
        """(row, token) pairs, int64 [pairs] each, whose score could reach what its row has for certain."""
        rows, tokens = [], []
        for n, (scores, best, margin) in enumerate(screened):
            row, block = ((best + margin) >= certain[:, None]).nonzero(as_tuple=True)
            needed = certain[row] - margin[row, block]
            pair, inside = (scores[row, block] >= needed[:, None]).nonzero(as_tuple=True)
            rows.append(row[pair])
            tokens.append(n * _CHUNK + block[pair] * _BLOCK + inside)
        return torch.cat(rows), torch.cat(tokens)


def screened_head(weight: Tensor, sample: Tensor, full: Frozen, rows: int) -> ScreenedHead | None:
    """A screen for this head if this CPU multiplies int8 exactly and that is faster at `rows` rows; else None."""
    if weight.device.type != "cpu" or len(weight) % _BLOCK or not torch.cpu._is_vnni_supported():
        return None
    screen = ScreenedHead(weight, sample)
    x = sample.repeat(-(-rows // len(sample)), 1)[:rows]
    tokens = screen.greedy(x)
    best = (x.float() @ weight.float().T).amax(1)
    if tokens is None or not torch.allclose((x.float() * weight[tokens].float()).sum(1), best, rtol=1e-5, atol=1e-5):
        return None
    reduced = x.to(full.dtype)
    return screen if _faster(lambda: screen.greedy(x), lambda: argmax(full(reduced))) else None


def _by_block(per_token: Tensor) -> Tensor:
    return per_token.view(-1, _BLOCK).amax(1)


def _faster(call: Callable[[], object], other: Callable[[], object]) -> bool:
    """Whether `call` takes less time than `other`: the best of interleaved runs, as another process may interfere."""
    best = [float("inf")] * 2
    for _ in range(5):
        for n, run in enumerate((call, other)):
            begin = time.perf_counter()
            run()
            best[n] = min(best[n], time.perf_counter() - begin)
    return best[0] < best[1]
