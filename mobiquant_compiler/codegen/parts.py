"""Which of a launch's weights a block of rows belongs to."""

import triton
import triton.language as tl


@triton.jit
def blocks_of(rows, BLOCK_N: tl.constexpr):
    """Return how many blocks the rows of all weights are cut into; rows: a tuple, of each weight."""
    blocks = tl.cdiv(rows[0], BLOCK_N)
    for index in tl.static_range(1, len(rows)):
        blocks += tl.cdiv(rows[index], BLOCK_N)
    return blocks


@triton.jit
def which_part(block, rows, BLOCK_N: tl.constexpr):
    """Return which weight a block of rows belongs to, and which of that weight's blocks it is."""
    part = 0
    if len(rows) > 1:
        start = 0
        begin = 0
        for index in tl.static_range(len(rows) - 1):
            start += tl.cdiv(rows[index], BLOCK_N)
            part += (block >= start).to(tl.int32)
            begin = tl.where(block >= start, start, begin)
        block -= begin
    return part, block


@triton.jit
def of_part(part, values):
    """Return what the weight `part` has of a tuple."""
    found = values[0]
    for index in tl.static_range(1, len(values)):
        found = tl.where(part == index, values[index], found)
    return found
