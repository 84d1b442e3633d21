"""Times calls on a GPU (one CUDA graph of many launches over rotated weights) and checks their results beforehand."""

from __future__ import annotations

import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

Call = Callable[[], Tensor]

WORKING_SET, TIMES_L2, MOST_COPIES = 250e6, 4, 128
GRAPH_US, SAMPLES_US, REPEATS, FEWEST_REPEATS = 800.0, 150e3, 11, 3
SAMPLED_ROWS, SAMPLED_TOKENS = 96, 64


class WrongResult(Exception):
    """A result is not what it should be; it gets no time."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Microseconds of one call: the median over replays, and the distance of the slowest from the fastest."""

    median_us: float
    spread_us: float


def l2_bytes(device: torch.device) -> int:
    """Return the size of the last-level cache of a GPU, 0 for other devices."""
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0


def copies_for(bytes_read: float, l2: int) -> int:
    """Return how many copies of a weight to rotate through so that none is still cached when its turn comes."""
    return max(2, min(MOST_COPIES, math.ceil(max(WORKING_SET, TIMES_L2 * l2) / bytes_read)))


def measure(calls: Sequence[Callable[[], Any]], device: torch.device, repeats: int = REPEATS) -> Timing:
    """Time `calls`, one after another and over again.

    On a GPU they are captured into one graph, as often as makes it last `GRAPH_US`; events stand between replays that
    follow one another without a gap. Elsewhere a clock is read, to try the benchmark out.
    """
    if device.type != "cuda":
        return _summary([_seconds(calls) * 1e6 / len(calls) for _ in range(repeats)])
    stream = torch.cuda.Stream()
    graph = _capture(calls, 1, stream)
    once = min(_replay(graph, 2))
    rounds = max(1, math.ceil(GRAPH_US / once))
    if rounds > 1:
        graph = _capture(calls, rounds, stream)
    repeats = max(FEWEST_REPEATS, min(repeats, int(SAMPLES_US / (once * rounds))))
    return _summary([us / (rounds * len(calls)) for us in _replay(graph, repeats)])


def _summary(samples: Sequence[float]) -> Timing:
    return Timing(statistics.median(samples), max(samples) - min(samples))


def _seconds(calls: Sequence[Callable[[], Any]]) -> float:
    start = time.perf_counter()
    for call in calls:
        call()
    return time.perf_counter() - start


def _capture(calls: Sequence[Callable[[], Any]], rounds: int, stream: torch.cuda.Stream) -> torch.cuda.CUDAGraph:
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls[:2]:  # handles and workspaces belong to a stream; GemLite restarts its ring of outputs
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(rounds):
            for call in calls:
                call()
    return graph


def _replay(graph: torch.cuda.CUDAGraph, times: int) -> list[float]:
    """Return microseconds of each replay, one before the first left out: it waits for its own launch."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(times + 2)]
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) * 1e3 for a, b in pairwise(events)][1:]


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill what is allocated with NaN or the largest integer: an output that nothing writes shows."""
    before = torch.are_deterministic_algorithms_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of operations that have no deterministic form
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before)


@dataclass(frozen=True, slots=True)
class Sample:
    """Which tokens and output rows of a result are compared with a reference in float64."""

    tokens: Tensor
    rows: Tensor

    @staticmethod
    def of(tokens: int, rows: int, device: torch.device) -> Sample:
        """Choose at random, the first and the last always."""
        return Sample(_some(tokens, SAMPLED_TOKENS, device), _some(rows, SAMPLED_ROWS, device))


def _some(size: int, wanted: int, device: torch.device) -> Tensor:
    chosen = torch.randperm(size, device=device)[:wanted]
    chosen[0] = 0
    chosen[-1] = size - 1
    return chosen


def check(call: Call, expected: Tensor, sample: Sample, tolerance: float) -> float:
    """Run `call` with poisoned memory and compare.

    Args:
        call: Returns [..., N].
        expected: float64 [sampled tokens, sampled rows].
        sample: Which elements `expected` holds.
        tolerance: The largest relative error ``||y - expected|| / ||expected||``.

    Returns:
        The relative error.

    Raises:
        WrongResult: some element is not finite, or the error is larger.
    """
    call()  # compiles and tunes; what follows is what is timed
    with poisoned_memory():
        y = call()
    y = y.reshape(-1, y.shape[-1])
    if not bool(y.isfinite().all()):
        raise WrongResult(f"{int((~y.isfinite()).sum())} of {y.numel()} elements are not finite")
    y = y[sample.tokens][:, sample.rows].double()
    error = float((y - expected).norm() / expected.norm())
    if not error <= tolerance:
        raise WrongResult(f"relative error {error:.3g} is above {tolerance:g}")
    return error
