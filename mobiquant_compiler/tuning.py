"""Measures on the present GPU from how many tokens on one way of multiplying is faster than another.

The workspace way reads a weight once, whatever the number of tokens, and weights made in registers are made for a tile
of tokens at a time; integers are unpacked for eight. So where a way is faster than one that repeats more, it is taken
to be so for more tokens too: bisection finds the first number, in `COMPARISONS` comparisons a pair of ways and shape.
"""

from __future__ import annotations

import math
import statistics
from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path as FilePath
from tempfile import TemporaryFile
from typing import Any

import torch
from torch import Tensor

from mobiquant_compiler import wiring
from mobiquant_compiler.codegen import crossover
from mobiquant_compiler.codegen.crossover import NEVER, Crossover, Row
from mobiquant_compiler.errors import BadOption, CannotTune
from mobiquant_compiler.runtime import prefill as workspace
from mobiquant_compiler.runtime.launch import Weight
from mobiquant_compiler.spec import PREFILL_TOKENS, Activation, Path, Prefill, SliceSpec, choose_group

Timer = Callable[[Path, int, int, int, Prefill], float]  # (path, tokens, n, k, prefill) -> time of a call, any unit
Report = Callable[[str, int, int], None]

COMPARISONS = 5  # bisection of one number less than two to this power always takes as many
LEAST_TOKENS, MOST_TOKENS = PREFILL_TOKENS + 16, 4096
WARM_UPS, REPEATS = 3, 15
# Zeroed between calls: no weight is still in a cache, and the device is busy until the next call has been launched.
FLUSH_BYTES, FLUSHES = 1 << 28, 4

# Shapes (N, K) of 7B to 70B models.
SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (8192, 8192), (28672, 8192), (8192, 28672))


def token_counts() -> tuple[int, ...]:
    """Return the numbers of tokens that are tried: a geometric series of whole blocks of eight."""
    steps = 2**COMPARISONS - 2
    ratio = MOST_TOKENS / LEAST_TOKENS
    return tuple(8 * round(LEAST_TOKENS * ratio ** (step / steps) / 8) for step in range(steps + 1))


def first_faster(faster: Callable[[int], bool], counts: Sequence[int]) -> int:
    """Return the first number of tokens for which `faster` holds, `NEVER` where it holds for none.

    Args:
        faster: Holds for every number after the first for which it does.
        counts: Numbers of tokens in ascending order.

    Example:
        >>> first_faster(lambda tokens: tokens > 100, (80, 96, 112, 128))
        112
    """
    place = bisect_left(counts, True, key=faster)
    return counts[place] if place < len(counts) else NEVER


# The columns of a table: (which, faster than which, tokens routed or all alike).
PAIRS = {
    "tokens": (Path.WORKSPACE, Path.INTEGER, Prefill.ROUTED),
    "fused": (Path.FUSED, Path.INTEGER, Prefill.ROUTED),
    "routed": (Path.WORKSPACE, Path.FUSED, Prefill.ROUTED),
    "full": (Path.WORKSPACE, Path.FUSED, Prefill.FULL),
}


def tune(shapes: Sequence[tuple[int, int]], timer: Timer, report: Report | None = None) -> tuple[Row, ...]:
    """Return the row of every shape (N, K).

    Args:
        shapes: At least one, none twice.
        timer: Times a call.
        report: Told ``("tuning", comparisons done, of how many)``.

    Raises:
        CannotTune: a shape does not fit the memory.
    """
    total, done = COMPARISONS * len(PAIRS) * len(shapes), 0

    def row_of(n: int, k: int) -> Row:
        def first(one: Path, other: Path, prefill: Prefill) -> int:
            def faster(tokens: int) -> bool:
                nonlocal done
                result = timer(one, tokens, n, k, prefill) < timer(other, tokens, n, k, prefill)
                done += 1
                if report is not None:
                    report("tuning", done, total)
                return result

            found = first_faster(faster, token_counts())
            return PREFILL_TOKENS + 1 if found == LEAST_TOKENS else found  # nothing less was tried

        return Row(n, k, **{column: first(*pair) for column, pair in PAIRS.items()})

    rows = []
    for n, k in shapes:
        try:
            rows.append(row_of(n, k))
        except torch.OutOfMemoryError as error:
            reason = f"shape {n}x{k} does not fit the free memory of the GPU"
            raise CannotTune(reason=reason, wanted="smaller shapes, or a GPU that nothing else uses") from error
    return tuple(rows)


