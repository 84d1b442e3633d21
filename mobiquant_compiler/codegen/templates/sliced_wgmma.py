"""Many tokens, grouped by slice count, times a sliced weight whose bfloat16 values are made in registers (sm_90)."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from mobiquant_compiler.codegen import sorted_tiles


@gluon.jit
def narrow_tiles(offsets_ptr, NUM_SLICES: gl.constexpr, BLOCK_M: gl.constexpr):
    """Return how many tiles there are if all are narrow, of half of BLOCK_M tokens."""
    tiles = gl.to_tensor(0)
    for index in gl.static_range(NUM_SLICES):
        size = gl.load(offsets_ptr + index + 1) - gl.load(offsets_ptr + index)
        tiles += (size + BLOCK_M // 2 - 1) // (BLOCK_M // 2)
    return tiles


@gluon.jit
def find_tile(offsets_ptr, tile, halved, NUM_SLICES: gl.constexpr, BLOCK_M: gl.constexpr):
    """Return slice count, first token and end of the group of a tile of tokens; count 0 where there is no such tile.

    A group is cut into tiles of BLOCK_M tokens, and a last one of half as many where that will do. Wide tiles come
    first, so that the shortest programs are the last ones. Where they are `halved` all tiles are narrow.
    """
    found = gl.to_tensor(0)
    first = gl.to_tensor(0)
    end = gl.to_tensor(0)
    for narrow in gl.static_range(2):
        for index in gl.static_range(NUM_SLICES):
            start = gl.load(offsets_ptr + (NUM_SLICES - 1 - index))
            stop = gl.load(offsets_ptr + (NUM_SLICES - index))
            here = gl.where(halved, 0, (stop - start + BLOCK_M // 2 - 1) // BLOCK_M)
            if narrow:
                start += here * BLOCK_M
                here = (stop - start + BLOCK_M // 2 - 1) // (BLOCK_M // 2)
            if (tile >= 0) & (tile < here):
                found = NUM_SLICES - index
                first = start + tile * (BLOCK_M >> narrow)
                end = stop
            tile -= here
    return found, first, end


@gluon.jit(do_not_specialize=("scale_ptr", "zero_ptr", "bias_ptr", "tiles", "at_once", "row_units"))
def sliced_wgmma(
    x_desc,
    x_half_desc,
    rows_ptr,
    offsets_ptr,
    slices_desc,
    scale_ptr,
    zero_ptr,
    bias_ptr,
    y_ptr,
    tiles,
    at_once,
    row_units,
    WIDTHS: gl.constexpr,
    NUM_SLICES: gl.constexpr,
    GROUP: gl.constexpr,
    LAYOUT: gl.constexpr,
    K_PADDED: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_W: gl.constexpr,
    NUM_WARPS: gl.constexpr,
    NUM_STAGES: gl.constexpr,
    CONSUMERS: gl.constexpr,
    ROW_UNIT: gl.constexpr,
):
    """Multiply tokens, grouped by slice count, by a weight of which each uses the slices that its count says.

    A program has up to BLOCK_M tokens of one count, which it finds in the offsets, and BLOCK_N output rows, 64 for each
    of two warpgroups. Programs that follow one another share BLOCK_W tiles of tokens, which stay in the L2 cache while
    weights stream by. A tile of at most half as many tokens takes products of half as many columns, and all tiles do
    where programs of those are no more than run at a time.

    Shapes: x [T, K_PADDED rounded up to 128], tokens in the order of their counts, columns as `operands.column_of`
        says, described in boxes of BLOCK_M and of half of it, by 64 columns; rows int32 [T], where each came from;
        offsets int32 [NUM_SLICES + 1]; slices int32 [NUM_SLICES n_rows, K_PADDED / 16], described in boxes of BLOCK_N
        by 8 words; scale, zero [n_rows, K_PADDED / GROUP]; bias [n_rows]; y [T, n_rows], written; n_rows is ``row_units
        ROW_UNIT``: with a unit of 8, rows are written 16 bytes at a time; tiles, at least as many as there are;
        at_once, programs that run at a time. Grid: (tiles ceil(n_rows / BLOCK_N),).
    Numerics: weights are ``s_c (Q_c - M_c) + s_c (M_c - Z_c)`` in the dtype of x, M_c about the middle of the codes:
        scale and second term are rounded (`operands.grid_of`), their sum once more; sums are float32, and rounded once
        with the bias.
    """
    gl.static_assert(LAYOUT == "slice_major", "slices are packed whole")
    gl.static_assert(WIDTHS == (2,) * NUM_SLICES and NUM_SLICES <= 4, "one to four slices of two bits")
    gl.static_assert(GROUP == 32 or GROUP == 64 or GROUP == 128, "a group has 32, 64 or 128 columns")
    gl.static_assert(BLOCK_M == 128 or BLOCK_M == 256, "a tile has 128 or 256 tokens")
    gl.static_assert(BLOCK_N == 128 and CONSUMERS == 2 and NUM_WARPS == 4, "each of two warpgroups multiplies 64 rows")
    gl.static_assert(K_PADDED % 64 == 0, "a multiple of 64 columns: rows of words begin at multiples of 16 bytes")
    gl.static_assert(NUM_STAGES >= 2, "one stage is read while others are written")
    n_rows = row_units * ROW_UNIT
    blocks = (n_rows + BLOCK_N - 1) // BLOCK_N
    band = gl.program_id(0) // (BLOCK_W * blocks)
    inside = gl.program_id(0) - band * (BLOCK_W * blocks)
    across = gl.minimum(tiles - band * BLOCK_W, BLOCK_W)
    first_row = inside // across * BLOCK_N
    halved = narrow_tiles(offsets_ptr=offsets_ptr, NUM_SLICES=NUM_SLICES, BLOCK_M=BLOCK_M) * blocks <= at_once
    found, first, end = find_tile(
        offsets_ptr=offsets_ptr,
        tile=band * BLOCK_W + inside % across,
        halved=halved,
        NUM_SLICES=NUM_SLICES,
        BLOCK_M=BLOCK_M,
    )
    narrow = (halved | (end - first <= BLOCK_M // 2)).to(gl.int32)
    weight = (scale_ptr, zero_ptr, bias_ptr if HAS_BIAS else scale_ptr)
    place = (first, end, first_row, n_rows)
    # One condition in the other: the two of them joined by `&` cost ten instructions a step in the bodies (ptxas).
    for shrink in gl.static_range(2):
        if narrow == shrink:
            for count in gl.static_range(1, NUM_SLICES + 1):
                if found == count:
                    sorted_tiles.multiply_tile(
                        (x_desc if shrink == 0 else x_half_desc, slices_desc),
                        weight,
                        rows_ptr,
                        y_ptr,
                        place,
                        count,
                        BLOCK_M >> shrink,
                        GROUP,
                        K_PADDED,
                        HAS_BIAS,
                        NUM_STAGES,
                    )
