"""Choosing tokens from logits: a row's choice is a function of its logits, parameters, seed and position alone."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .grammar import Constraint
from .head import Scores, argmax
from .request import SamplingParams

# Filters look at this many candidates first: sorting a row of 262k costs more than a decode step.
_CANDIDATES = 1024

_HIGHEST, _COLDEST = 1e37, 1e-6


@dataclass(frozen=True, slots=True)
class Choice:
    """One row's token, with its log-probability and those of the likeliest tokens where they were asked for."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class RowSampler:
    """One sequence's sampling state: its seed, bias, and the counts that its penalties need."""

    def __init__(
        self,
        params: SamplingParams,
        seed: int,
        prompt: Iterable[int],
        vocab_size: int,
        device: str,
        constraint: Constraint | None = None,
    ) -> None:
        self.params = params
        self.seed = seed
        self.constraint = constraint
        self._bias: tuple[Tensor, Tensor] | None = None
        if params.logit_bias:
            self._bias = (
                torch.tensor(list(params.logit_bias), device=device),
                torch.tensor(list(params.logit_bias.values()), device=device),
            )
        self._penalised = bool(params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1.0)
        # By token, made when the first one is chosen: what waits in the queue must cost little.
        self._counts: Tensor | None = None
        self._seen: Tensor | None = None
        self._prompt = list(prompt) if self._penalised else []
        self._vocab_size, self._device = vocab_size, device
        self.plain = params.temperature == 0.0 and params.logprobs is None and not self._changes_logits

    @property
    def _changes_logits(self) -> bool:
        return self._bias is not None or self._penalised or self.constraint is not None

    @torch.inference_mode()
    def accept(self, token: int) -> None:
        """`token` was chosen; later penalties and the grammar count it."""
        if self.constraint is not None:
            self.constraint.accept(token)
        if self._penalised:
            counts, seen = self._history()
            counts[token] += 1.0
            seen[token] = True

    def choose(self, logits: Tensor, position: int) -> Choice:
        """From fp32 `logits` [vocab], for the token at `position` of the answer."""
        scores = self._adjust(logits.clone()) if self._changes_logits else logits
        if self.params.temperature == 0.0:
            token = int(argmax(scores[None])[0])
        else:
            # Extreme parameters must not make scores that are no numbers.
            scores = scores.nan_to_num(0.0, _HIGHEST, float("-inf"))
            scores = (scores - scores.max()) / max(self.params.temperature, _COLDEST)
            token = self._draw(scores, uniform(self.seed, position))
        if self.params.logprobs is None:
            return Choice(token)
        logprobs = logits.log_softmax(-1)
        best = logprobs.topk(self.params.logprobs) if self.params.logprobs else None
        top = () if best is None else tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
        return Choice(token, float(logprobs[token]), top)

    def _adjust(self, scores: Tensor) -> Tensor:
        p = self.params
        if self._penalised:
            counts, seen = self._history()
            penalised = torch.where(scores > 0, scores / p.repetition_penalty, scores * p.repetition_penalty)
            scores = torch.where(seen, penalised, scores)
            scores -= p.frequency_penalty * counts + p.presence_penalty * (counts > 0)
        if self._bias is not None:
            scores[self._bias[0]] += self._bias[1]
        return scores if self.constraint is None else self.constraint.forbid(scores)

    def _history(self) -> tuple[Tensor, Tensor]:
        """[vocab] each: how often a token was chosen, and whether it was chosen or prompted."""
        if self._counts is None or self._seen is None:
            self._counts = torch.zeros(self._vocab_size, device=self._device)
            self._seen = torch.zeros(self._vocab_size, dtype=torch.bool, device=self._device)
            self._seen[torch.tensor(self._prompt, device=self._device)] = True
        return self._counts, self._seen

    def _draw(self, scores: Tensor, u: float) -> int:
        """Temperature, then top_k, top_p of what is left, then min_p: the order of transformers' processors."""
        p = self.params
        if p.top_k <= 0 and p.top_p >= 1.0 and p.min_p <= 0.0:
            return _pick(scores.softmax(-1, dtype=torch.float32), u)
        size = scores.shape[0]
        top_k = p.top_k if 0 < p.top_k < size else size
        count = min(size, max(_CANDIDATES, top_k if top_k < size else 0))
        kept = self._filter(scores, count, top_k)
        if kept is None:
            kept = self._filter(scores, size, top_k)
            assert kept is not None
        probabilities, tokens = kept
        return int(tokens[_pick(probabilities, u)])

    def _filter(self, scores: Tensor, count: int, top_k: int) -> tuple[Tensor, Tensor] | None:
        """The surviving tokens, likeliest first; None when `count` candidates are too few to tell."""
        p = self.params
        best = scores.topk(count)
        values, tokens = best.values[:top_k], best.indices[:top_k]
        total = scores.logsumexp(-1) if top_k == scores.shape[0] else values.logsumexp(-1)
        probabilities = (values - total).exp()
        before = probabilities.cumsum(-1) - probabilities
        keep = (before < p.top_p) & (probabilities >= p.min_p * probabilities[0])
        keep[0] = True  # whatever the filters round to
        if bool(keep[-1]) and count < min(top_k, scores.shape[0]):
            return None
        return probabilities[keep], tokens[keep]


def choose(scores: Scores, samplers: Sequence[RowSampler], positions: Sequence[int]) -> list[Choice]:
    """One choice a row of `scores`; `positions`: each token's index in its answer."""
    plain = [n for n, s in enumerate(samplers) if s.plain]
    other = [n for n, s in enumerate(samplers) if not s.plain]
    choices: dict[int, Choice] = {}
    if plain:
        choices.update(zip(plain, map(Choice, scores.greedy(plain)), strict=True))
    if other:
        logits = scores.logits(other)
        choices.update((n, samplers[n].choose(logits[i], positions[n])) for i, n in enumerate(other))
    return [choices[n] for n in range(len(samplers))]


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that is a function of `seed` and `position`: drawing from a counter, not a generator."""
    digest = hashlib.sha256(f"{seed}:{position}".encode()).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53


def _pick(probabilities: Tensor, u: float) -> int:
    """Inverse transform sampling over unnormalised `probabilities` [n]."""
    total = probabilities.cumsum(-1, dtype=torch.float64)
    index = int(torch.searchsorted(total, total[-1:] * u, right=True))
    return index if index < len(total) else int(torch.searchsorted(total, total[-1:]))
