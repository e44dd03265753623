"""The `riverdelta registry` commands. Each imports what it needs only when it runs, so that `--help` is quick."""

import getpass
import os
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from riverdelta.core.errors import BadInput, Conflict, Corrupt, NotFound, RiverdeltaError, Unavailable, Unsupported
from riverdelta.core.names import check_adapter
from riverdelta.core.options import AsJson, Config, Data, read_settings

if TYPE_CHECKING:
    from riverdelta.core.settings import Settings

    from .ledger import Ledger
    from .operations import Operations

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Adapters and their versions: create, look, release, roll back, forget, verify.",
)

# What trains an adapter anew; set by the `riverdelta` command, as this package knows no trainer.
Replayer = Callable[["Settings", str, list[str]], dict[str, Any]]
replayer: Replayer | None = None
# What trains what a certificate names from the stored entries; set likewise.
auditor: "Callable[[Settings, Ledger, dict[str, Any]], list[dict[str, object]]] | None" = None

Name = Annotated[str, typer.Argument(metavar="NAME", help="Adapter.")]
Versioned = Annotated[str, typer.Argument(metavar="NAME[@VERSION]", help="Adapter, or one of its versions.")]
Segment = Annotated[int, typer.Argument(metavar="SEGMENT", min=1, help="Segment, as `registry show` numbers them.")]
Reason = Annotated[str, typer.Option(help="Why; kept in the log.")]
Actor = Annotated[str, typer.Option(help="Who; kept in the log (default: the user's name).")]
Subject = Annotated[str, typer.Option(help="The person or thing that the events name.")]


@app.command()
def create(
    name: Name,
    recipe: Annotated[Path | None, typer.Option(help="TOML file that shapes training (default: built in).")] = None,
    reason: Reason = "",
    actor: Actor = "",
    as_json: AsJson = False,
    config: Config = None,
    data: Data = None,
) -> None:
    """Make an adapter. It answers as the base until it has learned."""
    from riverdelta.core.recipe import Recipe

    from .report import print_adapter

    shape = Recipe.load(recipe) if recipe else Recipe()
    check_adapter(name)  # before there is a ledger for it
    with _acting(config, data, actor, make=True) as (_, ledger, acts):
        acts.create(name, shape, reason)
        print_adapter(ledger, name, as_json)


@app.command("list")
def list_(
    every: Annotated[bool, typer.Option("--all", help="Finished forgets too.")] = False,
    as_json: AsJson = False,
    config: Config = None,
    data: Data = None,
) -> None:
    """List adapters, what each serves, what awaits training, and forgets under way."""
    from .report import print_adapters

    with _ledger(config, data) as (_, ledger):
        print_adapters(ledger, every, as_json)


@app.command()
def show(name: Name, as_json: AsJson = False, config: Config = None, data: Data = None) -> None:
    """Show an adapter: its head, its versions, and what became of each segment."""
    from .report import print_adapter

    with _ledger(config, data) as (_, ledger):
        print_adapter(ledger, name, as_json)


@app.command()
def log(
    name: Name,
    after: Annotated[int, typer.Option(min=0, help="Only facts after this number.")] = 0,
    as_json: AsJson = False,
    config: Config = None,
    data: Data = None,
) -> None:
    """Show an adapter's journal: what was live when, by whom and why."""
    from .report import print_log

    with _ledger(config, data) as (_, ledger):
        print_log(ledger, name, after, as_json)


@app.command()
def release(
    version: Versioned,
    reason: Reason = "",
    actor: Actor = "",
    as_json: AsJson = False,
    config: Config = None,
    data: Data = None,
) -> None:
    """Serve NAME@VERSION now; the next increment takes over from it."""
    from .report import print_adapter

    name, number = _version(version)
    if number is None:
        raise BadInput(f"{version} names no version.", f"Write {version}@7, for instance.")
    with _acting(config, data, actor) as (_, ledger, acts):
        acts.release(name, number, reason)
        print_adapter(ledger, name, as_json)


@app.command()
def rollback(
    version: Versioned,
    to_base: Annotated[bool, typer.Option("--to-base", help="Serve the base itself.")] = False,
    reason: Reason = "",
    actor: Actor = "",
    as_json: AsJson = False,
    config: Config = None,
    data: Data = None,
) -> None:
    """Go back to NAME@VERSION (default: the version before the released one), and hold it there until `resume`."""
    from .report import print_adapter

    name, number = _version(version)
    if to_base and number:
        raise BadInput(f"{version} and --to-base are two places to go to.", "Give one of them.")
    number = 0 if to_base else number
    with _acting(config, data, actor) as (_, ledger, acts):
        acts.rollback(name, number, reason)
        print_adapter(ledger, name, as_json)


