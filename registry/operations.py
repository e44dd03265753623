"""The acts behind the command line, the HTTP face and the control topic: a ledger transaction, then the wake-ups.

Every act is durable when it returns; wake-ups only make it felt sooner. Subjects come in as plain text and go
no further than here: what is stored is their keyed hash.
"""

import logging
import os
import re
import time
import unicodedata
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from riverdelta.core.errors import BadInput, Conflict, Corrupt, NotFound, Unavailable
from riverdelta.core.names import subject_name
from riverdelta.core.recipe import Recipe
from riverdelta.core.settings import Settings
from riverdelta.core.store import ObjectStore
from riverdelta.core.times import later, now

from . import certificate, contents
from .belonging import KeptOpen, key_store, subject_key
from .kafka_ends import log_ends
from .ledger import AdapterRecord, Forget, Hand, Lease, Ledger, Mode, Stage
from .ledger.journal import EVERYWHERE
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
    """What a forget has done so far: all servers have carried out its fence; what is left follows by itself.

    `lost` names the servers that were given up for lost, `seconds` is the time from the request to the last
    acknowledgement, `receipt` what was written of the subject's entries.
    """

    forget: Forget
    lost: list[str]
    seconds: float
    receipt: certificate.Receipt | None = None


def forget_json(forget: Forget, sees: Callable[[str], bool] = lambda adapter: True) -> dict[str, Any]:
    """A forget as scripts are told of it, as far as it is about adapters that one `sees`: the epoch that it gave each,
    the versions that it revoked and the entries that it erased."""
    doomed = [part for part in forget.body["doomed"] if sees(part["adapter"])]
    return {
        "request_id": forget.id,
        "stage": str(forget.stage),
        "done": forget.stage is Stage.PURGED,
        "at": forget.at,
        "everywhere": forget.everywhere,
        "adapters": {name: epoch for name, epoch in sorted(forget.adapters.items()) if sees(name)},
        "revoked": {part["adapter"]: part["versions"] for part in doomed if part["versions"]},
        "entries": sum(part["entries"] for part in doomed),
        "certificate": forget.body.get("certificate"),
    }


