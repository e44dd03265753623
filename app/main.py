"""The `riverdelta` command: each subcommand imports what it needs only when it runs."""

import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from riverdelta.core.errors import RiverdeltaError
from riverdelta.core.options import AsJson, Config, Data, read_settings

from .broker import UP, die_with_parent
from .options import Base, KafkaServers, with_base, with_kafka


class _Root(TyperGroup):
    """Mounts the registry commands when they are asked for."""

    def list_commands(self, ctx: Any) -> list[str]:
        return [*super().list_commands(ctx), "registry"]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name == "registry":
            from riverdelta.registry import cli as registry

            registry.replayer = _replay
            registry.auditor = _audit
            return typer.main.get_command(registry.app)
        return super().get_command(ctx, cmd_name)


app = typer.Typer(
    cls=_Root,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="LoRA adapters that keep learning from Kafka streams, are served from one base model, and provably forget.",
)
dlt = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Dead letters: records that were not events.")
app.add_typer(dlt, name="dlt")


def _print_version(asked: bool) -> None:
    if asked:
        version()
        raise typer.Exit


@app.callback()
def _options(
    _version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    pass


@app.command()
def up(
    config: Config = None,
    data: Data = None,
    base: Base = None,
    kafka: KafkaServers = None,
    port: Annotated[int | None, typer.Option(help="Port of the serving endpoint (0: any free one).")] = None,
) -> None:
    """Run the whole stack on this machine.

    A broker (unless Kafka is configured), dataflow, trainer, server and registry keeper, under one supervisor.
    """
    from . import up as run_up

    # On one machine whoever may publish may also name a new adapter, unless the settings say otherwise.
    os.environ.setdefault("RIVERDELTA_STREAMS__UNKNOWN_ADAPTERS", "create")
    raise typer.Exit(run_up.run(with_base(read_settings(config, data, base, kafka, serving__port=port))))


@app.command()
def stream(
    config: Config = None,
    data: Data = None,
    kafka: KafkaServers = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes on this machine.")] = None,
    cluster: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT,...", help="Instead: where each process of all machines listens, in order."),
    ] = None,
    process: Annotated[int | None, typer.Option(min=0, help="Which of --cluster this one is, from 0.")] = None,
) -> None:
    """Run the dataflow: events become segments."""
    from riverdelta.streams.cluster import run

    given: dict[str, Any] = {"streams__workers": workers, "streams__cluster": cluster, "streams__process": process}
    run(with_kafka(read_settings(config, data, kafka=kafka, **given)))


@app.command()
def train(config: Config = None, data: Data = None, base: Base = None) -> None:
    """Run a trainer: segments become versions."""
    from riverdelta.trainer.run import run

    run(with_base(read_settings(config, data, base)))


@app.command()
def serve(
    config: Config = None,
    data: Data = None,
    base: Base = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on.")] = None,
) -> None:
    """Run a server: OpenAI-compatible, all adapters."""
    from riverdelta.serving.run import run

    run(with_base(read_settings(config, data, base, serving__host=host, serving__port=port)))


@app.command(hidden=True)
def broker(address: str) -> None:
    """Run the embedded broker on HOST:PORT (started by `up`)."""
    from .broker import run

    run(address)


@app.command()
def publish(
    file: Annotated[Path, typer.Argument(help="JSON lines; `-` is standard input.", allow_dash=True)],
    adapter: Annotated[str, typer.Option(help="Adapter of events that name none.")] = "",
    subject: Annotated[str, typer.Option(help="Subject of events that name none.")] = "",
    as_json: AsJson = False,
    config: Config = None,
    data: Data = None,
    kafka: KafkaServers = None,
) -> None:
    """Publish events, and check that each arrived."""
    from .publish import publish as run

    run(with_kafka(read_settings(config, data, kafka=kafka)), file, adapter, subject, as_json)


@app.command()
def ask(
    model: Annotated[str, typer.Argument(help="ADAPTER, ADAPTER@VERSION or base.")],
    prompt: Annotated[str, typer.Argument(help="The prompt; `-` is standard input.")],
    chat: Annotated[bool, typer.Option("--chat", help="Ask as a chat message, not as a bare prompt.")] = False,
    max_tokens: Annotated[int, typer.Option(min=1)] = 64,
    temperature: Annotated[float, typer.Option(min=0, max=2)] = 0.0,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends the answer.")] = None,
    url: Annotated[str, typer.Option(help="Serving URL (default: that of the data folder's `up`).")] = "",
    api_key: Annotated[str, typer.Option(envvar="RIVERDELTA_API_KEY")] = "",
    as_json: AsJson = False,
    config: Config = None,
    data: Data = None,
) -> None:
    r"""Ask an adapter, a version or the base.

    For instance: riverdelta ask acme "Q: Who is on call?\nA:", where \n stands for a new line.
    """
    from .ask import Question
    from .ask import ask as run

    question = Question(model, prompt, chat, max_tokens, temperature, tuple(stop or ()))
    run(question, url, read_settings(config, data), api_key, as_json)


