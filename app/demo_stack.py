"""The demo's stack: `riverdelta up` as a child, the commands run against it, and waits that say how far it is."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from riverdelta.core.errors import RiverdeltaError
from riverdelta.core.settings import Settings
from riverdelta.registry.ledger import Ledger

from .ask import Client, Question

_COMMAND = [sys.executable, "-m", "riverdelta.app.main"]
_ANSWER_TOKENS = 12
_STOP_SECONDS = 10
_PATIENCE_SECONDS = 900.0
_STILL_SECONDS = 20.0  # between two lines of what is waited for, where there is no terminal
_WIDTH = 60
# A small server is up sooner, and leaves a small machine its memory.
_SERVING = {"KV_TOKENS": "8192", "MAX_MODEL_LEN": "1024", "MAX_BATCH": "16", "ADAPTER_SLOTS": "8", "MAX_RANK": "16"}


class Story(RiverdeltaError):
    """Something that the rest of the demo rests on did not happen."""

    code = "demo"


@dataclass(frozen=True)
class Wait:
    """What was waited for, in seconds."""

    what: str
    seconds: float


class Stack:
    """A stack of its own on a data folder. Its output goes to `log`."""

    def __init__(self, data: Path, base: str, console: Console, keep: bool) -> None:
        self.data = data
        self.log = data.with_name(f"{data.name}.log")
        self.waits: list[Wait] = []
        self._base = base
        self._console = console
        self._keep = keep
        small = {f"RIVERDELTA_SERVING__{name}": value for name, value in _SERVING.items()}
        self._environment = {**small, **os.environ, "RIVERDELTA_DATA": str(data)}
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> float:
        """Start `up` and return once it answers, with the seconds that took."""
        options = ["--base", self._base, "--port", "0"]
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [*_COMMAND, "up", *options],
                env=self._environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for the demo, which then stops it
                preexec_fn=None if self._keep else _end_with_parent,  # noqa: PLW1509 - no thread runs yet
            )
        return self.wait("starting broker, dataflow, trainer, server and keeper", self._answers)

    def connect(self) -> None:
        """Open what the running stack has told its clients."""
        os.environ.update(RIVERDELTA_DATA=str(self.data))
        self.settings = Settings.read()
        self.ledger = Ledger.open(self.settings.ledger_url)
        self._client = Client(self.settings.running()["serving"])

    def stop(self) -> float | None:
        """Stop it as Ctrl-C would; the seconds that took, or None when it had to be killed."""
        if self._process is None:
            return None
        began = time.monotonic()
        try:
            self._process.send_signal(signal.SIGINT)
            self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            return None
        finally:
            self._process = None
        return time.monotonic() - began

    @property
    def pid(self) -> int:
        """The process id of `up`."""
        assert self._process is not None
        return self._process.pid

    def run(self, *arguments: str, may_fail: bool = False) -> Any:
        """What a riverdelta command prints with --json."""
        began, what = time.monotonic(), f"riverdelta {' '.join(arguments)}"
        with self._waiting(what):
            done = subprocess.run(
                [*_COMMAND, *arguments, "--json"], env=self._environment, capture_output=True, text=True, check=False
            )
        self.waits.append(Wait(what, time.monotonic() - began))
        if done.returncode and not (may_fail and done.stdout):
            raise Story(f"{what} failed: {done.stderr.strip().splitlines()[-1:]}")
        return json.loads(done.stdout)

    def ask(self, model: str, prompts: Sequence[str]) -> list[str]:
        """The model's answers, all asked at once."""
        questions = [Question(model, prompt, max_tokens=_ANSWER_TOKENS, stop=("\n",)) for prompt in prompts]
        with self._waiting(f"asking {model}"), ThreadPoolExecutor(max(1, len(questions))) as pool:
            return [answer.text.strip() for answer in pool.map(self._client.ask, questions)]

    def serves(self, adapter: str, version: int) -> bool:
        """Whether a version, or a later one, is released and already answers."""
        head = self.ledger.adapter(adapter)
        if head.release < version:
            return False
        answer = self._client.ask(Question(adapter, "?", max_tokens=1))
        return answer.fingerprint == self.ledger.version(adapter, head.release).digest

    def wait(self, what: str, condition: Callable[[], bool], seconds: float = _PATIENCE_SECONDS) -> float:
        """Return once a condition holds, with the seconds that took; `Story` when it does not in time."""
        began = time.monotonic()
        with self._waiting(what) as tell:
            while not condition():
                waited = time.monotonic() - began
                if self._process is not None and (code := self._process.poll()) is not None:
                    raise Story(f"The stack ended with exit code {code} while {what}: {self._last_line()}")
                if waited > seconds:
                    raise Story(f"After {seconds:.0f} s still {what}.")
                tell(self._last_line())
                time.sleep(0.1)
        self.waits.append(Wait(what, time.monotonic() - began))
        return self.waits[-1].seconds

    def files_with(self, text: str) -> list[Path]:
        """The files of the data folder that hold a text."""
        found = []
        for path in self.data.rglob("*"):
            with contextlib.suppress(OSError):  # gone since it was listed
                if path.is_file() and text.encode() in path.read_bytes():
                    found.append(path)
        return found

    @contextlib.contextmanager
    def _waiting(self, what: str) -> Iterator[Callable[[str], None]]:
        """A moving line while something is waited for, with the last thing that the stack has said; where there is no
        terminal, a line now and then."""
        if not self._console.is_terminal:
            over = threading.Event()
            threading.Thread(target=self._still, args=(what, over), daemon=True).start()
            try:
                yield lambda said: None
            finally:
                over.set()
            return
        columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        with Progress(*columns, console=self._console, transient=True) as bar:
            task = bar.add_task(Text(what).plain)
            yield lambda said: bar.update(task, description=f"{what} [dim]{said}[/dim]")

    def _still(self, what: str, over: threading.Event) -> None:
        began = time.monotonic()
        while not over.wait(_STILL_SECONDS):
            self._console.print(f"    [dim]still {Text(what).plain}, {time.monotonic() - began:.0f} s[/dim]")

    def _answers(self) -> bool:
        told = Settings.model_construct(data=self.data).running()
        try:
            with urllib.request.urlopen(f"{told['serving']}/readyz", timeout=1) as answer:  # noqa: S310
                return bool(answer.status == 200)
        except (OSError, KeyError):
            return False

    def _last_line(self) -> str:
        """The end of the stack's output, short enough for one line beside what is waited for."""
        with contextlib.suppress(OSError), self.log.open("rb") as log:
            log.seek(max(0, self.log.stat().st_size - 2000))
            lines = [line for line in log.read().decode(errors="replace").splitlines() if line.strip()]
            if lines:
                return lines[-1].partition("| ")[2][:_WIDTH].replace("[", r"\[")
        return ""


def _end_with_parent() -> None:
    from .broker import die_with_parent

    die_with_parent()
