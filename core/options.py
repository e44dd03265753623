"""Options that commands share. What is given on the command line becomes environment, so that children see it too."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from .settings import Settings

Config = Annotated[Path | None, typer.Option(help="Settings file (default: ./riverdelta.toml where there is one).")]
Data = Annotated[Path | None, typer.Option(help="Data folder.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]


def read_settings(
    config: Path | None = None,
    data: Path | None = None,
    base: str | None = None,
    kafka: str | None = None,
    **more: Any,
) -> "Settings":
    """The settings, with what was given on the command line. `more` names nested settings: `serving__port=8000`."""
    from .settings import Settings

    given = {
        "config": None if config is None else config.absolute(),
        "data": None if data is None else data.absolute(),
        "base": base,
        "kafka__bootstrap": kafka,
        **more,
    }
    for name, value in given.items():
        if value is not None:
            os.environ[f"RIVERDELTA_{name.upper()}"] = str(value)
    return Settings.read()