@app.command()
def resume(
    name: Name,
    replay: Annotated[bool, typer.Option("--replay", help="Train what was set aside, on the held version.")] = False,
    tip: Annotated[bool, typer.Option("--tip", help="Return to the newest version, as if never rolled back.")] = False,
    reason: Reason = "",
    actor: Actor = "",
    as_json: AsJson = False,
    config: Config = None,
    data: Data = None,
) -> None:
    """End a rollback's hold; without options, only new segments are learned, from the held version on."""
    from .ledger import Mode
    from .report import print_adapter

    if replay and tip:
        raise BadInput("--replay and --tip exclude each other.", "Give one of them, or neither.")
    mode: Mode = "replay" if replay else "tip" if tip else "continue"
    with _acting(config, data, actor) as (_, ledger, acts):
        acts.resume(name, mode, reason)
        print_adapter(ledger, name, as_json)


@app.command()
def accept(
    name: Name,
    segment: Segment,
    reason: Reason = "",
    actor: Actor = "",
    as_json: AsJson = False,
    config: Config = None,
    data: Data = None,
) -> None:
    """Learn a segment whatever the gate says; what was learned since is learned again after it."""
    _decide(name, segment, "accept", reason, actor, as_json, config, data)


@app.command()
def discard(
    name: Name,
    segment: Segment,
    reason: Reason = "",
    actor: Actor = "",
    as_json: AsJson = False,
    config: Config = None,
    data: Data = None,
) -> None:
    """Never learn a segment; if it was learned, go back to before it and learn again what came since."""
    _decide(name, segment, "discard", reason, actor, as_json, config, data)


def _decide(
    name: str,
    segment: int,
    hand: str,
    reason: str,
    actor: str,
    as_json: bool,
    config: Path | None,
    data: Path | None,
) -> None:
    from .ledger import Hand
    from .report import print_adapter

    with _acting(config, data, actor) as (_, ledger, acts):
        acts.decide(name, segment, Hand(hand), reason)
        print_adapter(ledger, name, as_json)


@app.command()
def forget(
    subject: Subject,
    adapter: Annotated[list[str] | None, typer.Option(help="Adapter to forget in; may be repeated.")] = None,
    all_adapters: Annotated[bool, typer.Option("--all-adapters", help="Every adapter, those to come too.")] = False,
    request: Annotated[str, typer.Option(help="Id under which repeating this changes nothing.")] = "",
    wait: Annotated[bool, typer.Option("--wait", help="Wait for rebuild and purge too.")] = False,
    serve_until_rebuilt: Annotated[
        float,
        typer.Option(metavar="SECONDS", min=0, help="Keep serving what learned from it meanwhile, so long at most."),
    ] = 0.0,
    receipt: Annotated[
        Path | None,
        typer.Option(help="New file for what the subject's entries say: with it they check the certificate."),
    ] = None,
    reason: Reason = "",
    actor: Actor = "",
    as_json: AsJson = False,
    config: Config = None,
    data: Data = None,
) -> None:
    """Forget a subject. Returns once no server can answer from what saw it; rebuild and purge follow by themselves.
    With --serve-until-rebuilt servers keep the releases that they have until the rebuild or the deadline, and it
    returns once they have let go of everything else."""
    import uuid

    from riverdelta.core.store import ObjectStore

    from . import operations
    from .ledger import Stage
    from .report import print_certified, print_fence, print_forget_json, print_interrupted, telling, waiting

    adapters, request, report = _scope(adapter, all_adapters), request or str(uuid.uuid4()), None
    with _acting(config, data, actor) as (settings, ledger, acts):
        already = operations.is_forgotten(ledger, settings, subject, adapters)
        try:
            with waiting("Waiting for every server to carry out the fence") as progress:
                report = acts.forget(subject, adapters, reason, request, serve_until_rebuilt, progress, receipt)
            done = report.forget
            if not as_json:
                print_fence(report, already)
            if wait:
                with telling("Rebuild and purge") as tell:
                    done = operations.await_purge(ledger, request, tell)
        except KeyboardInterrupt:
            left = operations.begun_forget(ledger, request)
            if as_json and left is not None:
                print_forget_json(left, report)
            print_interrupted(left)
            raise typer.Exit(130) from None
        except Unavailable:
            if as_json and report is not None:
                print_forget_json(done, report)
            raise
        if as_json:
            print_forget_json(done, report)
        elif done.stage is Stage.PURGED:
            print_certified(done, ObjectStore(settings.store_url).where(done.body["certificate"]))


