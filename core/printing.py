"""What commands print: numbers of things and, for `--json`, one JSON value, indented, its texts as they are."""

import json
from typing import Any


def many(count: int, thing: str) -> str:
    """A number of things.

    >>> many(1, "entry"), many(0, "version"), many(2, "entry")
    ('1 entry', '0 versions', '2 entries')
    """
    if count == 1:
        return f"1 {thing}"
    return f"{count} {thing.removesuffix('y')}ies" if thing.endswith("y") else f"{count} {thing}s"


def print_json(value: Any) -> None:
    """Print a value; what JSON has no form for, such as a path or a time, becomes its text.

    >>> print_json({"adapter": "acme", "said": "gr\u00fcn"})
    {
      "adapter": "acme",
      "said": "gr\u00fcn"
    }
    """
    print(json.dumps(value, indent=2, ensure_ascii=False, default=str))  # noqa: T201
