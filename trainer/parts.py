"""Shards' parts: what each has learned, alone, and how together they are one plain adapter.

A part is a LoRA of an equal share of the adapter's rank. All of them side by side, A's rows stacked and B's columns in
a row, with an alpha that makes their mean of it, are the version that is served, exported and digested; its state file
holds every part's optimiser. So a version's two files are all that its parts are.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from riverdelta.core.digests import digest_of, seed_of
from riverdelta.core.recipe import Recipe
from riverdelta.core.weights import decode, encode

from .adapter import AdapterWeights
from .base import Base

Files = tuple[bytes, bytes]
"""A part's weights and optimiser state, in the form that an adapter of its own would have."""


def seed_of_shard(seed: int, shard: int) -> int:
    """What a shard draws from, given its adapter's seed."""
    return seed_of(seed, "shard", shard)


def key_of(shaped_by: Sequence[Any], before: str, segment: int, hand: str, live: Sequence[bool]) -> str:
    """Names what a shard has learned from once it has learned its entries of a segment: `before` names what came
    before, `live` says which of the entries are no tombstones, and `shaped_by` is all else that moves a bit."""
    return digest_of([list(shaped_by), before, segment, hand, list(live)])


@dataclass(frozen=True)
class Joined:
    """A version's two files and their digests."""

    weights: bytes
    digest: str
    state: bytes
    state_digest: str


def join(base: Base, recipe: Recipe, seed: int, parts: Sequence[Files | None]) -> Joined:
    """The version that these parts make; None for a shard that has learned nothing."""
    small, whole = recipe.of_a_shard, base.shape(recipe.lora)
    counts: list[dict[str, Any] | None] = []
    moments: dict[str, Tensor] = {}
    each: list[dict[str, Tensor]] = []
    for shard, files in enumerate(parts):
        if files is None:
            begun = AdapterWeights.begin(base.shape(small.lora), seed_of_shard(seed, shard), torch.device("cpu")).dump()
            each.append(decode(begun[0])[1])
            counts.append(None)
        else:
            each.append(decode(files[0])[1])
            count, vectors = decode(files[1])
            counts.append(count)
            moments |= {f"{name}.{shard}": vector for name, vector in vectors.items()}
    tensors = {}
    for target in whole.targets:
        for key, dim in ((target.a_key, 0), (target.b_key, 1)):
            tensors[key] = torch.cat([some[key] for some in each], dim)
    config = {**whole.config, "lora_alpha": recipe.lora.alpha / recipe.shards.count}
    weights, digest = encode(config, tensors)
    state, state_digest = encode({"parts": counts}, moments)
    return Joined(weights, digest, state, state_digest)


def split(base: Base, recipe: Recipe, weights: bytes, state: bytes) -> list[Files | None]:
    """The parts that make a version, byte for byte as they were joined."""
    small = recipe.of_a_shard
    shape, rank = base.shape(small.lora), small.lora.rank
    tensors, (config, moments) = decode(weights)[1], decode(state)
    parts: list[Files | None] = []
    for shard, count in enumerate(config["parts"]):
        if count is None:
            parts.append(None)
            continue
        first = shard * rank
        own = {}
        for target in shape.targets:
            own[target.a_key] = tensors[target.a_key][first : first + rank]
            own[target.b_key] = tensors[target.b_key][:, first : first + rank]
        vectors = {name: moments[f"{name}.{shard}"] for name in ("m", "v")}
        parts.append((encode(shape.config, own)[0], encode(count, vectors)[0]))
    return parts