def find_gpu() -> tuple[torch.device, str]:
    """Return the present GPU and its full name.

    Raises:
        CannotTune: there is none, or none with a choice of paths.
    """
    wanted = "a CUDA device with a choice of paths (sm_90 or sm_100)"
    if not torch.cuda.is_available():
        raise CannotTune(reason="torch finds no CUDA device", wanted=wanted)
    device = torch.device("cuda", torch.cuda.current_device())
    reason = workspace.supports(torch.empty(0, dtype=torch.bfloat16, device=device), 1, 1)
    if reason is not None:
        raise CannotTune(reason=f"all calls take the integer path: {reason}", wanted=wanted)
    return device, torch.cuda.get_device_name(device)


def destination(gpu: str, output: FilePath | None = None) -> FilePath:
    """Return the file that `keep` can write the table of a GPU to: where `crossover.load` finds it, or `output`.

    Args:
        gpu: The device's full name.
        output: Another file.

    Raises:
        BadOption: it is a directory.
        OSError: nothing can be written there.
    """
    path = crossover.tuned_path(crossover.gpu_family(gpu)) if output is None else output
    if path.is_dir():
        raise BadOption(where="command line", name="--output", got=str(path), wanted="a file, which may be missing")
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryFile(dir=path.parent):
        return path


def keep(gpu: str, rows: tuple[Row, ...], path: FilePath) -> None:
    """Write the table of a GPU.

    Args:
        gpu: The device's full name.
        rows: What `tune` returned.
        path: What `destination` returned.
    """
    crossover.write(Crossover(crossover.gpu_family(gpu), rows), path)
    wiring._crossover.cache_clear()


def device_timer(device: torch.device) -> Timer:
    """Return a timer: the median of calls with random weights, cold caches; routed tokens have all slice counts."""
    weight = lru_cache(maxsize=1)(lambda n, k: random_weight(n, k, device))
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)

    def seconds(path: Path, tokens: int, n: int, k: int, prefill: Prefill) -> float:
        spec, one = weight(n, k)
        x = torch.randn(tokens, k, dtype=torch.bfloat16, device=device)
        if _refusal(path, x, n, k, spec, prefill) is not None:
            return math.inf
        counts = torch.arange(tokens, dtype=torch.int32, device=device) % spec.num_slices + 1
        if prefill is Prefill.FULL:
            counts.fill_(spec.num_slices)
        if path is Path.WORKSPACE:
            return _median(lambda: wiring.by_workspace(x, counts, [one], spec, prefill), flush)
        if path is Path.FUSED:
            return _median(lambda: wiring.by_fused(x, counts, [one], spec, prefill), flush)
        return _median(lambda: wiring.by_integers(x, counts, [one], spec, Activation.A16), flush)

    return seconds


def _refusal(path: Path, x: Tensor, n: int, k: int, spec: SliceSpec, prefill: Prefill) -> str | None:
    """Return why a call cannot go that way, None where it can."""
    if path is Path.FUSED:
        return wiring.fused_refusal(x, spec)
    return workspace.supports(x, n, k) if path is Path.WORKSPACE and prefill is Prefill.ROUTED else None


def random_weight(n: int, k: int, device: torch.device) -> tuple[SliceSpec, Weight]:
    """Return a weight of random codes in four slices of two bits."""
    spec, int32 = SliceSpec((2, 2, 2, 2), choose_group(k)), torch.iinfo(torch.int32)
    slices = torch.randint(int32.min, int32.max, spec.packed_shape(n, k), dtype=torch.int32, device=device)
    scale: Tensor = torch.rand(spec.scale_shape(n, k), dtype=torch.float16, device=device) / 1024
    return spec, Weight(slices, scale, torch.full_like(scale, 128), None)


def _median(call: Callable[[], Any], flush: Tensor) -> float:
    """Return the median time of a call on the device, in seconds: of a CUDA graph, so without what launching takes."""
    with torch.cuda.device(flush.device):
        for _ in range(WARM_UPS):
            call()
        torch.cuda.synchronize(flush.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=torch.cuda.Stream(flush.device)):
            call()
        spans = []
        for _ in range(REPEATS):
            for _ in range(FLUSHES):
                flush.zero_()
            spans.append((torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)))
            spans[-1][0].record()
            graph.replay()
            spans[-1][1].record()
        torch.cuda.synchronize(flush.device)
    return statistics.median(start.elapsed_time(end) for start, end in spans) / 1e3
