"""The acts behind the command line, the HTTP face and the control topic: a ledger transaction, then the wake-ups.

Every act is durable when its function returns; wake-ups only make it felt sooner. Subjects come in as plain text and go
no further than here: what is stored is their keyed hash.
"""

import re
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from riverdelta.core.errors import BadInput, NotFound
from riverdelta.core.keys import SubjectKey
from riverdelta.core.settings import Settings

from .ledger import AdapterRecord, Forget, Lease, Ledger, Mode, Stage
from .wakeups import Wakeups

Progress = Callable[[list[Lease]], None]
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


def forget(
    ledger: Ledger,
    settings: Settings,
    subject: str,
    adapters: Sequence[str] | None,
    *,
    actor: str,
    reason: str = "",
    request: str = "",
    wakeups: Wakeups | None = None,
    progress: Progress | None = None,
) -> ForgetReport:
    """Forget a subject in some adapters (None: in all, those to come included), and wait for the servers.

    `progress` is called with the leases that are still waited for. A `request` id seen before starts nothing new
    and gives the procedure as it stands.
    """
    start = time.monotonic()
    begun = fence(ledger, settings, subject, adapters, actor=actor, reason=reason, request=request, wakeups=wakeups)
    lost = ledger.await_fence(begun.fence, ["server"], progress=progress)
    done = ledger.advance(begun.id, Stage.ACKNOWLEDGED, {"lost": lost}, _line(actor, 128))
    revoked = {part["adapter"]: len(part["versions"]) for part in done.body["doomed"]}
    return ForgetReport(done, revoked, lost, time.monotonic() - start)


def await_purge(ledger: Ledger, request: str, every: float = 0.2) -> Forget:
    """Wait until the keeper has purged what a forget wrote off; its procedure then."""
    while True:
        forget = ledger.forget_of(request)
        if forget.stage is Stage.PURGED:
            return forget
        time.sleep(every)


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
    wakeups: Wakeups | None = None,
) -> Forget:
    """The forget's transaction alone: durable, and followed up by the keeper. `asked` says where a message that asked
    for it lies."""
    hashed = _hashed(settings, subject)
    request = request or str(uuid.uuid4())
    if _without(request, subject) != request:
        raise BadInput("The request id names the subject, and would outlive it.", "Use one that says nothing of it.")
    begun = ledger.forget(request, hashed, adapters, _line(actor, 128), _line(_without(reason, subject)), asked)
    _tell(settings, wakeups, begun.adapters)
    return begun


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
    hashed = _hashed(settings, subject)
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


def _hashed(settings: Settings, subject: str) -> str:
    if not subject or len(subject) > 256:
        raise BadInput("A subject has 1 to 256 characters.", "Name it as the events do.")
    return SubjectKey.open(settings.keys_dir).subject(subject)


def _without(text: str, subject: str) -> str:
    """The text with the subject's own name struck out: facts are kept for good.

    >>> _without("ann@x.org asked us to", "ann@x.org")
    '[subject] asked us to'
    """
    return re.sub(rf"(?<!\w){re.escape(subject)}(?!\w)", "[subject]", text, flags=re.IGNORECASE)


def _line(text: str, longest: int = 1000) -> str:
    return _CONTROL_CHARACTERS.sub(" ", text)[:longest].strip()
