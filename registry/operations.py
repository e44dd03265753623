"""The acts behind the command line, the HTTP face and the control topic: a ledger transaction, then the wake-ups.

Every act is durable when its function returns; wake-ups only make it felt sooner. Subjects come in as plain text and go
no further than here: what is stored is their keyed hash.
"""

import logging
import os
import re
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from riverdelta.core.errors import BadInput, NotFound, Unavailable
from riverdelta.core.recipe import Recipe
from riverdelta.core.settings import Settings
from riverdelta.core.store import ObjectStore
from riverdelta.core.times import later, now

from . import certificate, contents
from .belonging import KeptOpen, key_store, subject_key
from .ledger import AdapterRecord, Forget, Hand, Lease, Ledger, Mode, Stage
from .mlflow_projection import Projection, ask_for_repair
from .wakeups import Wakeups

log = logging.getLogger(__name__)
Progress = Callable[[list[Lease]], None]
KEEPER = "keeper"  # what one process at a time does
LONGEST_SECONDS = 365 * 86_400.0  # that servers may be left what they have until it is rebuilt
_POLL_SECONDS = 0.2
_CONTROL_CHARACTERS = re.compile(r"[\x00-\x1f\x7f]+")


@dataclass(frozen=True)
class ForgetReport:
    """What a forget has done so far: all servers have carried out the fence; rebuild and purge follow by themselves.

    `revoked` counts versions per adapter, `lost` names the servers that were given up for lost, `seconds` is the time
    from the request to the last acknowledgement.
    """

    forget: Forget
    revoked: dict[str, int]
    lost: list[str]
    seconds: float


def create(
    ledger: Ledger,
    settings: Settings,
    adapter: str,
    recipe: Recipe,
    *,
    actor: str,
    reason: str = "",
    wakeups: Wakeups | None = None,
) -> AdapterRecord:
    """Make an adapter. It answers as the base until it has learned."""
    head = ledger.create(adapter, recipe, _line(actor, 128), _line(reason))
    _tell(settings, wakeups, [adapter])
    return head


def rollback(
    ledger: Ledger,
    settings: Settings,
    adapter: str,
    version: int | None,
    *,
    actor: str,
    reason: str = "",
    wakeups: Wakeups | None = None,
) -> AdapterRecord:
    """Move the release to an earlier version (None: the released one's parent; 0: the base) and hold it there."""
    head = ledger.rollback(adapter, version, _line(actor, 128), _line(reason))
    _tell(settings, wakeups, [adapter])
    return head


def release(
    ledger: Ledger,
    settings: Settings,
    adapter: str,
    version: int,
    *,
    actor: str,
    reason: str = "",
    wakeups: Wakeups | None = None,
) -> AdapterRecord:
    """Move the release, without a hold: the next increment takes over from it."""
    head = ledger.release(adapter, version, _line(actor, 128), _line(reason))
    _tell(settings, wakeups, [adapter])
    return head


def resume(
    ledger: Ledger,
    settings: Settings,
    adapter: str,
    mode: Mode,
    *,
    actor: str,
    reason: str = "",
    wakeups: Wakeups | None = None,
) -> AdapterRecord:
    """End a hold: `continue` with new segments only, `replay` what was set aside, or return to the newest (`tip`)."""
    head = ledger.resume(adapter, mode, _line(actor, 128), _line(reason))
    _tell(settings, wakeups, [adapter])
    return head


def decide(
    ledger: Ledger,
    settings: Settings,
    adapter: str,
    segment: int,
    hand: Hand,
    *,
    actor: str,
    reason: str = "",
    wakeups: Wakeups | None = None,
) -> AdapterRecord:
    """Accept or discard a segment by hand, whatever the gate says, now and at every rebuild."""
    head = ledger.decide_by_hand(adapter, segment, hand, _line(actor, 128), _line(reason))
    _tell(settings, wakeups, [adapter])
    return head


def forget(
    ledger: Ledger,
    settings: Settings,
    subject: str,
    adapters: Sequence[str] | None,
    *,
    actor: str,
    reason: str = "",
    request: str = "",
    serve_until_rebuilt: float = 0.0,
    wakeups: Wakeups | None = None,
    progress: Progress | None = None,
    keys: KeptOpen | None = None,
) -> ForgetReport:
    """Forget a subject in some adapters (None: in all, those to come included), and wait for the servers.

    `progress` is called with the leases that are still waited for. A `request` id seen before starts nothing new
    and gives the procedure as it stands. With `serve_until_rebuilt`, servers go on answering with the releases that
    they have until those are rebuilt, or for so many seconds at most; then the keeper fences, and nobody waits.
    """
    start = time.monotonic()
    begun = _begin(ledger, settings, subject, adapters, actor, reason, request, None, serve_until_rebuilt, wakeups)
    lost = ledger.await_fence(begun.fence, ["server"], progress=progress)  # first of all nobody answers with it
    _erase(ledger, settings, begun, keys)
    done = begun
    if begun.stage is not Stage.LENDING:
        done = ledger.advance(begun.id, Stage.ACKNOWLEDGED, {"lost": lost}, _line(actor, 128))
    revoked = {part["adapter"]: len(part["versions"]) for part in done.body["doomed"]}
    return ForgetReport(done, revoked, lost, time.monotonic() - start)


def write_receipt(ledger: Ledger, settings: Settings, subject: str, adapters: Sequence[str] | None, path: Path) -> int:
    """Write what a subject's entries say now to a new file that only its owner may read; how many there are."""
    keys = key_store(ledger, settings)
    try:
        hashed = _hashed(ledger, settings, subject)
        made = certificate.receipt(ledger, ObjectStore(settings.store_url), keys, hashed, adapters)
    finally:
        keys.close()
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        raise BadInput(f"Cannot write {path}: {error.strerror}.", "Name a new file for the receipt.") from error
    with os.fdopen(descriptor, "wb") as file:
        file.write(msgspec.json.encode(made))
    return len(made.entries)


