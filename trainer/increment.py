"""An increment: parent version + segment + recipe -> candidate, as a pure function.

No clock, no random state of the process, nothing of other adapters: `train` alone and `step` with many adapters in one
step compute the same bits, because alone is a step of one.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from riverdelta.core.errors import RiverdeltaError
from riverdelta.core.recipe import Recipe
from riverdelta.core.template import example_ids
from riverdelta.registry.ledger import Hand

from .adapter import AdapterWeights
from .base import Base, Member
from .drift import Usual, budgeted
from .layout import Batch, Row, arrange, bucket, plan
from .optimiser import AdamW
from .scoring import tiles

Progress = Callable[[int, int, float], None]


@dataclass(frozen=True)
class Inputs:
    """All that shapes an increment: `entries` are the segment's contents in index order (`events.content_of`),
    `earlier` those of all segments that the parent and its ancestors learned, in the order in which they did, None for
    tombstones; `usual` is what those segments were. An adapter that begins has no parent's files."""

    recipe: Recipe
    seed: int
    entries: Sequence[bytes | None]
    earlier: Sequence[bytes | None] = ()
    weights: bytes | None = None
    state: bytes | None = None
    usual: Sequence[Usual] = ()
    hand: Hand = Hand.NONE


class Untrainable(RiverdeltaError):
    """A segment from which no candidate can be made; it is set aside with this as the reason."""

    code = "untrainable"


@dataclass(frozen=True)
class Candidate:
    """What an increment ends with: both files with their SHA-256, the loss of every step taken, and figures of them."""

    weights: bytes
    digest: str
    state: bytes
    state_digest: str
    losses: tuple[float, ...]
    metrics: dict[str, Any]


@dataclass(frozen=True)
class Snapshot:
    """A learner between two steps: weights, moments and the mean of weights so far (empty before there is one) as flat
    float32 vectors of their own, and its counts."""

    weights: Tensor
    m: Tensor
    v: Tensor
    mean: Tensor
    place: int
    position: int
    taken: int
    averaged: int
    tokens: int
    losses: tuple[float, ...]


