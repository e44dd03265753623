"""The supervisor around real children: output, restarts, giving up, and stopping."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(30)
_SCRIPT = """
import sys
from riverdelta.app.supervise import Children

def child(code):
    return [sys.executable, "-u", "-c", code]

children = Children(
    {"first": child(sys.argv[1])}, {"other": child(sys.argv[2])}, lambda children: children.start_others()
)
children.run()
sys.exit(children.code)
"""
_WAIT = "import time; print('here: 100%'); time.sleep(60)"

_TELLS = """
import signal, sys, time
def end(*_):
    open(sys.argv[1], "a").write(sys.argv[2])
    sys.exit()
signal.signal(signal.SIGTERM, end)
print("ready")
time.sleep(60)
"""


class Run:
    """One supervisor in a process of its own."""

    def __init__(self, first: str, other: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", _SCRIPT, first, other], stdout=subprocess.PIPE, text=True
        )
        self.lines: list[str] = []

    def until(self, text: str) -> str:
        if said := next((line for line in self.lines if text in line), ""):
            self.lines.remove(said)
            return said
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if text in line:
                return line.rstrip()
            self.lines.append(line.rstrip())
        raise AssertionError(f"{text!r} was not said: {self.lines}")


@pytest.fixture
def runs() -> Iterator[list[Run]]:
    made: list[Run] = []
    yield made
    for run in made:
        run.process.kill()
        run.process.wait()


def test_lines_carry_the_name_of_their_child(runs: list[Run]) -> None:
    runs.append(Run(_WAIT, "import sys; sys.stderr.write('half'); sys.exit(0)"))
    assert runs[0].until("here") == "first | here: 100%"
    assert runs[0].until("half") == "other | half"


def test_a_killed_child_starts_again(runs: list[Run]) -> None:
    runs.append(Run(_WAIT, "import os, time; print('pid', os.getpid()); time.sleep(60)"))
    pid = int(runs[0].until("pid").split()[-1])
    os.kill(pid, signal.SIGKILL)
    assert "starts again in 1 s" in runs[0].until("SIGKILL")
    assert int(runs[0].until("pid").split()[-1]) != pid


def test_a_child_with_wrong_settings_ends_everything(runs: list[Run]) -> None:
    runs.append(Run(_WAIT, "import sys; sys.exit(2)"))
    runs[0].until("other cannot run")
    assert runs[0].process.wait(10) == 2


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_stops_in_order(runs: list[Run], tmp_path: Path, how: signal.Signals) -> None:
    told, script = tmp_path / "told", tmp_path / "child.py"
    script.write_text(_TELLS)
    runs.append(
        Run(
            *(
                f"import sys; sys.argv[1:] = [{str(told)!r}, {name!r}]; exec(open({str(script)!r}).read())"
                for name in ("first ", "other ")
            )
        )
    )
    runs[0].until("first | ready")
    runs[0].until("other | ready")
    runs[0].process.send_signal(how)
    assert runs[0].process.wait(5) == 0
    assert told.read_text() == "other first "


def test_a_child_that_will_not_stop_is_killed(runs: list[Run]) -> None:
    stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready'); time.sleep(60)"
    runs.append(Run(_WAIT, stubborn))
    runs[0].until("ready")
    began = time.monotonic()
    runs[0].process.terminate()
    assert runs[0].process.wait(10) == 0
    assert time.monotonic() - began < 5


def test_children_end_with_their_supervisor(runs: list[Run]) -> None:
    child = (
        "import os, time; from riverdelta.app.broker import die_with_parent; die_with_parent(); "
        "print('pid', os.getpid()); time.sleep(60)"
    )
    runs.append(Run(_WAIT, child))
    pid = int(runs[0].until("pid").split()[-1])
    runs[0].process.kill()
    runs[0].process.wait()
    for _ in range(100):
        if not _alive(pid):
            return
        time.sleep(0.05)
    raise AssertionError("the child outlived its supervisor")


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
