"""What one call of an op costs before any arithmetic: `torch.library.Library` against `custom_op`.

    python benchmarks/bench_dispatch.py        # benchmarks/results/cpu/dispatch.json

Both ops have the schema of `mobiquant::routed_linear` and an implementation that returns an empty tensor.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import record
import torch
from torch import Tensor

CALLS, REPEATS = 2000, 15
SCHEMA = (
    "(Tensor x, Tensor counts, Tensor slices, Tensor scale, Tensor zero, Tensor? bias, int[] widths, int group, "
    "str layout) -> Tensor"
)


def _empty(x: Tensor, counts: Tensor, slices: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(x.shape[0], slices.shape[1])


def by_library() -> Callable[..., Tensor]:
    """Define the op through `torch.library.Library`, as this project does."""
    library = torch.library.Library("mq_bench_library", "DEF")
    library.define("op" + SCHEMA)
    library.impl("op", _empty, "CPU")
    library.impl("op", torch.library.fallthrough_kernel, "Autograd")
    by_library.keep = library  # type: ignore[attr-defined]  # the op dies with its library
    return torch.ops.mq_bench_library.op.default


def by_custom_op() -> Callable[..., Tensor]:
    """Define the op through `torch.library.custom_op`."""
    torch.library.custom_op("mq_bench_custom::op", _empty, mutates_args=(), schema=SCHEMA)
    return torch.ops.mq_bench_custom.op.default


def microseconds(op: Callable[..., Tensor]) -> tuple[float, float]:
    """Return the median time of a call and the spread between repeats (max - min)."""
    x, counts = torch.ones(1, 64), torch.ones(1, dtype=torch.int32)
    slices = torch.zeros(8, 16, 2, dtype=torch.int32)
    scale = torch.ones(16, 1)
    args = (x, counts, slices, scale, scale, None, [2, 2, 2, 2], 64, "slice_major")
    times = []
    with torch.no_grad():
        for _ in range(REPEATS + 1):
            start = time.perf_counter()
            for _ in range(CALLS):
                op(*args)
            times.append((time.perf_counter() - start) / CALLS * 1e6)
    times = times[1:]  # the first repeat warms up
    return statistics.median(times), max(times) - min(times)


def main() -> None:
    """Measure and write."""
    torch.set_num_threads(1)
    rows = []
    for method, make in (("Library.define + impl", by_library), ("custom_op", by_custom_op)):
        median, spread = microseconds(make())
        rows.append({"method": method, "time_us": round(median, 3), "spread_us": round(spread, 3), "calls": CALLS})
        print(rows[-1])
    record.write(record.RESULTS / "cpu" / "dispatch.json", rows, "cpu")


if __name__ == "__main__":
    main()
