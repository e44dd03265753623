"""What a GPU kernel costs inside a captured graph with nothing left in the L2 cache from the last round."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median

import torch


def cold_sets(bytes_per_set: int, device: torch.device | str = "cuda", limit: int = 256) -> int:
    """How many input sets to rotate through so that a round moves four times the L2 cache."""
    l2 = torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, min(limit, -(-4 * l2 // bytes_per_set)))


def capture(calls: Sequence[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    """All calls, one after the other, as one CUDA graph. Each is run once before, to compile it."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def microseconds(graphs: Sequence[tuple[torch.cuda.CUDAGraph, int]], rounds: int = 7) -> list[float]:
    """Median time per call of each (graph, calls in it), the graphs taking turns."""
    samples: list[list[float]] = [[] for _ in graphs]
    for graph, _ in graphs:
        graph.replay()
    for _ in range(rounds):
        for (graph, calls), times in zip(graphs, samples, strict=True):
            graph.replay()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            begin.record()
            graph.replay()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) * 500 / calls)
    return [median(times) for times in samples]
