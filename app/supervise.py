"""Running children under supervisor (supervisord.org): prefixed output, restarts with backoff, a stop in order."""

import configparser
import contextlib
import os
import shlex
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence

from supervisor import events
from supervisor.medusa.asyncore_25 import ExitNow
from supervisor.options import ServerOptions, decode_wait_status
from supervisor.process import Subprocess
from supervisor.states import STOPPED_STATES, ProcessStates, SupervisorStates
from supervisor.supervisord import Supervisor

_SETTLED_SECONDS = 10  # a child that lives this long starts its count of failures anew
_RETRIES = 12  # 1, 2, 3 ... seconds apart: more than a minute of trying
_HOPELESS = 3  # exits in a row with a code that says that trying again will not help
_HOPELESS_CODES = range(2, 8)  # core.errors: from bad input to corrupt; not `Unavailable`, which passes
_STOP_SECONDS = 3
_LAST_STOP_SECONDS = 1  # of those that stop last: five seconds must be enough for all
_TURN_SECONDS = 0.2
_COLOURS = (36, 33, 32, 35, 34, 31)


class Children(Supervisor):  # type: ignore[misc]
    """Children by name. `first` starts at once, the others when `start_others` is called.

    `on_tick` is called at least once a second; `on_exit` with the name and exit code of a child that ended by itself.
    """

    def __init__(
        self,
        first: Mapping[str, Sequence[str]],
        others: Mapping[str, Sequence[str]],
        on_tick: Callable[["Children"], None],
    ) -> None:
        super().__init__(_options(first, others))
        poll = self.options.poller.poll
        self.options.poller.poll = lambda timeout: poll(min(timeout, _TURN_SECONDS))  # a signal waits no longer
        self._others = list(others)
        self._on_tick = on_tick
        self._names = [*first, *others]
        self._width = max(map(len, self._names))
        self._partial: dict[str, bytes] = {}
        self._failures: dict[str, int] = {}
        self.exits: dict[str, int] = {}
        self.code = 0

    def run(self) -> None:
        """Run the children until a signal or `give_up`; `code` says how it ended."""
        self.options.make_logger()
        with contextlib.suppress(ExitNow):
            super().run()

    def runforever(self) -> None:
        """Called by supervisor once its own event table is cleared."""
        events.subscribe(events.ProcessLogEvent, lambda event: self._write(event.process.config.name, event.data))
        events.subscribe(events.ProcessStateBackoffEvent, self._ended)
        events.subscribe(events.ProcessStateExitedEvent, self._ended)
        events.subscribe(events.ProcessStateFatalEvent, self._fatal)
        super().runforever()

    def tick(self, now: float | None = None) -> None:
        """One turn of the loop."""
        super().tick(now)
        if self.options.mood == SupervisorStates.RUNNING:
            self._on_tick(self)

    def start_others(self) -> None:
        """Start the children that have waited."""
        for name in self._others:
            process = self.process(name)
            if process.get_state() in STOPPED_STATES:
                process.spawn()

    def process(self, name: str) -> Subprocess:
        """A child."""
        return next(group.processes[name] for group in self.process_groups.values() if name in group.processes)

    def say(self, text: str) -> None:
        """Print lines under the supervisor's own name."""
        for line in text.splitlines() or [""]:
            self._write("up", line.encode() + b"\n")

    def give_up(self, code: int, why: str) -> None:
        """Stop every child and end with an exit code."""
        self.say(why)
        self.code = code
        self.options.mood = SupervisorStates.SHUTDOWN

    def _ended(self, event: events.ProcessStateEvent) -> None:
        process = event.process
        name = process.config.name
        if name in self._partial:
            self._write(name, b"\n")
        code, how = decode_wait_status(self.options.statuses.get(name, 0))
        self._failures[name] = self._failures.get(name, 0) + 1 if code in _HOPELESS_CODES else 0
        self.exits[name] = self.exits.get(name, 0) + 1
        if self._failures[name] >= _HOPELESS:
            self.give_up(code, f"{name} cannot run: it said above what is wrong. Everything else is stopped.")
        else:
            wait = f" in {process.backoff} s" if process.get_state() == ProcessStates.BACKOFF else ""
            self.say(f"{name} ended ({how}); it starts again{wait}.")

    def _fatal(self, event: events.ProcessStateEvent) -> None:
        name = event.process.config.name
        if self.options.mood != SupervisorStates.RUNNING:
            return  # a child that waited to start again, and now will not
        self.give_up(1, f"{name} ended {_RETRIES + 1} times soon after its start: everything else is stopped.")

    def _write(self, name: str, data: bytes) -> None:
        lines = (self._partial.pop(name, b"") + data).split(b"\n")
        if lines[-1]:
            self._partial[name] = lines[-1]
        mark = f"{name:<{self._width}} |"
        if sys.stdout.isatty():
            index = self._names.index(name) if name in self._names else -1
            mark = f"\x1b[{_COLOURS[index % len(_COLOURS)]}m{mark}\x1b[0m"
        for line in lines[:-1]:
            sys.stdout.write(f"{mark} {line.decode(errors='replace').rstrip()}\n")
        sys.stdout.flush()


class _Options(ServerOptions):  # type: ignore[misc]
    """Supervisor's options, which also keep how each child ended."""

    def __init__(self) -> None:
        super().__init__()
        self.statuses: dict[str, int] = {}
        self.test = False

    def write_pidfile(self) -> None:
        """None: what runs is known by the data folder's lock."""

    def waitpid(self) -> tuple[int | None, int | None]:
        pid, status = super().waitpid()
        if pid in self.pidhistory:
            self.statuses[self.pidhistory[pid].config.name] = status
        return pid, status


def _options(first: Mapping[str, Sequence[str]], others: Mapping[str, Sequence[str]]) -> _Options:
    """Supervisor's configuration: no files, no network, every line of every child as an event."""
    file = configparser.RawConfigParser()
    file["supervisord"] = {
        "nodaemon": "true",
        "silent": "true",
        "logfile": os.devnull,
        "logfile_maxbytes": "0",
    }
    for commands, priority, autostart in ((first, 1, "true"), (others, 2, "false")):
        if not commands:
            continue
        # The highest priority stops first, and one group's children stop together.
        file[f"group:{'first' if priority == 1 else 'others'}"] = {
            "programs": ",".join(commands),
            "priority": str(priority),
        }
        for name, command in commands.items():
            file[f"program:{name}"] = {
                "command": shlex.join(command).replace("%", "%%"),
                "autostart": autostart,
                "autorestart": "true",
                "startsecs": str(_SETTLED_SECONDS),
                "startretries": str(_RETRIES),
                "stopwaitsecs": str(_LAST_STOP_SECONDS if priority == 1 else _STOP_SECONDS),
                "stopasgroup": "true",
                "killasgroup": "true",
                "redirect_stderr": "true",
                "stdout_logfile": "NONE",
                "stdout_events_enabled": "true",
            }
    options = _Options()
    with tempfile.NamedTemporaryFile("w", suffix=".conf") as config:
        file.write(config)
        config.flush()
        options.realize(["-c", config.name])
    return options
