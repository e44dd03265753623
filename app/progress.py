"""How far long work is: a bar on a terminal, elsewhere a line at each stage and now and then."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress

_SECONDS = 15.0  # between two lines of one stage


@contextmanager
def progress(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """What to tell: the stage, and how many parts of how many are done."""
    if console.is_terminal:
        with Progress(console=console, transient=True) as bars:
            task = bars.add_task("", total=None)
            yield lambda what, done, of: bars.update(task, description=what, completed=done, total=of)
        return
    last = ("", 0.0)

    def tell(what: str, done: int, of: int) -> None:
        nonlocal last
        now = time.monotonic()
        if what != last[0] or now - last[1] > _SECONDS:
            last = (what, now)
            console.print(f"{what}: {done} of {of}" if done else what, soft_wrap=True)

    yield tell