class Learner:
    """One adapter in the middle of an increment."""

    def __init__(self, base: Base, inputs: Inputs) -> None:
        """Of the earlier entries, only what will be rehearsed is looked at."""
        recipe, seed, entries, earlier = (
            budgeted(inputs.recipe, inputs.usual),
            inputs.seed,
            inputs.entries,
            inputs.earlier,
        )
        if inputs.weights is None:
            self.weights = AdapterWeights.begin(base.shape(recipe.lora), seed, base.device)
        else:
            self.weights = AdapterWeights.load(inputs.weights, base.device)
        self.optimiser = AdamW(recipe.optimiser, self.weights.flat.numel(), base.device)
        if inputs.state is not None:
            self.optimiser.load(inputs.state)
        training = recipe.training
        self.near = training.near
        self.plan = plan(len(entries), len(earlier), training, seed, self.optimiser.position)
        self.rows: Sequence[Row | None] = [row_of(base.tokenizer, entry, training.max_length) for entry in entries]
        self.rehearsed = {
            slot: row_of(base.tokenizer, earlier[slot], training.max_length)
            for slot in sorted({slot for batch in self.plan for slot in batch.earlier})
        }
        self._gradient = torch.zeros_like(self.weights.flat)
        # The mean of the weights after so many of the last steps.
        self._mean, self._averaged = self.weights.flat.new_empty(0), 0
        self._unaveraged = math.floor(len(self.plan) * (1.0 - recipe.optimiser.average))
        self.place = 0
        self.losses: list[float] = []
        self.tokens = 0
        self.failure: Untrainable | None = None

    @property
    def position(self) -> int:
        """Micro-batches since the adapter began, as its optimiser counts them."""
        return self.optimiser.position

    @property
    def done(self) -> bool:
        """Whether every micro-batch has been taken, or none can be any more."""
        return self.place == len(self.plan) or self.failure is not None

    def next_rows(self) -> list[Row]:
        """The rows of the next micro-batch that has any to learn, with those to rehearse; those without are passed."""
        while not self.done:
            batch = self.plan[self.place]
            rows = [row for slot in batch.slots if (row := self.rows[slot]) is not None]
            if rows:
                return rows + [row for slot in batch.earlier if (row := self.rehearsed[slot]) is not None]
            self.optimiser.skip()
            self.place += 1
        return []

    def next_tokens(self) -> int:
        """How many tokens the next micro-batch takes in a step."""
        return sum(bucket(len(row.tokens)) for row in self.next_rows())

    def member(self, tokens: int) -> Member:
        """This adapter's part in a step that is to learn: its gradient begins at zero."""
        self._gradient.zero_()
        return Member(self.weights.pairs(), tokens, self.weights.slopes(self._gradient))

    def learn(self, loss: float, tokens: int) -> None:
        """Take the optimiser's step with the gradient of the next micro-batch, which `member` has gathered."""
        progress = self.place / len(self.plan)
        if not math.isfinite(loss) or not self.optimiser.step(self.weights.flat, self._gradient, progress):
            self.failure = Untrainable(
                f"Step {self.place + 1} of {len(self.plan)} has no finite loss and gradient (loss {loss}).",
                "Lower optimiser.learning_rate in the recipe, or look at the segment's entries.",
            )
            return
        self.losses.append(loss)
        self.tokens += tokens
        self.place += 1
        if self.place > self._unaveraged:
            self._averaged += 1
            if self._averaged == 1:
                self._mean = self.weights.flat.detach().clone()
            else:
                self._mean.lerp_(self.weights.flat.detach(), 1.0 / self._averaged)

    def snapshot(self) -> Snapshot:
        """The state between two steps, copied."""
        o = self.optimiser
        weights, m, v, mean = (vector.detach().clone() for vector in (self.weights.flat, o.m, o.v, self._mean))
        counts = self.place, o.position, o.taken, self._averaged, self.tokens
        return Snapshot(weights, m, v, mean, *counts, tuple(self.losses))

    def restore(self, held: Snapshot) -> None:
        """Go on from a snapshot of the same increment."""
        o = self.optimiser
        with torch.no_grad():
            for vector, kept in zip((self.weights.flat, o.m, o.v), (held.weights, held.m, held.v), strict=True):
                vector.copy_(kept)
        self._mean, self._averaged = held.mean.to(self.weights.flat.device, copy=True), held.averaged
        self.place, o.position, o.taken = held.place, held.position, held.taken
        self.tokens, self.losses = held.tokens, list(held.losses)

    def candidate(self) -> Candidate:
        """What the increment has come to; raises its failure, if it has one."""
        if self.failure is not None:
            raise self.failure
        if self._averaged:
            with torch.no_grad():
                self.weights.flat.copy_(self._mean)
        weights, digest = self.weights.dump()
        state, state_digest = self.optimiser.dump()
        metrics = {
            "steps": len(self.losses),
            "entries": sum(row is not None for row in self.rows),
            "tokens": self.tokens,
            "position": self.optimiser.position,
            "losses": [round(loss, 6) for loss in self.losses],
        }
        return Candidate(weights, digest, state, state_digest, tuple(self.losses), metrics)


def train(base: Base, learner: Learner, progress: Progress | None = None) -> Candidate:
    """Take every step of one learner, alone.

    `progress` hears (step, steps, loss) after each; what it raises ends the increment. `Untrainable` when a loss or
    gradient is not finite.
    """
    while not learner.done:
        step(base, [learner])
        if progress is not None and learner.losses:
            progress(learner.place, len(learner.plan), learner.losses[-1])
    return learner.candidate()


