"""What is timed is work, not waiting."""

import time

import torch

from riverdelta.kernels.cpu_timing import cpu_seconds


def test_waiting_costs_nothing_and_threads_are_given_back():
    threads = torch.get_num_threads()
    given = torch.randn(300, 300)
    waiting, working = cpu_seconds([lambda: time.sleep(0.05), lambda: given @ given @ given], 3, 0.0)
    assert waiting < working
    assert torch.get_num_threads() == threads