@app.command()
def allow(
    subject: Subject,
    adapter: Annotated[list[str] | None, typer.Option(help="Adapter; may be repeated.")] = None,
    all_adapters: Annotated[bool, typer.Option("--all-adapters", help="Wherever it is suppressed.")] = False,
    reason: Reason = "",
    actor: Actor = "",
    as_json: AsJson = False,
    config: Config = None,
    data: Data = None,
) -> None:
    """Let a forgotten subject be learned again, from what is sent to Kafka from now on. What was sent before stays
    forgotten."""
    from riverdelta.core.printing import print_json

    adapters = _scope(adapter, all_adapters)
    with _acting(config, data, actor) as (_, _, acts):
        lifted = acts.allow(subject, adapters, reason)
        if as_json:
            print_json({"allowed": lifted})
        else:
            where = "every adapter" if "*" in lifted else ", ".join(lifted)
            typer.echo(f"Learned again from now on in {where}; what was sent before needs a new id to be sent again.")


@app.command()
def verify(
    name: Annotated[
        str, typer.Argument(metavar="[NAME|CERTIFICATE]", help="Adapter (default: all), or the file of a certificate.")
    ] = "",
    replay: Annotated[
        bool,
        typer.Option(
            "--replay",
            help="Also train the released version anew from Kafka's events, and compare. Of a certificate: train what "
            "stands in the place of the revoked from the stored entries.",
        ),
    ] = False,
    receipt: Annotated[
        Path | None, typer.Option(help="Of a certificate: what `forget --receipt` wrote, to open one's own entries.")
    ] = None,
    key: Annotated[
        Path | None, typer.Option(help="Of a certificate: the issuer's public key (default: this deployment's).")
    ] = None,
    request: Annotated[
        str, typer.Option(metavar="ID", help="Instead of a certificate's file: the id of a finished forget.")
    ] = "",
    without: Annotated[list[str] | None, typer.Option(help="With --replay: a subject that was forgotten.")] = None,
    as_json: AsJson = False,
    config: Config = None,
    data: Data = None,
) -> None:
    """Check the journal's chain, every manifest, payload and key, every version's weights, and what was issued of
    forgets; or a certificate."""
    from dataclasses import replace

    from riverdelta.core.store import ObjectStore

    from .belonging import key_store
    from .report import print_verified
    from .verify import Verified, check_issued
    from .verify import verify as check

    if name and request:
        raise BadInput(f"{name} and --request are two things to check.", "Give one of them.")
    of_certificate = bool(request) or "." in name or "/" in name
    if not of_certificate and (receipt is not None or key is not None):
        raise BadInput(
            "--receipt and --key are of a certificate.", "Give its file, with a dot or slash, or --request ID."
        )
    if without and (of_certificate or not replay):
        raise BadInput("--without is of an adapter's --replay.", "Leave it out, or give an adapter and --replay.")
    if of_certificate:
        signed = _issued(request, config, data) if request else _certificate(Path(name))
        _verify_certificate(signed, replay, receipt, key, as_json, config, data)
        return
    with _ledger(config, data) as (settings, ledger):
        heads = [ledger.adapter(name)] if name else ledger.adapters()
        store, keys = ObjectStore(settings.store_url), key_store(ledger, settings)
        found = [check(ledger, store, keys, head.name) for head in heads]
        issued = check_issued(ledger, store, name)
        found = [replace(each, problems=(*each.problems, *issued.pop(each.adapter, ()))) for each in found]
        if not name:  # of adapters that are still to be made
            found += [Verified(other, 0, 0, 0, tuple(problems)) for other, problems in issued.items()]
    if replay and replayer is None:
        raise Unsupported("Replaying needs the trainer.", "Run it as `riverdelta registry verify --replay`.")
    learned = [head.name for head in heads if name or head.release]
    replayed, codes = dict[str, dict[str, Any]](), list[int]()
    if replay and replayer:
        for each in learned:
            try:
                replayed[each] = replayer(settings, each, without or [])
            except RiverdeltaError as error:  # one that cannot be trained again keeps no other from it
                replayed[each] = {"adapter": each, "equal": None, "why": str(error)}
                codes.append(error.exit_code)
    print_verified(found, replayed, as_json)
    if any(held["equal"] is False for held in replayed.values()) or any(held.problems for held in found):
        raise typer.Exit(Corrupt.exit_code)
    if codes:
        raise typer.Exit(codes[0])