class Operations:
    """What one actor does to adapters."""

    def __init__(
        self,
        ledger: Ledger,
        settings: Settings,
        actor: str,
        wakeups: Wakeups | None = None,
        keys: KeptOpen | None = None,
    ) -> None:
        """`actor` stands in the journal beside every act. Who forgets often gives the `keys`, kept open."""
        self._ledger = ledger
        self._settings = settings
        self._actor = _line(actor, 128)
        self._wakeups = wakeups
        self._keys = keys

    def create(self, adapter: str, recipe: Recipe, reason: str = "") -> AdapterRecord:
        """Make an adapter. It answers as the base until it has learned."""
        return self._told(self._ledger.create(adapter, recipe, self._actor, _line(reason)))

    def import_folder(self, adapter: str, folder: Path, base: Path, reason: str = "") -> AdapterRecord:
        """Make a LoRA that was trained elsewhere, for the base model in `base`, version 1 of a new adapter."""
        from .peft_io import base_linears, import_folder  # torch: only who imports waits for it

        store = ObjectStore(self._settings.store_url)
        import_folder(self._ledger, store, adapter, folder, base_linears(base), self._actor, _line(reason))
        return self._told(self._ledger.adapter(adapter))

    def rollback(self, adapter: str, version: int | None, reason: str = "") -> AdapterRecord:
        """Move the release to an earlier version (None: the released one's parent; 0: the base) and hold it there."""
        return self._told(self._ledger.rollback(adapter, version, self._actor, _line(reason)))

    def release(self, adapter: str, version: int, reason: str = "") -> AdapterRecord:
        """Move the release, without a hold: the next increment takes over from it."""
        return self._told(self._ledger.release(adapter, version, self._actor, _line(reason)))

    def resume(self, adapter: str, mode: Mode, reason: str = "") -> AdapterRecord:
        """End a hold: `continue` with new segments only, `replay` what was set aside, or return to the newest
        (`tip`)."""
        return self._told(self._ledger.resume(adapter, mode, self._actor, _line(reason)))

    def decide(self, adapter: str, segment: int, hand: Hand, reason: str = "") -> AdapterRecord:
        """Accept or discard a segment by hand, whatever the gate says, now and at every rebuild."""
        return self._told(self._ledger.decide_by_hand(adapter, segment, hand, self._actor, _line(reason)))

    def forget(
        self,
        subject: str,
        adapters: Sequence[str] | None,
        reason: str = "",
        request: str = "",
        serve_until_rebuilt: float = 0.0,
        progress: Progress | None = None,
        receipt: Path | None = None,
    ) -> ForgetReport:
        """Forget a subject in some adapters (None: in all, those to come included), and wait for the servers.

        `progress` is called with the leases that are still waited for. A `request` id seen before starts nothing new
        and gives the procedure as it stands. With `serve_until_rebuilt`, servers go on answering with the releases
        that they have until those are rebuilt, or for so many seconds at most: all other versions that saw the subject
        are waited for here, and the keeper fences these later. `receipt` is a new file for what the subject's entries
        say: nothing is forgotten unless it is written, and it is written for nothing that is refused.
        """
        start = time.monotonic()
        request = request or str(uuid.uuid4())
        made = None
        if receipt is not None and begun_forget(self._ledger, request) is None:
            made = write_receipt(self._ledger, self._settings, subject, adapters, receipt)
        try:
            begun = self._begin(subject, adapters, reason, request, None, serve_until_rebuilt, receipt is not None)
        except BaseException as error:
            # A conflict may be with one that somebody else has begun meanwhile.
            refused = isinstance(error, Conflict) or begun_forget(self._ledger, request) is None
            if made is not None and receipt is not None and refused:
                receipt.unlink(missing_ok=True)  # it is their data, and would be in the way of the next attempt
            raise
        # First of all nobody answers with it.
        lost = self._ledger.await_fence(begun.fence, ["server"], progress=progress)
        self._erase(begun)
        done = begun
        if begun.stage is not Stage.LENDING:
            done = self._ledger.advance(begun.id, Stage.ACKNOWLEDGED, {"lost": lost}, self._actor)
        return ForgetReport(done, lost, time.monotonic() - start, made)

    def fence(
        self,
        subject: str,
        adapters: Sequence[str] | None,
        reason: str,
        request: str,
        serve_until_rebuilt: float = 0.0,
        asked: Mapping[str, Any] | None = None,
    ) -> Forget:
        """The forget's transaction and the deletion of keys: durable, and followed up by the keeper. `asked` says where
        a message that asked for it lies, and when it was sent: nobody is there to be told that an adapter does not
        exist, so the subject is suppressed for when it does."""
        begun = self._begin(subject, adapters, reason, request, asked, serve_until_rebuilt)
        try:
            self._erase(begun)
        except Corrupt as error:  # one damaged key must not keep the requests of others waiting
            log.error("The keeper is to delete the keys: %s", error, extra={"request": begun.id})
        return begun

    def allow(
        self,
        subject: str,
        adapters: Sequence[str] | None,
        reason: str = "",
        request: str = "",
        asked: Mapping[str, Any] | None = None,
    ) -> list[str]:
        """Let a subject be learned again, from what is sent to Kafka from now on; the adapters concerned (`*`: all).
        `NotFound` when it was not suppressed there; with a `request` id, so that a repeated request is no error, an
        empty list. `Unavailable` while there is something to end and nobody says what was sent before; `Conflict` where
        the subject was forgotten since: meanwhile, or after the message that `asked` was sent (see `fence`)."""
        fence = self._ledger.last_fence()  # before the ends: what was sent before a forget stays forgotten
        hashed = _hashed(self._ledger, self._settings, subject)
        reason = _line(_without(reason, subject))
        held = self._ledger.suppressed_in(hashed)
        if held if adapters is None else held & set(adapters):
            ends = log_ends(self._settings)
            if not ends and self._ledger.has_read():  # what was sent before could not be told from what comes
                raise Unavailable(
                    "Nothing says where the log ends that the dataflow reads.",
                    "Name its broker with kafka.bootstrap, or start `riverdelta up`.",
                )
            lifted = self._ledger.allow(hashed, adapters, self._actor, reason, request or None, ends, fence, asked)
        else:  # the request counts as carried out, and lifts nothing that a forget suppresses just now
            lifted = self._ledger.allow(hashed, [], self._actor, reason, request or None)
        if not lifted and not request:
            where = "any adapter" if adapters is None else ", ".join(adapters)
            raise NotFound(
                f"The subject is not suppressed for {where}.",
                "Check the spelling; `riverdelta registry log NAME` shows what was forgotten in an adapter.",
            )
        self._wake(lifted)
        return lifted

    def _wake(self, adapters: Iterable[str]) -> None:
        """Wake whoever serves or trains these adapters."""
        if self._wakeups is not None:
            for adapter in adapters:
                self._wakeups.send(self._settings.topics.releases, adapter)
                self._wakeups.send(self._settings.topics.jobs, adapter)

    def _begin(
        self,
        subject: str,
        adapters: Sequence[str] | None,
        reason: str,
        request: str,
        asked: Mapping[str, Any] | None,
        serve_until_rebuilt: float,
        receipt: bool = False,
    ) -> Forget:
        hashed = _hashed(self._ledger, self._settings, subject)
        if names(request, subject):
            raise BadInput(
                "The request id names the subject, and would outlive it.", "Use one that says nothing of it."
            )
        if not 0 <= serve_until_rebuilt <= LONGEST_SECONDS:
            raise BadInput("To serve until rebuilt has an end within a year.", "Give seconds, 0 to 31536000.")
        until = later(now(), serve_until_rebuilt) if serve_until_rebuilt else ""
        reason = _line(_without(reason, subject))
        ahead = asked is not None
        begun = self._ledger.forget(request, hashed, adapters, self._actor, reason, asked, until, ahead, receipt)
        self._wake(begun.adapters)
        return begun

    def _erase(self, begun: Forget) -> None:
        opened = self._keys or KeptOpen(self._settings)
        try:
            contents.erase(self._ledger, opened(self._ledger), begun)
        except Unavailable as error:
            log.warning("The keeper deletes the keys: %s", error)
        finally:
            if self._keys is None:
                opened.close()

    def _told(self, head: AdapterRecord) -> AdapterRecord:
        self._wake([head.name])
        return head


