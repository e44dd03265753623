"""Options that commands share. What is given on the command line becomes environment, so that children see it too."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from riverdelta.core.settings import Settings

Config = Annotated[Path | None, typer.Option(help="Settings file (default: ./riverdelta.toml where there is one).")]
Data = Annotated[Path | None, typer.Option(help="Data folder.")]
Base = Annotated[
    str | None, typer.Option(help="Base model: a folder, a Hugging Face id, or `gemma` for the demo's weights.")
]
KafkaServers = Annotated[str | None, typer.Option("--kafka", metavar="HOST:PORT", help="Kafka bootstrap servers.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]


def read_settings(
    config: Path | None = None,
    data: Path | None = None,
    base: str | None = None,
    kafka: str | None = None,
    **more: Any,
) -> "Settings":
    """The settings, with what was given on the command line. `more` names nested settings: `serving__port=8000`."""
    from riverdelta.core.settings import Settings

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


def with_base(settings: "Settings") -> "Settings":
    """The settings with `gemma` replaced by the folder that it stands for, converted if it must be.

    Where none is named, it is the base that the last `riverdelta up` on the data folder ran with.
    """
    from .gemma import NAME, gemma_folder

    settings.base = settings.base or settings.running().get("base", "")
    if settings.base == NAME:
        os.environ["RIVERDELTA_BASE"] = settings.base = str(gemma_folder(lambda step: typer.echo(step, err=True)))
    return settings


def with_kafka(settings: "Settings") -> "Settings":
    """The settings, if they name a Kafka cluster."""
    from riverdelta.core.errors import BadInput

    if not settings.kafka.bootstrap:
        raise BadInput(
            f"No Kafka cluster is known, and no `riverdelta up` has run on {settings.data}.",
            "Give --kafka HOST:PORT or --data, or set KAFKA_BOOTSTRAP_SERVERS.",
        )
    return settings
