"""A program's tile: blocks of tokens by rows, multiplied by all its warps, summed and written."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from mobiquant_compiler.codegen import chains, fragments, scaling


@triton.jit
def stacked(sums, FOURS: tl.constexpr):
    """Stack FOURS (a power of two) fours of sums [THREADS], the first dimension after the threads' the fours'."""
    if FOURS == 1:
        pairs = tl.join(tl.join(sums[0], sums[1]), tl.join(sums[2], sums[3]))  # [thread, token of two, row of two]
        tile = tl.reshape(pairs, [sums[0].shape[0], 1, 2, 2])
    else:
        left = stacked(sums[: 2 * FOURS], FOURS // 2)
        right = stacked(sums[2 * FOURS :], FOURS // 2)
        both = tl.permute(tl.join(left, right), (0, 4, 1, 2, 3))
        tile = tl.reshape(both, [sums[0].shape[0], FOURS, 2, 2])
    return tile


@triton.jit
def store_blocks(
    sums,
    place,
    HAS_BIAS: tl.constexpr,
    ONE: tl.constexpr,
    BLOCKS: tl.constexpr,
    ROW_TILES: tl.constexpr,
    ROW_WARPS: tl.constexpr,
    NUM_WARPS: tl.constexpr,
):
    """Sum the warps of the same rows, add the bias, and write BLOCKS blocks of eight tokens by the program's rows.

    All of them at once: warps wait for one another once, and a compiler pass takes time that grows with the square of
    the number of stores.

    place: pointers to output and bias, first row, number of the first block, tokens and rows in all.
    """
    y_ptr, bias_ptr, program_row, first_block, tokens, n_rows = place
    SIDES: tl.constexpr = 1 if ONE else 2
    ROWS: tl.constexpr = 16 * ROW_WARPS
    WARPS: tl.constexpr = NUM_WARPS // ROW_WARPS
    FOURS: tl.constexpr = BLOCKS * ROW_TILES
    if ONE:
        tile = tl.reshape(tl.join(sums[0], sums[1]), [WARPS, ROW_WARPS, 8, 4, 1, 1, 2])
    else:
        tile = tl.reshape(stacked(sums, FOURS), [WARPS, ROW_WARPS, 8, 4, FOURS, 2, 2])
    # From warp, rows g and g + 8, tokens of lanes and sides to blocks and tiles, tokens, rows, and what is summed.
    tile = tl.permute(tile, (4, 3, 5, 1, 6, 2, 0))
    y = fragments.sum_neighbours(tl.reshape(tile, [FOURS * 4 * SIDES * ROWS, WARPS]))
    offs = tl.arange(0, FOURS * 4 * SIDES * ROWS)
    four = offs // (4 * SIDES * ROWS)
    row = program_row + four % ROW_TILES * ROWS + offs % ROWS
    token = (first_block + four // ROW_TILES) * 8 + offs % (4 * SIDES * ROWS) // ROWS * (3 - SIDES)
    if HAS_BIAS:
        y += tl.load(bias_ptr + row, mask=row < n_rows, other=0.0).to(tl.float32)
    at = token.to(tl.int64) * n_rows + row
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=(row < n_rows) & (token < tokens))


@triton.jit
def shrinks_of(counts_ptr, first_block, t, tokens, SPAN: tl.constexpr, WIDTHS: tl.constexpr, EMULATE: tl.constexpr):
    """Return how much smaller than the base step those of a lane's tokens are, two a block; float32 each."""
    shrinks = ()
    for place in tl.static_range(2 * SPAN):
        token = (first_block + place // 2) * 8 + 2 * t + place % 2
        own = fragments.load_words(counts_ptr + token, token < tokens, 1, EMULATE)[0]  # 0, as 1, is the base alone
        shrink = fragments.filled(t, 1).to(tl.float32)
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
    ALIKE: tl.constexpr,
    WIDTHS: tl.constexpr,
    GROUP: tl.constexpr,
    LAYOUT: tl.constexpr,
    K_PADDED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SIGNALS: tl.constexpr,
    EMULATE: tl.constexpr,
):
    """Multiply a program's BLOCKS blocks of eight tokens by its rows and write the result; see `chains.warp_sums`.

    Tokens that are ALIKE are multiplied together, others a few blocks at a time. Each of ROW_WARPS warps side by side
    has ROW_TILES tiles of 16 rows, and multiplies all of them by what it loads of a token. With SIGNALS the next kernel
    may begin when products of the first blocks are done.

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
            ALIKE,
            WIDTHS,
            LAYOUT,
            GROUP,
            K_PADDED,
            ACTIVATION,
            EMULATE,
        )
        if SIGNALS:
            gdc_launch_dependents()
        place = (y_ptr, weight[3], program_row, first_block, tokens, n_rows)
        store_blocks(sums, place, HAS_BIAS, False, SPAN, ROW_TILES, ROW_WARPS, NUM_WARPS)
