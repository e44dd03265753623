"""`riverdelta up`: the broker and the four processes under one supervisor, on one data folder."""

import json
import os
import sys
import time
import urllib.error
import urllib.request

from riverdelta.core.errors import Conflict, RiverdeltaError
from riverdelta.core.settings import UP_FILE, Settings

from . import broker, preflight
from .supervise import Children

_PARTS = {
    "stream": ["stream"],
    "train": ["train"],
    "serve": ["serve"],
    "registry": ["registry", "run"],
}
_LISTEN_SECONDS = 30
_READY_SECONDS = 0.5  # between two looks at whether the server is ready


def run(settings: Settings) -> int:
    """Check, start, and supervise until Ctrl-C; the exit code."""
    embedded = uses_embedded(settings)
    with preflight.lock_data_folder(settings.data.absolute()):
        preflight.check_ledger(settings)
        preflight.check_store(settings)
        if settings.serving.port == 0:
            settings.serving.port = broker.free_port()
        preflight.check_serving_port(settings)
        if embedded:
            broker.check_installed()
            settings.kafka.bootstrap = _embedded_address(settings)
        else:
            preflight.check_cluster(settings)
        _tell_clients(settings, embedded)
        return _Up(settings, embedded).run()


def uses_embedded(settings: Settings) -> bool:
    """Whether nothing names a cluster, so that `up` runs a broker itself."""
    running = settings.running()
    return not settings.kafka.bootstrap or (
        running.get("embedded") == "true" and settings.kafka.bootstrap == running.get("bootstrap")
    )


def _embedded_address(settings: Settings) -> str:
    """The address that clients of this data folder know, else a new one."""
    known = settings.running()
    if known.get("embedded") == "true":
        host, _, port = known["bootstrap"].rpartition(":")
        if broker.is_free(host, int(port)):
            return known["bootstrap"]
        raise Conflict(
            f"Port {port}, where this data folder's broker listens, is taken.",
            f"Stop what listens there, or delete {settings.data / UP_FILE} to choose another port.",
        )
    return f"127.0.0.1:{broker.free_port(broker.PREFERRED_PORT)}"


def _tell_clients(settings: Settings, embedded: bool) -> None:
    told = {
        "bootstrap": settings.kafka.bootstrap,
        "embedded": "true" if embedded else "false",
        "serving": settings.serving_url,
        "process": str(os.getpid()),
        "base": os.path.abspath(settings.base) if os.path.isdir(settings.base) else settings.base,
    }
    draft = settings.data / f".{UP_FILE}.{os.getpid()}"
    draft.write_text(json.dumps(told, indent=2) + "\n")
    draft.rename(settings.data / UP_FILE)
    os.environ["RIVERDELTA_KAFKA__BOOTSTRAP"] = settings.kafka.bootstrap
    os.environ["RIVERDELTA_SERVING__PORT"] = str(settings.serving.port)
    os.environ[broker.UP] = str(os.getpid())
    os.environ["RIVERDELTA_DATA"] = str(settings.data.absolute())


class _Up:
    """How far the start has come: broker, topics, the others, ready."""

    def __init__(self, settings: Settings, embedded: bool) -> None:
        self._settings = settings
        self._embedded = embedded
        command = [sys.executable, "-m", "riverdelta.app.main"]
        first = {"broker": [*command, "broker", settings.kafka.bootstrap]} if embedded else {}
        others = {name: [*command, *arguments] for name, arguments in _PARTS.items()}
        self._children = Children(first, others, self._tick)
        self._brokers = -1  # the broker's run that topics were made on
        self._ready = False
        self._began = time.monotonic()
        self._look_at = 0.0

    def run(self) -> int:
        """Until it ends."""
        started = f"data folder {self._settings.data}, base {self._settings.base}"
        self._children.say(f"Starting: {started}. Ctrl-C stops everything.")
        if self._embedded:
            self._say_what_is_gone()
        self._children.run()
        self._children.say("Stopped.")
        return self._children.code

    def _say_what_is_gone(self) -> None:
        from riverdelta.registry.ledger import Ledger

        ledger = Ledger.open(self._settings.ledger_url)
        sealed = sum(adapter.next_index for adapter in ledger.adapters())
        ledger.close()
        if sealed:
            self._children.say(
                f"The embedded broker keeps events in memory only. {sealed} entries were sealed and stay; "
                "events that were not sealed when it last stopped are gone: publish them again."
            )

    def _tick(self, children: Children) -> None:
        brokers = children.exits.get("broker", 0)
        if brokers != self._brokers:
            if not self._broker_listens(children):
                return
            if self._brokers >= 0:
                children.say("The broker came back empty, as it keeps events in memory only: topics are made again.")
            self._make_topics(children)
            self._brokers = brokers
            children.start_others()
        elif not self._ready and time.monotonic() > self._look_at and self._answers():
            self._ready = True
            children.say(_card(self._settings, time.monotonic() - self._began))

    def _broker_listens(self, children: Children) -> bool:
        if any(broker.listens(server.strip()) for server in self._settings.kafka.bootstrap.split(",")):
            return True
        if self._brokers < 0 and time.monotonic() - self._began > _LISTEN_SECONDS:
            children.give_up(8, f"No broker listens on {self._settings.kafka.bootstrap} after {_LISTEN_SECONDS} s.")
        return False

    def _make_topics(self, children: Children) -> None:
        from riverdelta.streams.topics import ensure

        try:
            ensure(self._settings)
        except RiverdeltaError as error:
            children.give_up(error.exit_code, f"The topics cannot be made: {error}")

    def _answers(self) -> bool:
        self._look_at = time.monotonic() + _READY_SECONDS
        try:
            with urllib.request.urlopen(f"{self._settings.serving_url}/readyz", timeout=0.5) as answer:  # noqa: S310
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False


def _card(settings: Settings, seconds: float) -> str:
    data = f" --data {settings.data}" if str(settings.data) != "riverdelta-data" else ""
    return f"""
Ready after {seconds:.0f} s.
  serving      {settings.serving_url}/v1  (OpenAI-compatible)
  bootstrap    {settings.kafka.bootstrap}  (topic {settings.topics.events})
  data folder  {settings.data.absolute()}
  make         riverdelta registry create acme{data}
  publish      riverdelta publish events.jsonl --adapter acme{data}
  ask          riverdelta ask acme "Q: ...?\\nA:"{data}
  roll back    riverdelta registry rollback acme{data}
  MLflow       mlflow ui --backend-store-uri {settings.mlflow_uri}
"""
