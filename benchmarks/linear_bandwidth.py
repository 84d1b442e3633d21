"""The memory bandwidth of a GPU as it can be had: a large copy, and reading alone."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from linear_timing import l2_bytes, measure

BYTES = 2 << 30
BLOCK, STEPS = 4096, 8


@triton.jit
def read_and_add(x_ptr, sums_ptr, BLOCK: tl.constexpr, STEPS: tl.constexpr):  # noqa: ANN001, ANN201  jitted
    """Add up what one program reads, STEPS blocks of int32, so that no load can be left out."""
    start = tl.program_id(0).to(tl.int64) * BLOCK * STEPS
    total = tl.zeros([BLOCK], tl.int32)
    for step in tl.static_range(STEPS):
        total += tl.load(x_ptr + start + step * BLOCK + tl.arange(0, BLOCK))
    tl.store(sums_ptr + tl.program_id(0), tl.sum(total))


def bandwidths(device: torch.device) -> dict[str, Any]:
    """Measure copying (bytes read plus bytes written) and reading, TB/s; reading is the better of two ways."""
    if device.type != "cuda":
        return {"copy_tb_s": None, "read_tb_s": None, "read_by": None, "l2_bytes": None}
    x = torch.randint(-(1 << 30), 1 << 30, (BYTES // 4,), dtype=torch.int32, device=device)
    y = torch.empty_like(x)
    copied = measure([lambda: y.copy_(x)] * 2, device)
    grid = (x.numel() // (BLOCK * STEPS),)
    sums = torch.empty(grid, dtype=torch.int32, device=device)

    kernel: Any = read_and_add[grid]

    def by_triton() -> torch.Tensor:
        kernel(x, sums, BLOCK, STEPS, num_warps=8)
        return sums

    floats = x.view(torch.float32).nan_to_num_()
    ways = {"triton": by_triton, "torch.sum": lambda: floats.sum()}
    read = {name: BYTES / measure([call] * 2, device).median_us / 1e6 for name, call in ways.items()}
    wanted = x.view(-1, BLOCK * STEPS).sum(1, dtype=torch.int32)
    if not torch.equal(by_triton(), wanted):
        del read["triton"]
    best = max(read, key=lambda name: read[name])
    return {
        "copy_tb_s": 2 * BYTES / copied.median_us / 1e6,
        "read_tb_s": read[best],
        "read_by": best,
        "l2_bytes": l2_bytes(device),
    }
