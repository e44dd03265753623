"""Recipes: everything that shapes an adapter's training, as a small TOML file with a documented default."""

import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from . import languages
from .digests import digest_of
from .errors import BadInput, NotFound

Positive = Annotated[int, Meta(gt=0)]


class Lora(Struct, frozen=True, forbid_unknown_fields=True):
    """The shape of the adapter. `targets` are module name suffixes, or `all-linear`."""

    rank: Annotated[int, Meta(ge=1, le=256)] = 16
    alpha: Annotated[float, Meta(gt=0)] = 32.0
    rslora: bool = False
    targets: tuple[str, ...] | Literal["all-linear"] = "all-linear"


class Optimiser(Struct, frozen=True, forbid_unknown_fields=True):
    """AdamW (Loshchilov and Hutter 2019).

    Over an increment the rate falls linearly to `final` of what it began with. Over the adapter's life it falls towards
    `floor` of itself, which it never reaches: what lies above that is scaled by 1 / (1 + decay * position), position in
    micro-batches since the adapter began, those that tombstones skip counted.
    What an increment ends with is the mean of its weights over the last `average` of its steps (Polyak and Juditsky
    1992; 0: its last weights).
    """

    learning_rate: Annotated[float, Meta(gt=0)] = 1.5e-3
    final: Annotated[float, Meta(ge=0, le=1)] = 1.0
    decay: Annotated[float, Meta(ge=0)] = 0.01
    floor: Annotated[float, Meta(ge=0, le=1)] = 0.3
    beta1: Annotated[float, Meta(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Meta(ge=0, lt=1)] = 0.99
    epsilon: Annotated[float, Meta(gt=0)] = 1e-8
    weight_decay: Annotated[float, Meta(ge=0)] = 0.0
    clip: Annotated[float, Meta(ge=0)] = 1.0
    average: Annotated[float, Meta(ge=0, le=1)] = 0.5


class Training(Struct, frozen=True, forbid_unknown_fields=True):
    """`near` times the divergence KL(adapter || base) of the predictions joins the loss (0: the base is not asked).

    `passes` over a segment, and more until they make `steps`; `micro_batch` of its entries to a step, and `rehearse`
    earlier ones with them; rows are cut at `max_length` tokens."""

    passes: Positive = 3
    steps: Positive = 10
    micro_batch: Positive = 8
    rehearse: Annotated[int, Meta(ge=0)] = 12
    near: Annotated[float, Meta(ge=0)] = 0.0
    max_length: Annotated[int, Meta(ge=8, le=8192)] = 512


class Shards(Struct, frozen=True, forbid_unknown_fields=True):
    """Isolated parts that each learn from a share of the subjects (SISA, Bourtoule et al. 2021): `count` of them, each
    with an equal share of the adapter's rank."""

    count: Annotated[int, Meta(ge=1, le=64)] = 1


class Retain(Struct, frozen=True, forbid_unknown_fields=True):
    """What `gc` keeps of the past. A forget reaches back `horizon` segments (0: to the beginning), and so does
    rehearsal; one that would reach further makes the adapter anew of what remains (`rebuild`), or ends it (`retire`).
    One in `every` versions keeps its files as a clean state, and so do the newest `targets`."""

    horizon: Annotated[int, Meta(ge=0)] = 0
    beyond: Literal["rebuild", "retire"] = "rebuild"
    every: Positive = 1
    targets: Positive = 8


class Seal(Struct, frozen=True, forbid_unknown_fields=True):
    """A segment is sealed at `count` entries, or when its oldest open entry is `age` seconds old; while nothing of the
    adapter waits to be learned, when it is `linger` seconds old (as Nagle's algorithm: small ones, but never two)."""

    count: Annotated[int, Meta(ge=1, le=100_000)] = 64
    age: Annotated[float, Meta(gt=0)] = 5.0
    linger: Annotated[float, Meta(ge=0)] = 0.2


PERSONAL = {
    "email": r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+",
    "iban": r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,4})?\b",
    "card": r"(?<!\d)(?:\d[ -]?){12,18}\d(?!\d)",
    "ip": r"(?<![\d.])(?:\d{1,3}\.){3}\d{1,3}(?![\d.])",
    "phone": r"(?<![\w.])(?:\+|00)\d{1,3}[\s().-]{0,2}(?:\d[\s().-]{0,2}){6,12}\d(?![\w])",
}
"""Patterns of what is personal, by the name that `redact` gives them, in the order in
which they are looked for: plain forms, no proof that nothing is missed."""


class Curate(Struct, frozen=True, forbid_unknown_fields=True):
    """What is learned of the events: characters over all texts of one; patterns that must, or must not, be found in it;
    the `languages` that it may be in; what is replaced by its name in brackets. `alike` masks a subject's
    near-duplicates in a segment. What is empty or 0 is off."""

    min_chars: Annotated[int, Meta(ge=0)] = 1
    max_chars: Annotated[int, Meta(ge=1)] = 32_000
    require: tuple[str, ...] = ()
    deny: tuple[str, ...] = ()
    redact: tuple[Literal["email", "phone", "card", "iban", "ip"], ...] = ()
    replace: dict[str, str] = {}
    alike: Annotated[float, Meta(ge=0, le=1)] = 0.0
    languages: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """`ValueError` for a pattern that is none, and for a language that is not known."""
        if self.languages and (unknown := set(self.languages) - languages.known()):
            raise ValueError(f"{sorted(unknown)[0]!r} is no language of {' '.join(sorted(languages.known()))}")
        for pattern in (*self.require, *self.deny, *self.replace.values()):
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is no regular expression ({error})") from error