def _issued(request: str, config: Path | None, data: Path | None) -> bytes:
    """The certificate of a finished forget; `Corrupt` where what lies in its place is not what was issued."""
    from riverdelta.core.digests import sha256
    from riverdelta.core.store import ObjectStore

    with _ledger(config, data) as (settings, ledger):
        forget = ledger.forget_of(request)
        if "certificate" not in forget.body:
            raise Conflict(
                f"The forget {request} is {forget.stage}: its certificate comes with its purge.",
                "`riverdelta registry list` shows how far it is.",
            )
        store, key = ObjectStore(settings.store_url), forget.body["certificate"]
        signed = store.get(key)
        if sha256(signed) != forget.body["certificate_sha"]:
            raise Corrupt(
                f"{store.where(key)} is not the certificate that was issued of the forget {request}.",
                "Restore the object store from a backup.",
            )
        return signed


def _certificate(path: Path) -> bytes:
    """What a file holds, unless it is what else a forget writes."""
    from .certificate import is_manifest, is_receipt

    held = _bytes(path)
    if is_receipt(held):
        raise BadInput(f"{path} is a receipt.", f"Give the certificate, and the receipt with it: --receipt {path}.")
    if is_manifest(held):
        raise BadInput(f"{path} is the manifest.", "Give the certificate.dsse.json that lies beside it.")
    return held


def _verify_certificate(
    signed: bytes,
    replay: bool,
    receipt: Path | None,
    key: Path | None,
    as_json: bool,
    config: Path | None,
    data: Path | None,
) -> None:
    """Who gives a key may have nothing else of the deployment; who gives none is asked for what its ledger says too."""
    from dataclasses import replace

    from riverdelta.core.digests import sha256

    from .belonging import has_ledger
    from .certificate import check, check_stored, open_receipt, read_receipt
    from .report import print_certificate
    from .signing import key_of, opened, public_pem

    pem = _bytes(key) if key is not None else public_pem(read_settings(config, data).keys_dir)
    told = opened(signed, key_of(pem))
    found = check(told)
    if receipt is not None:
        given = read_receipt(_bytes(receipt))
        count, problems = open_receipt(told, given)
        found = replace(found, opened=count, receipt_gone=given.gone, problems=(*found.problems, *problems))
    replayed: list[dict[str, object]] = []
    if replay and auditor is None:
        raise Unsupported("Replaying needs the trainer.", "Run it as `riverdelta registry verify --replay`.")
    if replay or (key is None and has_ledger(read_settings(config, data))):
        with _ledger(config, data) as (settings, ledger):
            problems, superseded = check_stored(ledger, told, sha256(signed))
            found = replace(found, problems=(*found.problems, *problems), superseded=tuple(superseded))
            if replay and auditor and not problems:
                replayed = auditor(settings, ledger, told)
    print_certificate(found, replayed, as_json)
    if found.problems or not all(each["equal"] for each in replayed):
        raise typer.Exit(Corrupt.exit_code)


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise NotFound(f"Cannot read {path}: {error.strerror}.", "Give the path of a file.") from error


@app.command("import")
def import_(
    name: Name,
    folder: Annotated[Path, typer.Argument(help="PEFT folder: adapter_config.json and adapter_model.safetensors.")],
    base: Annotated[
        str, typer.Option(help="Base model, a folder or a Hugging Face id, if the settings name none.")
    ] = "",
    reason: Reason = "",
    actor: Actor = "",
    as_json: AsJson = False,
    config: Config = None,
    data: Data = None,
) -> None:
    """Make a LoRA trained elsewhere version 1 of a new adapter, which learns on from there."""
    from riverdelta.core.base import resolve

    from .report import print_adapter

    check_adapter(name)
    with _acting(config, data, actor, make=True) as (settings, ledger, acts):
        acts.import_folder(name, folder, resolve(base or settings.base or settings.running().get("base", "")), reason)
        print_adapter(ledger, name, as_json)


@app.command()
def export(
    version: Versioned,
    folder: Annotated[Path, typer.Argument(help="Folder to write.")],
    as_json: AsJson = False,
    config: Config = None,
    data: Data = None,
) -> None:
    """Write a version (default: the release) as a PEFT folder, for `peft.PeftModel.from_pretrained`."""
    from riverdelta.core.printing import print_json
    from riverdelta.core.store import ObjectStore

    from .peft_io import export_version

    name, number = _version(version)
    with _ledger(config, data) as (settings, ledger):
        written = export_version(ledger, ObjectStore(settings.store_url), name, number, folder)
        if as_json:
            print_json({"adapter": name, "version": written.number, "digest": written.digest, "folder": str(folder)})
        else:
            typer.echo(f"{name}@{written.number} is in {folder} (SHA-256 {written.digest}).")