def step(base: Base, learners: Sequence[Learner]) -> None:
    """Take the next micro-batch of each learner in one forward and backward pass of the base.

    The learners change the same modules; each has its own loss, optimiser and step count.
    """
    groups = [(learner, rows) for learner in learners if (rows := learner.next_rows())]
    if not groups:
        return
    batch = arrange([rows for _, rows in groups], filler=0)
    members = [learner.member(tokens) for (learner, _), tokens in zip(groups, batch.tokens_each, strict=True)]
    tokens, positions, keep, targets = (
        torch.tensor(values, device=base.device)
        for values in (batch.tokens, batch.positions, batch.keep, batch.targets)
    )
    asked = None
    if any(learner.near for learner, _ in groups):
        with torch.no_grad():
            plain = [Member({}, size) for size in batch.tokens_each]
            asked = base.hidden(tokens, positions, plain, batch.blocks)[keep]
    with torch.enable_grad():
        hidden = base.hidden(tokens, positions, members, batch.blocks)[keep]
        near = [learner.near for learner, _ in groups]
        losses, slope = _losses(base, hidden.detach(), targets, batch, near, asked)
        torch.autograd.backward(hidden, slope)
    for (learner, _), loss, size in zip(groups, losses, batch.tokens_each, strict=True):
        learner.learn(loss, size)


def _losses(
    base: Base, hidden: Tensor, targets: Tensor, batch: Batch, near: Sequence[float], asked: Tensor | None
) -> tuple[list[float], Tensor]:
    """Every adapter's mean loss over its targets, and the slope of each loss at `hidden` [targets, width].

    `near` weighs each adapter's divergence from the base, whose own hidden states are `asked`, None where no adapter
    wants it. Logits exist for some places at a time.
    """
    shares = torch.cat([torch.full((n, 1), 1.0 / n, device=hidden.device) for n in batch.targets_each])
    counts = zip(batch.targets_each, near, strict=True)
    weights = torch.cat([torch.full((n,), weight, device=hidden.device) for n, weight in counts])
    slopes, each = [], []
    for rows, (places, wanted, weight, plain) in tiles(hidden, targets, weights, hidden if asked is None else asked):
        places.requires_grad_()
        logits = base.logits(places)
        loss, pull = _cross_entropy(logits.detach().float(), wanted)
        if asked is not None:
            further, against = _divergence(logits.detach().float(), base.logits(plain).detach().float())
            # Adapters that do not want it keep their own bits: nothing is added to them, not even zeros.
            wants = weight > 0
            loss = torch.where(wants, loss + weight * further, loss)
            pull = torch.where(wants[:, None], pull + weight[:, None] * against, pull)
        (slope,) = torch.autograd.grad(logits, places, pull.to(logits.dtype))
        slopes.append(slope[:rows])
        each.append(loss[:rows])
    parts = torch.split(torch.cat(each).double().cpu(), list(batch.targets_each))
    # A mean's share of each slope comes last: it is a factor of a row.
    return [float(part.sum()) / len(part) for part in parts], torch.cat(slopes).mul_(shares)


def _cross_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Loss of each row and its slope at `logits` [rows, vocabulary]."""
    rows = torch.arange(len(targets), device=targets.device)
    likely = logits.log_softmax(-1)
    loss = -likely[rows, targets]
    pull = likely.exp_()
    pull[rows, targets] -= 1.0
    return loss, pull


def _divergence(logits: Tensor, plain: Tensor) -> tuple[Tensor, Tensor]:
    """KL(adapter || base) of each row of predictions, in nats, and its slope at the adapter's logits."""
    likely = logits.log_softmax(-1)
    apart = likely - plain.log_softmax(-1)
    share = likely.exp()
    further = (share * apart).sum(-1)
    return further, share * (apart - further[:, None])


def row_of(tokenizer: Any, entry: bytes | None, max_length: int) -> Row | None:
    """An entry's tokens; None for a tombstone and for what has nothing to learn from."""
    if entry is None:
        return None
    content = json.loads(entry)
    if content.get("type", "example") != "example":
        return None
    try:
        tokens, labels = example_ids(tokenizer, content, max_length)
    except Exception:  # a chat template may refuse a conversation in its own ways; the rest of the segment is learned
        return None
    row = Row(tuple(tokens), tuple(labels))
    return row if row.learns else None