def begun_forget(ledger: Ledger, request: str) -> Forget | None:
    """The procedure of a request, if it has begun."""
    try:
        return ledger.forget_of(request)
    except NotFound:
        return None


def is_forgotten(ledger: Ledger, settings: Settings, subject: str, adapters: Sequence[str] | None) -> bool:
    """Whether some adapters (None: all, those to come included) learn nothing of a subject as it is."""
    hashed = _hashed(ledger, settings, subject)
    return all(hashed in ledger.suppressed(name) for name in ([EVERYWHERE] if adapters is None else adapters))


def write_receipt(
    ledger: Ledger, settings: Settings, subject: str, adapters: Sequence[str] | None, path: Path
) -> certificate.Receipt:
    """Write what a subject's entries say now to a new file that only its owner may read."""
    keys = key_store(ledger, settings)
    try:
        hashed = _hashed(ledger, settings, subject)
        made = certificate.receipt(ledger, ObjectStore(settings.store_url), keys, hashed, adapters)
    finally:
        keys.close()
    try:
        with open(path, "xb", opener=partial(os.open, mode=0o600)) as file:
            try:
                file.write(msgspec.json.encode(made))
                file.flush()
                os.fsync(file.fileno())  # nobody can write it again once the keys are gone
            except BaseException:
                path.unlink(missing_ok=True)
                raise
    except OSError as error:
        raise BadInput(f"Cannot write {path}: {error.strerror}.", "Name a new file for the receipt.") from error
    return made


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


def _hashed(ledger: Ledger, settings: Settings, subject: str) -> str:
    if not subject or len(subject) > 256:
        raise BadInput("A subject has 1 to 256 characters.", "Name it as the events do.")
    return subject_key(ledger, settings).subject(subject)


def names(text: str, subject: str) -> bool:
    """Whether the subject's own name stands in a text.

    >>> names("dsr_ann_2026", "ann"), names("annual report", "ann"), names("dsr-2026", "ann")
    (True, False, False)
    """
    return _without(text, subject) != subject_name(text)


def _without(text: str, subject: str) -> str:
    """The text with the subject's own name struck out: facts are kept for good. A name of few letters is one only where
    it stands for itself, in scripts that set words apart.

    >>> _without("Ann@x.org asked us to", "ann@x.org")
    '[subject] asked us to'
    >>> _without("of ANN\\n LEE, STRASSE 5", "Ann Lee"), _without("of STRASSE 5", "Straße 5")
    ('of [subject], STRASSE 5', 'of [subject]')
    >>> _without("ß assesses", "ß"), _without("by Éa, idéal", "éa"), _without("请李写", "李")
    ('[subject] assesses', 'by [subject], idéal', '请[subject]写')
    """
    text = subject_name(text)
    plain = _folded(subject_name(subject))[0].strip()
    if not plain:
        return text
    name = r"\s+".join(map(re.escape, re.split(r"\s+", plain)))
    if len(plain) < 4 and (plain.isascii() or plain != plain.upper()):  # scripts with capitals have spaces
        name = rf"(?<![^\W_]){name}(?![^\W_])"
    folded, places = _folded(text)
    kept, end = "", 0
    for found in re.finditer(name, folded):
        kept += text[end : places[found.start()]] + "[subject]"
        end = places[found.end() - 1] + 1
    return kept + text[end:]


def _folded(text: str) -> tuple[str, list[int]]:
    """The text without what readers do not tell apart: case, forms of a letter, kinds of space, what is invisible. For
    each letter of it the place that it comes from."""
    letters: list[tuple[str, int]] = []
    for place, letter in enumerate(text):
        for each in unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", letter).casefold()):
            kind = unicodedata.category(each)
            if kind != "Cf":
                letters.append((" " if kind == "Cc" else each, place))
    return "".join(letter for letter, _ in letters), [place for _, place in letters]


def _line(text: str, longest: int = 1000) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # of an argument's bytes
        raise BadInput("A reason, or an actor's name, is not UTF-8.", "Write it in UTF-8.") from error
    return _CONTROL_CHARACTERS.sub(" ", text)[:longest].strip()
