"""docs/settings.md, made from the settings themselves: `python -m riverdelta.app.settings_page > docs/settings.md`."""

import sys
from typing import Any, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from riverdelta.core.settings import Settings

_INTRO = """# Settings

Every setting has a default. It comes, in falling order of precedence, from the command line, from the environment, and
from `riverdelta.toml` in the working directory (`--config` or `RIVERDELTA_CONFIG` name another file).
`kafka.bootstrap` in the file is `RIVERDELTA_KAFKA__BOOTSTRAP` in the environment: two underscores between the parts.

```toml
data = "river"
base = "google/gemma-3-270m"

[kafka]
bootstrap = "kafka-1:9093,kafka-2:9093"
security = "SASL_SSL"
sasl_mechanism = "SCRAM-SHA-512"
username = "riverdelta"
ca_file = "/etc/ssl/kafka.pem"

[serving]
port = 8080
```

Secrets (`kafka.password`, `kafka.key_password`) are better given by the environment. Beside the settings,
`RIVERDELTA_LOG_LEVEL` sets the level of the logs (default `info`) and `RIVERDELTA_LOG_JSON=1` makes them JSON lines.
"""


def page() -> str:
    """The page's Markdown."""
    parts = [_INTRO]
    top = {name: field for name, field in Settings.model_fields.items() if not _is_part(field)}
    parts.append(_section("Top level", "", "", top))
    for name, field in Settings.model_fields.items():
        if _is_part(field):
            part = field.annotation
            assert isinstance(part, type)
            assert issubclass(part, BaseModel)
            parts.append(_section(f"`[{name}]`", (part.__doc__ or "").strip(), f"{name}.", part.model_fields))
    return "\n".join(parts)


def _is_part(field: FieldInfo) -> bool:
    return isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)


def _section(title: str, about: str, prefix: str, fields: dict[str, FieldInfo]) -> str:
    rows = [
        f"| `{prefix}{name}` | {_type(field.annotation)} | {_default(field)} | {_meaning(field)} |"
        for name, field in fields.items()
    ]
    head = ["| setting | type | default | meaning |", "|---|---|---|---|"]
    return "\n".join([f"## {title}", "", *([about, ""] if about else []), *head, *rows, ""])


def _type(annotation: Any) -> str:
    if get_origin(annotation) is list:
        return f"list of {_type(get_args(annotation)[0])}"
    if get_origin(annotation) is not None:
        return " or ".join(
            f"`{argument}`" if isinstance(argument, str) else _type(argument)
            for argument in get_args(annotation)
            if argument not in ("", type(None))
        )
    return {"str": "text", "int": "integer", "float": "number", "bool": "true or false", "Path": "path"}[
        annotation.__name__
    ]


def _default(field: FieldInfo) -> str:
    if field.default in ("", None):
        return ""
    return f"`{str(field.default).lower() if isinstance(field.default, bool) else field.default}`"


def _meaning(field: FieldInfo) -> str:
    limits = {"ge": "at least {}", "gt": "above {}", "le": "at most {}", "lt": "below {}"}
    bounds = [
        text.format(getattr(limit, name))
        for limit in field.metadata
        for name, text in limits.items()
        if getattr(limit, name, None) is not None
    ]
    return "; ".join(part for part in (field.description, " and ".join(bounds)) if part)


if __name__ == "__main__":
    sys.stdout.write(page())
