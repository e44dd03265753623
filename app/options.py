"""The base model and the Kafka cluster, as commands are given them."""

import os
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from riverdelta.core.settings import Settings

Base = Annotated[
    str | None, typer.Option(help="Base model: a folder, a Hugging Face id, or `gemma` for the demo's weights.")
]
KafkaServers = Annotated[str | None, typer.Option("--kafka", metavar="HOST:PORT", help="Kafka bootstrap servers.")]


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
    from riverdelta.core.errors import BadInput, Unavailable

    if not settings.kafka.bootstrap:
        if settings.running():
            raise Unavailable(
                f"The `riverdelta up` of {settings.data} has stopped, and its broker with it.", "Start it."
            )
        raise BadInput(
            f"No Kafka cluster is known, and no `riverdelta up` has run on {settings.data}.",
            "Give --kafka HOST:PORT or --data, or set KAFKA_BOOTSTRAP_SERVERS.",
        )
    return settings