@app.command()
def diff(
    first: Versioned,
    second: Versioned,
    as_json: AsJson = False,
    config: Config = None,
    data: Data = None,
) -> None:
    """What sets two versions apart: segments, recipe, metrics, and the distance of their weights (@0 is the base)."""
    from riverdelta.core.store import ObjectStore

    from .diff import difference
    from .report import print_difference

    (name, one), (other, two) = _version(first), _version(second)
    if name != other:
        raise BadInput(f"{first} and {second} are of two adapters.", "Compare two versions of one.")
    with _ledger(config, data) as (settings, ledger):
        one, two = (ledger.adapter(name).release if number is None else number for number in (one, two))
        print_difference(difference(ledger, ObjectStore(settings.store_url), name, one, two), as_json)


@app.command()
def repair(as_json: AsJson = False, config: Config = None, data: Data = None) -> None:
    """Make MLflow show what the ledger says: models, versions, alias `live`, tags, metrics, artifacts."""
    from riverdelta.core.printing import many, print_json

    from . import operations
    from .report import telling

    with _ledger(config, data) as (settings, ledger), telling("Making MLflow show what the ledger says") as tell:
        count = operations.repair(ledger, settings, tell)
    if as_json:
        print_json({"adapters": count})
    else:
        typer.echo(f"MLflow shows {many(count, 'adapter')} as the ledger has {'it' if count == 1 else 'them'}.")


@app.command()
def gc(
    grace: Annotated[float, typer.Option(min=0, help="Leave alone what is younger, in hours.")] = 24.0,
    dry: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    as_json: AsJson = False,
    config: Config = None,
    data: Data = None,
) -> None:
    """Let go of what recipes keep no longer, and delete what crashes left in the object store and the key store."""
    from riverdelta.core.printing import many, print_json
    from riverdelta.core.store import ObjectStore

    from .belonging import key_store
    from .gc import collect

    with _ledger(config, data) as (settings, ledger):
        found = collect(ledger, ObjectStore(settings.store_url), key_store(ledger, settings), grace * 3600, dry)
        if as_json:
            print_json({"deleted": found.deleted, "young": found.young, "dropped": found.dropped, "dry_run": dry})
        else:
            did, kept = ("would go", "would be kept") if dry else ("deleted", "are kept")
            for name, gone in found.dropped.items():
                versions, segments = many(len(gone["versions"]), "version"), many(len(gone["segments"]), "segment")
                typer.echo(f"{name}: {versions} and the contents of {segments} {kept} no longer.")
            typer.echo(f"{many(len(found.deleted), 'object')} {did}, {len(found.young)} are too young to be sure of.")


@app.command("run")
def run_(config: Config = None, data: Data = None) -> None:
    """Run the keeper: MLflow's projection, the control topic, and forgets' rebuild and purge (started by `up`)."""
    from .keeper import run

    run(read_settings(config, data))


@contextmanager
def _ledger(config: Path | None, data: Path | None, make: bool = False) -> Iterator[tuple["Settings", "Ledger"]]:
    """The settings and their ledger, made if there is none and it may be."""
    from .belonging import open_ledger

    settings = read_settings(config, data)
    with closing(open_ledger(settings, make)) as ledger:
        yield settings, ledger


@contextmanager
def _acting(
    config: Path | None, data: Path | None, actor: str, make: bool = False
) -> Iterator[tuple["Settings", "Ledger", "Operations"]]:
    """The settings, their ledger, and what one can do there."""
    from .operations import Operations
    from .wakeups import Wakeups

    with _ledger(config, data, make) as (settings, ledger), closing(Wakeups(settings)) as wakeups:
        yield settings, ledger, Operations(ledger, settings, _actor(actor), wakeups)


def _version(text: str) -> tuple[str, int | None]:
    """An adapter and the number of its version, 0 being the base; None where none is named."""
    from riverdelta.core.names import ModelRef

    name, _, number = text.partition("@")
    if number == "0":
        return check_adapter(name), 0
    ref = ModelRef.parse(text)
    if ref.adapter is None:
        raise BadInput("`base` is not an adapter.", "Name an adapter, or one of its versions as NAME@7.")
    return ref.adapter, ref.version


def _scope(adapters: list[str] | None, everywhere: bool) -> list[str] | None:
    """The adapters named, or None for every one; exactly one of the two must be said."""
    if bool(adapters) == everywhere:
        wrong = "--adapter and --all-adapters exclude each other." if everywhere else "Say where."
        raise BadInput(wrong, "Give --adapter NAME (once or more), or --all-adapters.")
    return adapters or None


def _actor(given: str) -> str:
    if given:
        return given
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # no name for this user id, as in a container
        return f"uid {os.getuid()}"
