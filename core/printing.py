"""What `--json` prints: always one JSON value, indented, its texts as they are."""

import json
from typing import Any


def print_json(value: Any) -> None:
    """Print a value; what JSON has no form for, such as a path or a time, becomes its text.

    >>> print_json({"adapter": "acme", "said": "gr\u00fcn"})
    {
      "adapter": "acme",
      "said": "gr\u00fcn"
    }
    """
    print(json.dumps(value, indent=2, ensure_ascii=False, default=str))  # noqa: T201
