"""Tokens brought together by slice count, in one launch: where each goes, and its activations in operand order."""

import triton
import triton.language as tl


@triton.jit
def clamped(counts, NUM_SLICES: tl.constexpr):
    """Return slice counts within 1 .. NUM_SLICES."""
    return tl.minimum(tl.maximum(counts, 1), NUM_SLICES)


@triton.jit
def places_of(counts_ptr, token, count, tokens, NUM_SLICES: tl.constexpr, BLOCK_W: tl.constexpr):
    """Return where tokens of a count go: behind those of smaller counts and those of their own that stand before them.

    Shapes: token, count int32, of one shape [.]; returns int32 [.].
    """
    place = tl.zeros_like(count)
    for start in range(0, tokens, BLOCK_W):
        other = start + tl.arange(0, BLOCK_W)
        counts = clamped(counts=tl.load(counts_ptr + other, mask=other < tokens, other=1), NUM_SLICES=NUM_SLICES)
        behind = counts[None, :] < count[:, None]
        behind |= (counts[None, :] == count[:, None]) & (other[None, :] < token[:, None])
        place += tl.sum((behind & (other < tokens)[None, :]).to(tl.int32), 1)
    return place


@triton.jit(do_not_specialize=("x_ptr", "counts_ptr", "tokens", "columns", "marks"))
def gather_tokens(
    x_ptr,
    counts_ptr,
    rows_ptr,
    offsets_ptr,
    gathered_ptr,
    marks_ptr,
    tokens,
    columns,
    marks,
    NUM_SLICES: tl.constexpr,
    K_PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Sort tokens by slice count, stably, and write their activations in that order.

    Every program finds the places of its own BLOCK_M tokens by looking at all counts: no program waits for another.

    Shapes: x [tokens, columns]; counts int32 [tokens], values outside 1 .. NUM_SLICES count as the nearest; rows int32
        [tokens], where each sorted token came from; offsets int32 [NUM_SLICES + 1], where groups begin and end;
        gathered [tokens, K_PADDED rounded up to 128], columns as `operands.column_of` says, zero past the last one;
        marks_ptr int32 [marks], zeros: of parts of sums, of which none is there yet.
        Grid: (ceil(tokens / BLOCK_M),).
    """
    tl.static_assert(K_PADDED > 0, "there are columns")
    token = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    mine = token < tokens
    count = clamped(counts=tl.load(counts_ptr + token, mask=mine, other=NUM_SLICES), NUM_SLICES=NUM_SLICES)
    place = places_of(
        counts_ptr=counts_ptr,
        token=token,
        count=count,
        tokens=tokens,
        NUM_SLICES=NUM_SLICES,
        BLOCK_W=BLOCK_W,
    )
    tl.store(rows_ptr + place, token, mask=mine)
    if tl.program_id(0) == 0:
        # Where a token of count c + 1 behind all others would go: the end of group c.
        groups = tl.arange(0, 16)
        ends = places_of(
            counts_ptr=counts_ptr,
            token=tl.zeros([16], tl.int32),
            count=groups + 1,
            tokens=tokens,
            NUM_SLICES=NUM_SLICES,
            BLOCK_W=BLOCK_W,
        )
        tl.store(offsets_ptr + groups, ends, mask=groups <= NUM_SLICES)
    for start in range(tl.program_id(0) * BLOCK_W, marks, tl.num_programs(0) * BLOCK_W):
        mark = start + tl.arange(0, BLOCK_W)
        tl.store(marks_ptr + mark, tl.zeros([BLOCK_W], tl.int32), mask=mark < marks)
    WIDTH: tl.constexpr = (K_PADDED + 127) // 128 * 128
    for start in range(0, WIDTH, BLOCK_W):
        to = start + tl.arange(0, BLOCK_W)
        # Bits j i1 i0 h t1 t0 b of a place are bits t1 t0 j i1 i0 h b of its column.
        column = (to & ~126) | ((to & 6) << 4) | ((to & 64) >> 2) | ((to & 56) >> 2)
        here = mine[:, None] & (to < WIDTH)[None, :]
        at = x_ptr + token.to(tl.int64)[:, None] * columns + column[None, :]
        values = tl.load(at, mask=here & (column < columns)[None, :], other=0.0)
        tl.store(gathered_ptr + place.to(tl.int64)[:, None] * WIDTH + to[None, :], values, mask=here)
