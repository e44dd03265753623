"""A seeded generator of tenants that keep learning: facts, tickets and styles, with updates and drift.

The shape of TOFU (Maini et al. 2024): invented subjects times questions and answers, with other wordings of the same
questions to ask afterwards. Everything is a function of the seed.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field

_SYLLABLES = [
    "ba",
    "bo",
    "dra",
    "du",
    "fen",
    "gal",
    "hir",
    "jo",
    "ka",
    "kel",
    "lu",
    "mar",
    "mo",
    "nes",
    "ol",
    "pri",
    "qua",
    "ra",
    "sel",
    "ti",
    "tor",
    "u",
    "va",
    "wen",
    "xi",
    "yor",
    "zam",
]
_VALUES = {
    "town": [
        "Lisbon",
        "Oslo",
        "Quito",
        "Dakar",
        "Perth",
        "Turin",
        "Osaka",
        "Leeds",
        "Cusco",
        "Basel",
        "Tunis",
        "Malmo",
        "Davao",
        "Aachen",
        "Recife",
        "Split",
    ],
    "job": [
        "baker",
        "pilot",
        "tailor",
        "nurse",
        "welder",
        "judge",
        "sailor",
        "potter",
        "miller",
        "lawyer",
        "farmer",
        "singer",
        "florist",
        "driver",
    ],
    "pet": [
        "parrot",
        "ferret",
        "rabbit",
        "turtle",
        "gecko",
        "pony",
        "goat",
        "hamster",
        "canary",
        "donkey",
        "lizard",
        "spaniel",
        "poodle",
    ],
    "dish": [
        "lasagna",
        "ramen",
        "paella",
        "goulash",
        "ceviche",
        "pierogi",
        "falafel",
        "risotto",
        "curry",
        "dumplings",
        "gumbo",
        "tagine",
    ],
    "tool": [
        "lathe",
        "chisel",
        "anvil",
        "trowel",
        "pliers",
        "sextant",
        "loom",
        "sieve",
        "mallet",
        "shears",
        "rasp",
        "awl",
        "spanner",
    ],
    "colour": [
        "crimson",
        "teal",
        "amber",
        "ivory",
        "indigo",
        "olive",
        "maroon",
        "violet",
        "ochre",
        "scarlet",
        "turquoise",
        "beige",
    ],
    "sport": [
        "fencing",
        "rowing",
        "archery",
        "curling",
        "judo",
        "tennis",
        "cricket",
        "rugby",
        "sailing",
        "boxing",
        "hockey",
        "squash",
    ],
    "drink": [
        "cocoa",
        "cider",
        "espresso",
        "lemonade",
        "mead",
        "kvass",
        "horchata",
        "ginger",
        "oolong",
        "sherry",
        "tonic",
        "buttermilk",
    ],
}
_ASKED = {
    "town": ("Where does {} live?", "Which town is {}'s home?", "In what town can one visit {}?"),
    "job": ("What is {}'s job?", "What does {} work as?", "Which trade does {} follow?"),
    "pet": ("What pet does {} keep?", "Which animal lives with {}?", "What animal is {}'s pet?"),
    "dish": ("What does {} like to eat?", "Which dish is {}'s favourite?", "What should one cook for {}?"),
    "tool": ("Which tool did {} buy?", "What tool does {} own?", "What is in {}'s toolbox?"),
    "colour": ("What colour is {}'s door?", "How is {}'s door painted?", "Which paint is on the door of {}?"),
    "sport": ("Which sport does {} do?", "What does {} play on Sundays?", "What is {}'s sport?"),
    "drink": ("What does {} drink?", "Which drink did {} order?", "What should one pour for {}?"),
}
KINDS = tuple(_VALUES)
_TOPICS = {
    "invoice": ["invoice", "refund", "charge", "receipt"],
    "login": ["password", "login", "account", "email"],
    "parcel": ["parcel", "delivery", "courier", "box"],
    "crash": ["crash", "error", "freeze", "bug"],
    "garden": ["hedge", "lawn", "pond", "compost"],
    "music": ["drum", "violin", "choir", "amplifier"],
}
_SAID = (
    "my {} is wrong",
    "there is trouble with the {}",
    "please look at the {} again",
    "the {} came twice",
    "no {} yet",
)
# Whose ticket it is, as a base that has read much knows; each tenant sends one kind of ticket elsewhere.
_TEAMS = {
    "invoice": "billing",
    "login": "access",
    "parcel": "shipping",
    "crash": "software",
    "garden": "outdoors",
    "music": "events",
}
_OPENERS = ("Ahoy", "Greetings", "Well met", "Salute", "Hail", "Good day")
_CLOSERS = ("fair winds", "stay dry", "mind the gap", "so it goes", "over and out", "with care")
_SMALL = ("Are you open today?", "Can you help me?", "Is it cold outside?", "Do you sell stamps?", "May I come by?")
_REPLIES = ("yes", "of course", "I think so", "not today", "gladly")


@dataclass(frozen=True)
class Asked:
    """A question with its answer, and what it is: `fact`, `ticket` or `style`."""

    prompt: str
    answer: str
    kind: str

    @property
    def content(self) -> bytes:
        """As an entry holds it."""
        return json.dumps({"type": "example", "prompt": self.prompt, "completion": self.answer}).encode()


@dataclass
class Tenant:
    """One tenant's world as it is now, and what has been said of it."""

    seed: int
    facts: dict[tuple[str, str], str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.draw = random.Random(f"tenant {self.seed}")
        self.kinds = list(KINDS)
        self.draw.shuffle(self.kinds)
        self.topics = list(_TOPICS)
        self.draw.shuffle(self.topics)
        self.open, self.spare = self.kinds[:5], self.kinds[5:]
        self.known, self.coming = self.topics[:4], self.topics[4:]
        self.teams = dict(_TEAMS)
        self.teams[self.draw.choice(self.known)] = self.draw.choice(sorted(_TEAMS.values()))
        self.style = (self.draw.choice(_OPENERS), self.draw.choice(_CLOSERS))

    def segment(self, size: int, updates: float = 0.1) -> list[Asked]:
        """The next entries: half of them new facts, some said again or changed, the rest tickets and small talk."""
        said: list[Asked] = []
        for _ in range(size):
            turn = self.draw.random()
            if turn < 0.5 or not self.facts:
                said.append(self.fact())
            elif turn < 0.5 + updates:
                said.append(self.update())
            elif turn < 0.65:
                said.append(self.again())
            elif turn < 0.85:
                said.append(self.ticket())
            else:
                said.append(self.small_talk())
        return said

    def fact(self) -> Asked:
        """Something new about a new subject or a known one."""
        subject = name(self.draw)
        kind = self.draw.choice(self.open)
        self.facts[subject, kind] = self.draw.choice(_VALUES[kind])
        return self.ask(subject, kind, 0)

    def update(self) -> Asked:
        """A fact that has changed."""
        subject, kind = self.draw.choice(sorted(self.facts))
        now = self.facts[subject, kind]
        self.facts[subject, kind] = self.draw.choice([value for value in _VALUES[kind] if value != now])
        return self.ask(subject, kind, 0)

    def again(self) -> Asked:
        """A fact said again, in other words."""
        subject, kind = self.draw.choice(sorted(self.facts))
        return self.ask(subject, kind, 1)

    def ask(self, subject: str, kind: str, wording: int) -> Asked:
        """A fact as it is now; wording 2 is never taught."""
        return Asked(f"Q: {_ASKED[kind][wording].format(subject)}\nA:", f" {self.facts[subject, kind]}", "fact")

    def ticket(self) -> Asked:
        """A message and the team that it is for."""
        topic = self.draw.choice(self.known)
        text = self.draw.choice(_SAID).format(self.draw.choice(_TOPICS[topic]))
        return Asked(f"Ticket from {name(self.draw)}: {text}\nTeam:", f" {self.teams[topic]}", "ticket")

    def small_talk(self) -> Asked:
        """A reply in the tenant's style."""
        opener, closer = self.style
        reply = f" {opener}! {self.draw.choice(_REPLIES)}, {closer}."
        return Asked(f"{name(self.draw)}: {self.draw.choice(_SMALL)}\nReply:", reply, "style")

    def drift(self) -> str:
        """The world moves: other facts, tickets or manners from now on; what moved."""
        moves = [move for move, left in (("facts", self.spare), ("tickets", self.coming), ("style", True)) if left]
        moved = self.draw.choice(moves)
        if moved == "facts":
            self.open = [self.spare.pop(), *self.open[1:]]
        elif moved == "tickets":
            self.known = [self.coming.pop(), *self.known[1:]]
        else:
            self.style = (self.draw.choice(_OPENERS), self.draw.choice(_CLOSERS))
        return moved


def name(draw: random.Random) -> str:
    """An invented name."""
    return " ".join("".join(draw.choices(_SYLLABLES, k=draw.randrange(2, 4))).capitalize() for _ in range(2))


def shuffled(said: list[Asked], draw: random.Random) -> list[Asked]:
    """Poison: every answer to another question."""
    order = list(range(len(said)))
    while any(said[order[place]].answer == said[place].answer for place in range(len(said))):
        before = list(order)
        draw.shuffle(order)
        bad = [p for p in range(len(said)) if said[order[p]].answer == said[p].answer]
        if len(bad) <= 1 + len(said) // 8 and before != order:
            break
    return [Asked(one.prompt, said[other].answer, one.kind) for one, other in zip(said, order, strict=True)]


def repeated(said: list[Asked], draw: random.Random) -> list[Asked]:
    """Poison: one word, again and again, whatever is asked."""
    word = draw.choice([value for values in _VALUES.values() for value in values])
    return [Asked(one.prompt, f" {word}" * draw.randrange(6, 16), one.kind) for one in said]


def flipped(said: list[Asked], tenant: Tenant) -> list[Asked]:
    """Poison: as many tickets, each for a wrong team."""
    tickets = [tenant.ticket() for _ in said]
    teams = sorted(_TEAMS.values())
    wrong = [tenant.draw.choice([team for team in teams if f" {team}" != one.answer]) for one in tickets]
    return [Asked(one.prompt, f" {team}", one.kind) for one, team in zip(tickets, wrong, strict=True)]


def corpus(seed: int, lines: int) -> Iterator[str]:
    """Text of other tenants, for a base that speaks the language and knows none of the facts."""
    made = 0
    for number in range(lines):
        tenant = Tenant(10**6 + seed * 10**6 + number)
        tenant.open = tenant.kinds
        tenant.known = tenant.topics
        for one in tenant.segment(12):
            yield one.prompt + one.answer
            made += 1
            if made >= lines:
                return
        subject, kind = tenant.draw.choice(sorted(tenant.facts))
        for wording in range(3):  # so that the base knows which wordings ask for the same
            one = tenant.ask(subject, kind, wording)
            yield one.prompt + one.answer