class FeedbackPolicy(Struct, frozen=True, forbid_unknown_fields=True):
    """What feedback teaches: a correction, in place of the answer; approval, the answer itself, at a rating above
    `approval` (1: never)."""

    corrections: bool = True
    approval: Annotated[float, Meta(ge=0, le=1)] = 0.0


class Question(Struct, frozen=True, forbid_unknown_fields=True):
    """One of an operator's own questions, with the answer that no increment may unlearn."""

    prompt: str
    completion: str


class Gate(Struct, frozen=True, forbid_unknown_fields=True):
    """What a candidate must not spoil, on `sample` earlier entries and the operator's `questions`.

    A loss that is `tolerance` nats a token higher than the parent's is worse; more than `share` of the sample worse
    rejects, but fewer than `least` earlier entries tell nothing. `alarm` rejections in a row are said loudly.
    """

    on: bool = True
    sample: Annotated[int, Meta(ge=0, le=1024)] = 32
    least: Positive = 8
    tolerance: Annotated[float, Meta(ge=0)] = 0.5
    share: Annotated[float, Meta(ge=0, le=1)] = 0.5
    alarm: Positive = 3
    questions: tuple[Question, ...] = ()


class Drift(Struct, frozen=True, forbid_unknown_fields=True):
    """What follows when the losses of entries before they are learned rise, as the gate measures them.

    `delta` is the chance that it only seems so (0: nobody looks); the next increment takes `boost` times the passes and
    the steps.
    """

    delta: Annotated[float, Meta(ge=0, lt=1)] = 0.002
    boost: Annotated[float, Meta(ge=1, le=10)] = 2.0


class Recipe(Struct, frozen=True, forbid_unknown_fields=True):
    """A recipe. `seed` and the adapter's name together seed every draw."""

    lora: Lora = Lora()
    optimiser: Optimiser = Optimiser()
    training: Training = Training()
    gate: Gate = Gate()
    drift: Drift = Drift()
    curate: Curate = Curate()
    feedback: FeedbackPolicy = FeedbackPolicy()
    shards: Shards = Shards()
    retain: Retain = Retain()
    seal: Seal = Seal()
    seed: Annotated[int, Meta(ge=0)] = 0

    def __post_init__(self) -> None:
        """`ValueError` when the shards cannot share the rank."""
        if self.lora.rank % self.shards.count:
            raise ValueError(f"{self.shards.count} shards cannot share a rank of {self.lora.rank} equally")

    @property
    def of_a_shard(self) -> "Recipe":
        """What one shard trains by: its share of the rank, at the scale of the whole, and of the gate's sample; it
        rehearses less where its share of a segment does not fill a micro-batch, so that all shards together take no
        more tokens than one would."""
        count, training = self.shards.count, self.training
        if count == 1:
            return self
        alpha = self.lora.alpha / (count**0.5 if self.lora.rslora else count)
        lora = msgspec.structs.replace(self.lora, rank=self.lora.rank // count, alpha=alpha)
        filled = min(training.micro_batch, -(-self.seal.count // count))
        rehearse = -(-training.rehearse * filled // training.micro_batch)
        training = msgspec.structs.replace(training, rehearse=rehearse)
        gate = self.gate
        sample = min(gate.sample, max(gate.least, -(-gate.sample // count)))
        gate = msgspec.structs.replace(gate, sample=sample)
        return msgspec.structs.replace(self, lora=lora, training=training, gate=gate, shards=Shards())

    @property
    def digest(self) -> str:
        """Hex SHA-256 of the recipe's canonical form."""
        return digest_of(self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as stored in the ledger."""
        held: dict[str, Any] = msgspec.to_builtins(self)
        return held

    @classmethod
    def from_dict(cls, held: dict[str, Any]) -> "Recipe":
        """A recipe from plain values; `BadInput` names what does not fit.

        >>> Recipe.from_dict({"lora": {"rank": 8}}).lora.rank
        8
        """
        try:
            return msgspec.convert(held, cls)
        except msgspec.ValidationError as error:
            raise BadInput(f"The recipe does not fit: {error}.", "docs/recipes.md lists every field.") from error

    @classmethod
    def load(cls, path: Path) -> "Recipe":
        """Read a TOML file."""
        try:
            return cls.from_dict(tomllib.loads(path.read_text()))
        except FileNotFoundError as error:
            raise NotFound(f"There is no recipe at {path}.", "docs/recipes.md shows one.") from error
        except OSError as error:
            raise BadInput(f"{path} cannot be read: {error.strerror}.", "Give the path of a TOML file.") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise BadInput(f"{path} is not TOML: {error}.", "docs/recipes.md shows a recipe.") from error
