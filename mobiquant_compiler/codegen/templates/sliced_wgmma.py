"""Many tokens, grouped by slice count, times a sliced weight whose bfloat16 values are made in registers (sm_90)."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from mobiquant_compiler.codegen import sorted_tiles, split_columns


@gluon.jit
def count_tiles(offsets_ptr, NUM_SLICES: gl.constexpr, TOKENS: gl.constexpr):
    """Return how many tiles there are of TOKENS tokens."""
    tiles = gl.to_tensor(0)
    for index in gl.static_range(NUM_SLICES):
        size = gl.load(offsets_ptr + index + 1) - gl.load(offsets_ptr + index)
        tiles += (size + TOKENS - 1) // TOKENS
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
    partial_ptr,
    marks_ptr,
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
    MOST_PARTS: gl.constexpr,
):
    """Multiply tokens, grouped by slice count, by a weight of which each uses the slices that its count says.

    A program has up to BLOCK_M tokens of one count, which it finds in the offsets, and BLOCK_N output rows, 64 for each
    of two warpgroups. Programs that follow one another share BLOCK_W tiles of tokens, which stay in the L2 cache while
    weights stream by. A tile of at most half as many tokens takes products of half as many columns, and all tiles do
    where programs of those are no more than run at a time. Instead, with MOST_PARTS above 1, programs that do not fill
    their last wave over the multiprocessors are split along the columns, as `split_columns.share_of` says.

    Shapes: x [T, K_PADDED rounded up to 128], tokens in the order of their counts, columns as `operands.column_of`
        says, described in boxes of BLOCK_M and of half of it, by 64 columns; rows int32 [T], where each came from;
        offsets int32 [NUM_SLICES + 1]; slices int32 [NUM_SLICES n_rows, K_PADDED / 16], described in boxes of
        BLOCK_N by 8 words; scale, zero [n_rows, K_PADDED / GROUP]; bias [n_rows]; y [T, n_rows], written; n_rows is
        ``row_units ROW_UNIT``: with a unit of 8, rows are written 16 bytes at a time; tiles, at least as many as
        there are, where none is split; at_once, programs that run at a time; where some are, partial float32
        [parts, 256 128], sums of all parts but the last of each tile; marks int32 [programs that are split, 256],
        zero before and afterwards. Grid: (tiles ceil(n_rows / BLOCK_N),), or at least as many as programs and their
        parts.
    Numerics: weights are ``s_c (Q_c - M_c) + s_c (M_c - Z_c)`` in the dtype of x, M_c half of what codes span:
        scale and second term are rounded (`operands.grid_of`), their sum once more; sums, and sums of parts, are
        float32, and rounded once with the bias.
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
    if MOST_PARTS == 1:
        number, made, share, scratch = gl.program_id(0), tiles, (), ()
        narrow_ones = count_tiles(offsets_ptr=offsets_ptr, NUM_SLICES=NUM_SLICES, TOKENS=BLOCK_M // 2)
        halved = narrow_ones * blocks <= at_once
    else:
        scratch = (partial_ptr, marks_ptr)
        steps = sorted_tiles.all_steps(n_rows, K_PADDED)
        made = count_tiles(offsets_ptr=offsets_ptr, NUM_SLICES=NUM_SLICES, TOKENS=BLOCK_M)
        number, share = split_columns.share_of(gl.program_id(0), made * blocks, at_once, steps, MOST_PARTS)
        halved = made < 0  # never: parts of the columns fill the multiprocessors
    band = number // (BLOCK_W * blocks)
    inside = number - band * (BLOCK_W * blocks)
    across = gl.minimum(made - band * BLOCK_W, BLOCK_W)
    if MOST_PARTS > 1:
        across = gl.maximum(across, 1)
    first_row = inside // across * BLOCK_N
    tile = band * BLOCK_W + inside % across
    if MOST_PARTS > 1:
        tile = gl.where(number < made * blocks, tile, made)
    found, first, end = find_tile(
        offsets_ptr=offsets_ptr,
        tile=tile,
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
                        share,
                        scratch,
                        count,
                        BLOCK_M >> shrink,
                        GROUP,
                        K_PADDED,
                        HAS_BIAS,
                        NUM_STAGES,
                    )
