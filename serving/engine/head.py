"""The vocabulary projection: all scores where sampling needs them, the greedy token alone for much less.

With a vocabulary of 262k this product is more than half of a small model's decode step. A screened head multiplies in
int8 first, knows a bound of that product's rounding error (Cauchy-Schwarz), and computes in fp32 only the tokens
that could be the best: the result is the argmax of the fp32 product, which bf16 would round away.
Smoothing after SmoothQuant (Xiao et al. 2023).
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from riverdelta.kernels import native
from riverdelta.kernels.cpu_timing import cpu_seconds

from .linears import Frozen

_CHUNK = 65536  # vocabulary rows a product: its scores stay in the last-level cache until they are reduced
_BLOCK = 64  # tokens that are ruled out together
_RUNS = 5  # of the screen and of all scores, to see which is faster
_MOST, _MOST_GROUPS = 512, 128  # a row's tokens, or groups of 16, that are worth checking


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


class Rounded(NamedTuple):
    """Rows of a head in int8: row by row `values` times `scale`, the length that this `lost`, and the one it `kept`."""

    values: Tensor
    scale: Tensor
    lost: Tensor
    kept: Tensor


def _smoothing(weight: Tensor, sample: Tensor) -> Tensor:
    """What divides activations like `sample` and multiplies weights so that rounding does both little harm."""
    spread = sample.float().abs().amax(0).clamp_min(1e-6) ** 0.3
    return spread / weight.float().abs().amax(0).clamp_min(1e-6) ** 0.7


def _rounded(weight: Tensor, smooth: Tensor) -> Rounded:
    scaled = weight.float() * smooth
    scale = scaled.abs().amax(1).clamp_min(1e-12) / 127
    values = (scaled / scale[:, None]).round_()
    kept = values * scale[:, None]
    length = scaled.norm(dim=1)
    # A sum in fp32 is off by less than its length times the share of length that its roundings are.
    share = (weight.shape[1] + 64) * 2.0**-22
    return Rounded(values.to(torch.int8), scale, (scaled - kept).norm(dim=1) + length * share, kept.norm(dim=1))


class ScreenedHead(Protocol):
    """Greedy tokens of `hidden @ weight.T` by an int8 screen and an fp32 check of what it cannot rule out."""

    def greedy(self, hidden: Tensor) -> Tensor | None:
        """Argmax int64 [rows] for `hidden` [rows, width], the first of equals; None if the screen lets too much by."""


class TiledHead:
    """The screen for a CPU that multiplies by tiles: nothing of it but the candidates is ever in memory."""

    def __init__(self, weight: Tensor, sample: Tensor) -> None:
        """`weight` fp32 [vocab, width]; `sample` [rows, width]: typical hidden states, to balance dimensions by."""
        self.weight = weight
        self.smooth = _smoothing(weight, sample)
        # Activations are rounded to 127 * 128 units of their largest: that loses at most this share of their length.
        share = weight.shape[1] ** 0.5 / (2 * 127 * 128)
        parts = [_rounded(rows, self.smooth) for rows in torch.split(weight, _CHUNK)]
        self.packed = torch.cat([native.pack_bytes(part.values) for part in parts])
        self.scale = torch.cat([part.scale for part in parts])
        self.lost = torch.cat([part.lost + part.kept * share for part in parts])

    def greedy(self, hidden: Tensor) -> Tensor | None:
        """See `ScreenedHead`."""
        found = []
        for rows in torch.split(hidden.float(), native.SCREEN_ROWS):
            tokens = native.screen(
                rows.contiguous(), self.smooth, self.packed, self.scale, self.lost, self.weight, _MOST_GROUPS
            )
            if tokens is None:
                return None
            found.append(tokens)
        return found[0] if len(found) == 1 else torch.cat(found)


class ChunkedHead:
    """The screen by PyTorch's int8 products, a chunk of the vocabulary at a time."""

    def __init__(self, weight: Tensor, sample: Tensor) -> None:
        """As `TiledHead`, whatever the weight's dtype."""
        self.weight = weight
        self.smooth = _smoothing(weight, sample)
        self.chunks = []
        for rows in torch.split(weight, _CHUNK):
            values, scale, lost, kept = _rounded(rows, self.smooth)
            packed = torch.ops.onednn.qlinear_prepack(values, [32, weight.shape[1]])
            zero = torch.zeros(len(scale), dtype=torch.int64)
            self.chunks.append((packed, scale, zero, _by_block(kept), _by_block(lost)))

    def greedy(self, hidden: Tensor) -> Tensor | None:
        """See `ScreenedHead`."""
        hidden = hidden.float()
        x = hidden / self.smooth
        x /= x.abs().amax(1, keepdim=True).clamp_min_(1e-12) / 127
        q = x.round()
        missing, length = (x - q).norm(dim=1, keepdim=True), x.norm(dim=1, keepdim=True)
        q = (q + 128).to(torch.uint8)
        screened = []
        for packed, scale, zero, kept, lost in self.chunks:
            scores = torch.ops.onednn.qlinear_pointwise(
                q, 1.0, 128, packed, scale, zero, None, 1.0, 0, torch.float32, "none", [], ""
            ).unflatten(1, (-1, _BLOCK))
            screened.append((scores, scores.amax(2), torch.addmm(length @ lost[None], missing, kept[None])))
        certain = torch.stack([(best - margin).amax(1) for _, best, margin in screened]).amax(0)
        rows, tokens = self._candidates(screened, certain)
        if len(rows) > _MOST * len(hidden) or len(set(rows.tolist())) < len(hidden):
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
    tiled = weight.dtype == torch.float32 and native.fits_screen(*weight.shape)
    screen = TiledHead(weight, sample) if tiled else ChunkedHead(weight, sample)
    x = sample.repeat(-(-rows // len(sample)), 1)[:rows]
    tokens = screen.greedy(x)
    best = (x.float() @ weight.float().T).amax(1)
    if tokens is None or not torch.allclose((x.float() * weight[tokens].float()).sum(1), best, rtol=1e-5, atol=1e-5):
        return None
    reduced = x.to(full.dtype)
    screening, scoring = cpu_seconds([lambda: screen.greedy(x), lambda: argmax(full(reduced))], _RUNS, 0.0)
    return screen if screening < scoring else None


def _by_block(per_token: Tensor) -> Tensor:
    return per_token.view(-1, _BLOCK).amax(1)