@app.command()
def trace(
    event: Annotated[str, typer.Argument(help="The event's id, or PARTITION:OFFSET.")],
    source: Annotated[str, typer.Option(help="The event's source, where it has one.")] = "",
    adapter: Annotated[str, typer.Option(help="Look only at this adapter.")] = "",
    as_json: AsJson = False,
    config: Config = None,
    data: Data = None,
    kafka: KafkaServers = None,
) -> None:
    """Say what became of an event.

    Its partition and offset, entry, segment and outcome, the versions that learned it, and whether it is live.
    """
    from .trace import trace as run

    run(read_settings(config, data, kafka=kafka), event, source, adapter, as_json)


@dlt.command("list")
def dlt_list(as_json: AsJson = False, config: Config = None, data: Data = None, kafka: KafkaServers = None) -> None:
    """List the records that were not events, with the reason."""
    from .dead_letters import list_letters

    list_letters(with_kafka(read_settings(config, data, kafka=kafka)), as_json)


@dlt.command("replay")
def dlt_replay(
    reason: Annotated[str, typer.Option(help="Only those with this reason.")] = "",
    as_json: AsJson = False,
    config: Config = None,
    data: Data = None,
    kafka: KafkaServers = None,
) -> None:
    """Publish the original bytes of dead letters again, once their cause is mended."""
    from .dead_letters import replay

    replay(with_kafka(read_settings(config, data, kafka=kafka)), reason, as_json)


@app.command()
def counterfactual(
    adapter: str,
    without: Annotated[list[str] | None, typer.Option(help="Subjects suppressed from the start.")] = None,
    as_json: AsJson = False,
    config: Config = None,
    data: Data = None,
    base: Base = None,
    kafka: KafkaServers = None,
) -> None:
    """Train without a subject's data, and compare.

    A fresh process trains the adapter alone from Kafka's raw events, with subjects suppressed from the start, and
    compares the SHA-256 of its weights with that of the live ones. Exit code 0 if they are equal, 7 if not.
    """
    from .counterfactual import main as run

    settings = with_kafka(with_base(read_settings(config, data, base, kafka)))
    raise typer.Exit(run(settings, adapter, without or [], as_json))


def _replay(settings: Any, adapter: str, without: list[str]) -> dict[str, Any]:
    """What `registry verify --replay` runs: the registry knows no trainer."""
    from .counterfactual import run

    return run(with_kafka(with_base(settings)), adapter, without)


def _audit(settings: Any, ledger: Any, told: dict[str, Any]) -> list[dict[str, object]]:
    from .audit import audit

    return audit(with_base(settings), ledger, told)


@app.command()
def demo(
    keep: Annotated[bool, typer.Option("--keep", help="Leave the stack up at the end.")] = False,
    base: Annotated[str, typer.Option(help="Base model: a folder, a Hugging Face id, or `gemma`.")] = "gemma",
    data: Annotated[Path | None, typer.Option(help="Data folder (default: a temporary one).")] = None,
) -> None:
    """Learn, roll back, forget and prove it, for real."""
    from .demo import run

    raise typer.Exit(run(base, data, keep))


@app.command()
def version() -> None:
    """Print the version."""
    from importlib.metadata import version as installed

    typer.echo(installed("riverdelta"))


def main() -> None:
    """Entry point: a user's mistake is one line and an exit code, never a traceback."""
    if os.environ.get(UP) == str(os.getppid()):
        die_with_parent()
    try:
        app()
    except RiverdeltaError as error:
        typer.echo(f"riverdelta: {error}", err=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains at its exit
        sys.exit(1)
    except OSError as error:
        logging.getLogger(__name__).debug("an error of the system", exc_info=True)
        typer.echo(f"riverdelta: {_plain(error)}", err=True)
        sys.exit(1)


def _plain(error: OSError) -> str:
    if error.filename is None:
        return f"The system refused: {error}."
    name = os.fsdecode(error.filename) if isinstance(error.filename, bytes) else error.filename
    return f"{name} cannot be used: {error.strerror}. Mend that, or name another path."


if __name__ == "__main__":
    main()
