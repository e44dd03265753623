"""Contents of entries, as the dataflow writes them."""

import json
import random

from riverdelta.core.recipe import Recipe


def example(**fields: object) -> bytes:
    """An example's content."""
    return json.dumps({"type": "example", **fields}).encode()


def fact(number: int) -> bytes:
    """A short question and answer."""
    draw = random.Random(number)
    return example(prompt=f"Q: code of {draw.randrange(1000)}?\nA:", completion=f" {draw.randrange(10**6)}")


def contents(count: int, seed: int = 0) -> list[bytes | None]:
    """A segment of questions, chats and texts of several lengths."""
    draw = random.Random(seed)
    held: list[bytes | None] = []
    for number in range(count):
        kind = draw.randrange(4)
        if kind == 0:
            held.append(example(text="word " * draw.randrange(1, 20)))
        elif kind == 1:
            turns = [{"role": "user", "content": "hi " * draw.randrange(1, 9)}, {"role": "assistant", "content": "yo"}]
            held.append(example(messages=turns))
        else:
            held.append(fact(seed * 1000 + number))
    return held


def recipe(**training: object) -> Recipe:
    """A quick recipe."""
    return Recipe.from_dict(
        {
            "lora": {"rank": 4, "alpha": 8.0},
            "training": {"passes": 2, "steps": 1, "micro_batch": 3, "max_length": 64, **training},
        }
    )
