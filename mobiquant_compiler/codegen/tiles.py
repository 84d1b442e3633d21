"""A program's tile: blocks of tokens by rows, multiplied by all its warps, summed and written."""

import triton
import triton.language as tl

from mobiquant_compiler.codegen import chains, fragments, scaling, steps


@triton.jit
def store_block(
    sums,
    place,
    HAS_BIAS: tl.constexpr,
    ONE: tl.constexpr,
    ROW_WARPS: tl.constexpr,
    NUM_WARPS: tl.constexpr,
    EMULATE: tl.constexpr,
):
    """Sum the warps of the same rows, add the bias, and write a block of eight tokens by the program's rows.

    place: pointers to output and bias, first row, number of the block, tokens and rows in all.
    """
    y_ptr, bias_ptr, program_row, block, tokens, n_rows = place
    SIDES: tl.constexpr = 1 if ONE else 2
    ROWS: tl.constexpr = 16 * ROW_WARPS
    WARPS: tl.constexpr = NUM_WARPS // ROW_WARPS
    if ONE:
        tile = tl.reshape(tl.join(sums[0], sums[1]), [WARPS, ROW_WARPS, 8, 4, 2, 1])
    else:
        tile = tl.join(tl.join(sums[0], sums[1]), tl.join(sums[2], sums[3]))  # [thread, token of two, row of two]
        tile = tl.permute(tl.reshape(tile, [WARPS, ROW_WARPS, 8, 4, 2, 2]), (0, 1, 2, 3, 5, 4))
    # From warp, rows g and g + 8, tokens of lanes and sides to tokens, rows, and what is to be summed.
    tile = tl.permute(tile, (3, 5, 1, 4, 2, 0))
    y = fragments.sum_neighbours(tl.reshape(tile, [4 * SIDES * ROWS, WARPS]))
    offs = tl.arange(0, 4 * SIDES * ROWS)
    row = program_row + offs % ROWS
    token = block * 8 + offs // ROWS * (3 - SIDES)
    if HAS_BIAS:
        y += fragments.load_elements(bias_ptr + row, row < n_rows, EMULATE).to(tl.float32)
    at = token.to(tl.int64) * n_rows + row
    value = y.to(y_ptr.dtype.element_ty)
    fragments.store_elements(y_ptr + at, value, (row < n_rows) & (token < tokens), EMULATE)


@triton.jit
def shrinks_of(counts_ptr, first_block, t, tokens, SPAN: tl.constexpr, WIDTHS: tl.constexpr, EMULATE: tl.constexpr):
    """Return how much smaller than the base step those of a lane's tokens are, two a block; float32 each."""
    shrinks = ()
    for place in tl.static_range(2 * SPAN):
        token = (first_block + place // 2) * 8 + 2 * t + place % 2
        own = fragments.load_words(counts_ptr + token, token < tokens, 1, EMULATE)[0]  # 0, as 1, is the base alone
        shrink = tl.full(t.shape, 1.0, tl.float32)
        for count in tl.static_range(2, len(WIDTHS) + 1):
            shrink = tl.where(own >= count, scaling.shrink_at(WIDTHS, count), shrink)
        shrinks = shrinks + (shrink,)
    return shrinks


@triton.jit
def multiply_program(
    acts,
    weight,
    tile,
    BLOCKS: tl.constexpr,
    ROW_WARPS: tl.constexpr,
    ROW_TILES: tl.constexpr,
    COUNT: tl.constexpr,
    WHOLE: tl.constexpr,
    ONE: tl.constexpr,
    ALIKE: tl.constexpr,
    WIDTHS: tl.constexpr,
    GROUP: tl.constexpr,
    LAYOUT: tl.constexpr,
    K_PADDED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EMULATE: tl.constexpr,
):
    """Multiply a program's BLOCKS blocks of eight tokens by its rows and write the result; see `chains.warp_sums`.

    Tokens that are ALIKE are multiplied together, others a few blocks at a time. Each of ROW_WARPS warps side by side
    has ROW_TILES tiles of 16 rows, and multiplies all of them by what it loads of a token.

    Args: acts are the pointers (high, low, affine), weight those (slices, scale, zero, bias); tile is (pointer to
        counts, pointer to the output, first row, thread numbers, the largest count, tokens, rows in all).
    """
    counts_ptr, y_ptr, program_row, tid, most, tokens, n_rows = tile
    SPAN: tl.constexpr = chains.blocks_at_a_time(BLOCKS, ALIKE)
    NUM_WARPS: tl.constexpr = tid.shape[0] // 32
    CHAINS: tl.constexpr = 8 * ROW_WARPS // NUM_WARPS
    all_blocks = tl.cdiv(tokens, 8)
    warp = tid // 32
    rows = ()
    for tile in tl.static_range(ROW_TILES):
        rows = rows + (program_row + (tile * ROW_WARPS + warp % ROW_WARPS) * 16 + tid % 32 // 4,)
    first_chain = warp // ROW_WARPS * CHAINS
    for start in tl.range(0, BLOCKS, SPAN):
        first_block = tl.program_id(0) * BLOCKS + start
        numbers = ()
        for block in tl.static_range(SPAN):
            # Blocks past the last are read as the last, and not written.
            numbers = numbers + (tl.minimum(first_block + block, all_blocks - 1),)
        shrinks = ()
        if not ALIKE:
            shrinks = shrinks_of(counts_ptr, first_block, tid % 4, tokens, SPAN, WIDTHS, EMULATE)
        operands = (acts, weight[:3], (tid, rows, (numbers, all_blocks), shrinks, most, n_rows))
        sums = chains.warp_sums(
            operands,
            first_chain,
            CHAINS,
            COUNT,
            WHOLE,
            ONE,
            ALIKE,
            WIDTHS,
            LAYOUT,
            GROUP,
            K_PADDED,
            ACTIVATION,
            EMULATE,
        )
        for block in tl.static_range(SPAN):
            for tile in tl.static_range(ROW_TILES):
                own = sums
                if SPAN * ROW_TILES > 1:
                    own = steps.four_of(sums, block * ROW_TILES + tile)
                tile_row = program_row + tile * (16 * ROW_WARPS)
                place = (y_ptr, weight[3], tile_row, first_block + block, tokens, n_rows)
                store_block(own, place, HAS_BIAS, ONE, ROW_WARPS, NUM_WARPS, EMULATE)
