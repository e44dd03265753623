"""Drift: whether the losses of entries before they are learned have risen, and what the next increment does about it.

ADWIN (Bifet and Gavaldà 2007) over the losses of the lineage's entries, in nats a token and in index order: a function
of the log alone. Its bound is proved for values between 0 and 1 and is quicker on nats; a false alarm costs passes.
"""

from collections.abc import Sequence
from typing import NamedTuple

import msgspec
from river.drift import ADWIN

from riverdelta.core.recipe import Drift, Recipe

# So many of the newest segments are looked at.
RECENT = 64


class Usual(NamedTuple):
    """What a version of the lineage found its segment to be: how surprising its upper quarter, the losses of its
    entries before they were learned, and whether these had risen."""

    surprise: float
    losses: tuple[float, ...] = ()
    drift: bool = False


def rose(segments: Sequence[Sequence[float]], delta: float) -> bool:
    """Whether losses changed for the worse within the last of these segments, with a chance of at most about `delta`
    that it only seems so; False for a delta of 0.

    >>> known = [[0.1, 0.2, 0.1, 0.3] * 4] * 5
    >>> rose(known, 0.002), rose([*known, [6.0, 7.0] * 16], 0.002), rose([*known, [0.0] * 64], 0.002)
    (False, True, False)
    """
    if not delta or not segments:
        return False
    window = ADWIN(delta=delta, clock=1)
    found = False
    for losses in segments[-RECENT:]:
        found = False
        for loss in losses:
            usual = window.estimation
            window.update(loss)
            found |= window.drift_detected and window.estimation > usual
    return found


def budgeted(recipe: Recipe, usual: Sequence[Usual]) -> Recipe:
    """The recipe of a lineage's next increment: with more passes and steps where its newest segment had drifted."""
    if not usual or not usual[-1].drift or not recipe.gate.on:
        return recipe
    training, boost = recipe.training, recipe.drift.boost
    more = msgspec.structs.replace(training, passes=round(training.passes * boost), steps=round(training.steps * boost))
    return msgspec.structs.replace(recipe, training=more)


def drifted(drift: Drift, usual: Sequence[Usual], losses: Sequence[float]) -> bool:
    """Whether a segment with these losses, after that lineage, is one in which losses rose."""
    return rose([*(each.losses for each in usual), losses], drift.delta)
