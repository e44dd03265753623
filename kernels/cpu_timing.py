"""Which of several ways is faster on this CPU, whatever else it is doing meanwhile."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch


def cpu_seconds(calls: Sequence[Callable[[], object]], least_runs: int, least_seconds: float) -> list[float]:
    """The least processor time of each call, in seconds; they take turns, on one thread.

    Several threads wait for each other where other work holds a core, and a clock goes on while none runs: under load
    either would say more of the load than of the calls.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        best = [float("inf")] * len(calls)
        started, runs = time.thread_time(), 0
        while runs < least_runs or time.thread_time() - started < least_seconds:
            runs += 1
            for n, call in enumerate(calls):
                begin = time.thread_time()
                call()
                best[n] = min(best[n], time.thread_time() - begin)
        return best
    finally:
        torch.set_num_threads(threads)
