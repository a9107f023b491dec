"""Latencies: calls by the clock, and replays of a CUDA graph by the GPU's own events."""

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

WARM_UP_CALLS = 2


@dataclass(frozen=True)
class Times:
    """Milliseconds over the repeats: median, minimum, and the 10th and 90th percentile."""

    median: float
    min: float
    p10: float
    p90: float

    @classmethod
    def of(cls, milliseconds: list[float]) -> "Times":
        values = torch.tensor(milliseconds, dtype=torch.float64)
        quantiles = values.quantile(torch.tensor([0.5, 0.1, 0.9], dtype=torch.float64)).tolist()
        return cls(quantiles[0], min(milliseconds), *quantiles[1:])


def timed(call: Callable[[], object], device: torch.device) -> tuple[float, object]:
    """Milliseconds of one call until its work is done, and what it returned."""
    _wait(device)
    start = time.perf_counter()
    output = call()
    _wait(device)
    return 1e3 * (time.perf_counter() - start), output


def time_calls(call: Callable[[], object], repeats: int, device: torch.device, tick: Callable[[int], None]) -> Times:
    """Each call waits for the one before; ``tick(done)`` is called in between, untimed."""
    times = []
    for i in range(repeats):
        times.append(timed(call, device)[0])
        tick(i + 1)
    return Times.of(times)


def capture(call: Callable[[], object]) -> tuple["torch.cuda.CUDAGraph", object]:
    """``call`` as a CUDA graph, and the output that each replay writes."""
    stream = _capture_stream(torch.cuda.current_device())
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP_CALLS):  # libraries that plan on first use do so for each stream
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # The outer one restores the caller's stream also where the capture fails.
    with torch.cuda.stream(stream), torch.cuda.graph(graph, stream=stream):
        output = call()
    return graph, output


@functools.cache
def _capture_stream(device: int) -> "torch.cuda.Stream":
    """One for all captures: cuBLAS keeps a workspace for every stream that it has seen."""
    return torch.cuda.Stream(device)


def time_replays(graph: "torch.cuda.CUDAGraph", repeats: int, warmup: int) -> Times:
    """Replays follow one another without a pause, so that the GPU's clock stays up; events stand between them."""
    for _ in range(warmup):
        graph.replay()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    torch.cuda.synchronize()
    return Times.of([start.elapsed_time(end) for start, end in zip(events[:-1], events[1:], strict=True)])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