def await_purge(ledger: Ledger, request: str, progress: Callable[[str], None] | None = None) -> Forget:
    """Wait until the keeper has purged what a forget wrote off; its procedure then. `progress` hears the stage;
    `Unavailable` when no keeper is at work."""
    while (forget := ledger.forget_of(request)).stage is not Stage.PURGED:
        with ledger.db.exclusive(KEEPER) as alone:
            if alone:
                raise Unavailable(
                    f"No keeper is at work; the forget {request} stays {forget.stage}.",
                    "Start `riverdelta up` or `riverdelta registry run`: it goes on by itself.",
                )
        if progress is not None:
            progress(str(forget.stage))
        time.sleep(_POLL_SECONDS)
    return forget


def repair(ledger: Ledger, settings: Settings, progress: Callable[[str], None] | None = None) -> int:
    """Make MLflow show what the ledger says, here or, where one is at work, by the keeper; the number of adapters.
    `progress` hears what is still to be looked at."""
    with ledger.db.exclusive(KEEPER) as alone:
        if alone:
            from .mlflow_store import MlflowStore

            return len(Projection(ledger, ObjectStore(settings.store_url), MlflowStore(settings)).repair())
    heads = ledger.heads()
    ask_for_repair(ledger)
    left = set(heads)
    while left := {name for name in left if ledger.projected(name)[0] < heads[name]}:
        if progress is not None:
            progress(f"{len(left)} adapters")
        time.sleep(_POLL_SECONDS)
    return len(heads)


def fence(
    ledger: Ledger,
    settings: Settings,
    subject: str,
    adapters: Sequence[str] | None,
    *,
    actor: str,
    reason: str = "",
    request: str = "",
    asked: Mapping[str, Any] | None = None,
    serve_until_rebuilt: float = 0.0,
    wakeups: Wakeups | None = None,
    keys: KeptOpen | None = None,
) -> Forget:
    """The forget's transaction and the deletion of keys: durable, and followed up by the keeper. `asked` says where a
    message that asked for it lies. Who forgets often gives the `keys`, kept open."""
    begun = _begin(ledger, settings, subject, adapters, actor, reason, request, asked, serve_until_rebuilt, wakeups)
    _erase(ledger, settings, begun, keys)
    return begun


def _begin(
    ledger: Ledger,
    settings: Settings,
    subject: str,
    adapters: Sequence[str] | None,
    actor: str,
    reason: str,
    request: str,
    asked: Mapping[str, Any] | None,
    serve_until_rebuilt: float,
    wakeups: Wakeups | None,
) -> Forget:
    hashed = _hashed(ledger, settings, subject)
    request = request or str(uuid.uuid4())
    if _without(request, subject) != request:
        raise BadInput("The request id names the subject, and would outlive it.", "Use one that says nothing of it.")
    if not 0 <= serve_until_rebuilt <= LONGEST_SECONDS:
        raise BadInput("To serve until rebuilt has an end within a year.", "Give seconds, 0 to 31536000.")
    until = later(now(), serve_until_rebuilt) if serve_until_rebuilt else ""
    begun = ledger.forget(request, hashed, adapters, _line(actor, 128), _line(_without(reason, subject)), asked, until)
    _tell(settings, wakeups, begun.adapters)
    return begun


def _erase(ledger: Ledger, settings: Settings, begun: Forget, keys: KeptOpen | None) -> None:
    opened = keys or KeptOpen(settings)
    try:
        contents.erase(ledger, opened(ledger), begun)
    except Unavailable as error:
        log.warning("The keeper deletes the keys: %s", error)
    finally:
        if keys is None:
            opened.close()


def allow(
    ledger: Ledger,
    settings: Settings,
    subject: str,
    adapters: Sequence[str] | None,
    *,
    actor: str,
    reason: str = "",
    request: str = "",
    wakeups: Wakeups | None = None,
) -> list[str]:
    """Let a subject be learned again from now on; the adapters concerned (`*`: all). `NotFound` when it was not
    suppressed there; with a `request` id, so that a repeated request is no error, an empty list."""
    hashed = _hashed(ledger, settings, subject)
    lifted = ledger.allow(hashed, adapters, _line(actor, 128), _line(_without(reason, subject)), request or None)
    if not lifted and not request:
        where = "any adapter" if adapters is None else ", ".join(adapters)
        raise NotFound(
            f"The subject is not suppressed for {where}.",
            "What was forgotten for all adapters is allowed for all adapters.",
        )
    _tell(settings, wakeups, lifted)
    return lifted


def _tell(settings: Settings, wakeups: Wakeups | None, adapters: Iterable[str]) -> None:
    if wakeups is not None:
        for adapter in adapters:
            wakeups.send(settings.topics.releases, adapter)
            wakeups.send(settings.topics.jobs, adapter)


def _hashed(ledger: Ledger, settings: Settings, subject: str) -> str:
    if not subject or len(subject) > 256:
        raise BadInput("A subject has 1 to 256 characters.", "Name it as the events do.")
    return subject_key(ledger, settings).subject(subject)


def _without(text: str, subject: str) -> str:
    """The text with the subject's own name struck out: facts are kept for good.

    >>> _without("ann@x.org asked us to", "ann@x.org")
    '[subject] asked us to'
    """
    return re.sub(rf"(?<!\w){re.escape(subject)}(?!\w)", "[subject]", text, flags=re.IGNORECASE)


def _line(text: str, longest: int = 1000) -> str:
    return _CONTROL_CHARACTERS.sub(" ", text)[:longest].strip()
